"""Weights under the names of other programs give the features that they had there; what cannot be
read gives its own reason.
"""

import argparse
import collections
import json
import pathlib
import re
import sys
import zipfile

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models import get_model

import visualize_attention
from runtime.commandline import InputError
from training.backbone import build_backbone
from training.checkpoint import load_backbone, read_checkpoint
from vit import VisionTransformer


def vit(seed: int, **sizes) -> VisionTransformer:
    torch.manual_seed(seed)
    sizes = {"img_size": 35, "init_std": 0.2} | sizes
    return build_backbone("vit_nano", 7, **sizes).eval()


TEACHER, STUDENT = vit(1), vit(2)
IMAGES = torch.randn(3, 3, 35, 35, generator=torch.Generator().manual_seed(5))
State = dict[str, Tensor]


def prefixed(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def both(teacher: str, student: str, rename=dict) -> State:
    """Both networks in one state dict, the student first."""
    state = prefixed(student, rename(STUDENT.state_dict()))
    return state | prefixed(teacher, rename(TEACHER.state_dict()))


def renamed(state: State, table: dict[str, str]) -> State:
    """The state with each of the table's patterns replaced in each name."""
    other = {}
    for name, value in state.items():
        for ours, theirs in table.items():
            name = re.sub(ours, theirs, name)
        other[name] = value
    return other


def hugging_face(state: State) -> State:
    """As transformers.ViTModel, whose queries, keys and values are three layers."""
    apart = {}
    for name, value in state.items():
        if ".qkv." in name:
            for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                apart[name.replace("attn.qkv", f"attention.attention.{part}")] = third
        else:
            apart[name] = value
    return renamed(apart, {
        r"^cls_token": "embeddings.cls_token",
        r"^pos_embed": "embeddings.position_embeddings",
        r"^patch_embed\.proj": "embeddings.patch_embeddings.projection",
        r"^norm": "layernorm",
        r"^blocks": "encoder.layer",
        r"norm1": "layernorm_before",
        r"norm2": "layernorm_after",
        r"attn\.proj": "attention.output.dense",
        r"mlp\.fc1": "intermediate.dense",
        r"mlp\.fc2": "output.dense",
    })


def hugging_face_of_2026(state: State) -> State:
    """The same layers under their later names."""
    return renamed(hugging_face(state), {
        r"attention\.attention\.(q|k|v)(uery|ey|alue)": r"attention.\1_proj",
        r"attention\.output\.dense": "attention.o_proj",
    })


def torchvision(state: State) -> State:
    """As torchvision.models.vit_b_16."""
    return renamed(state, {
        r"^cls_token": "class_token",
        r"^pos_embed": "encoder.pos_embedding",
        r"^patch_embed\.proj": "conv_proj",
        r"^norm": "encoder.ln",
        r"^blocks\.": "encoder.layers.encoder_layer_",
        r"norm(\d)": r"ln_\1",
        r"attn\.qkv\.": "self_attention.in_proj_",
        r"attn\.proj": "self_attention.out_proj",
        r"mlp\.fc1": "mlp.0",
        r"mlp\.fc2": "mlp.3",
    })


def mmpretrain(state: State) -> State:
    return renamed(state, {
        r"^patch_embed\.proj": "patch_embed.projection",
        r"^norm": "ln1",
        r"^blocks": "layers",
        r"\.norm(\d)": r".ln\1",
        r"mlp\.fc1": "ffn.layers.0.0",
        r"mlp\.fc2": "ffn.layers.1",
    })


HEAD = {"head.mlp.0.weight": torch.zeros(3, 128), "head.last_layer.weight_v": torch.zeros(5, 3)}
# What stands beside the backbone for the training: it is left out, and named.
FILES = {
    "our run": lambda: {
        "student": prefixed("module.backbone.", STUDENT.state_dict()) | prefixed("module.", HEAD),
        "teacher": prefixed("backbone.", TEACHER.state_dict()) | HEAD,
        "args": {"arch": "vit_nano"},
    },
    "compiled backbone": lambda: {
        "student": prefixed("module.backbone._orig_mod.", STUDENT.state_dict()),
        "teacher": prefixed("_orig_mod.backbone._orig_mod.", TEACHER.state_dict()),
    },
    "iBOT": lambda: {
        "student": prefixed("backbone.", STUDENT.state_dict())
        | {"backbone.masked_embed": torch.zeros(1, 128)},
        "teacher": prefixed("backbone.", TEACHER.state_dict())
        | {"head.last_layer2.weight_v": torch.zeros(5, 3)},
    },
    "DINOv2's training": lambda: {
        "teacher": prefixed("backbone.", TEACHER.state_dict())
        | {"backbone.mask_token": torch.zeros(1, 128), "dino_head.mlp.0.weight": torch.zeros(3)},
        "student": prefixed("backbone._fsdp_wrapped_module.", STUDENT.state_dict()),
    },
    "lightly": lambda: {"state_dict": both("teacher_backbone.", "student_backbone.")},
    "lightly on timm": lambda: {
        "state_dict": both("teacher_backbone.vit.", "student_backbone.vit.")
        | {"student_backbone.mask_token": torch.zeros(1, 1, 128)},
        "hyper_parameters": {"lr": 0.1},
    },
    "lightly's BYOL": lambda: both("backbone_momentum.", "backbone."),
    "solo-learn": lambda: {
        "state_dict": both("momentum_backbone.", "backbone.")
        | {"classifier.weight": torch.zeros(5, 128), "head.mlp.0.weight": torch.zeros(3)}
    },
    "MoCo-v3": lambda: {
        "arch": "vit_small",
        "state_dict": both("module.momentum_encoder.", "module.base_encoder.")
        | {"module.predictor.0.weight": torch.zeros(3), "module.base_encoder.head.0.weight":
           torch.zeros(3), "module.momentum_encoder.head.0.weight": torch.zeros(3)},
    },
    "MoCo": lambda: {
        "state_dict": both("module.encoder_k.", "module.encoder_q.")
        | {"module.queue": torch.zeros(3, 5), "module.queue_ptr": torch.zeros(1)}
    },
    "BYOL": lambda: both("target_encoder.net.", "online_encoder.net.")
    | prefixed("net.", STUDENT.state_dict()),
    "mmselfsup": lambda: {
        "state_dict": both("momentum_encoder.module.0.", "backbone.", mmpretrain)
    },
    "timm's training": lambda: {
        "state_dict": STUDENT.state_dict(), "state_dict_ema": TEACHER.state_dict()
    },
    "DeiT": lambda: {"model": STUDENT.state_dict(), "model_ema": TEACHER.state_dict()},
    "mmengine's average": lambda: {
        # it swaps the two when it saves
        "meta": {"mmengine_version": "0.10.4"},
        "state_dict": prefixed("backbone.", mmpretrain(TEACHER.state_dict())),
        "ema_state_dict": prefixed("module.backbone.", mmpretrain(STUDENT.state_dict())),
    },
    "stochastic averages": lambda: {
        "model": STUDENT.state_dict(),
        "swa_model": {"n_averaged": torch.tensor(5), **prefixed("module.", TEACHER.state_dict())},
    },
    "MSN": lambda: {
        "encoder": prefixed("module.", STUDENT.state_dict()),
        "target_encoder": prefixed("module.", TEACHER.state_dict()),
        "prototypes": torch.zeros(3, 5),
    },
    "teacher in a dictionary of its own": lambda: {
        "teacher": {"state_dict": prefixed("module.backbone.", TEACHER.state_dict())},
        "student": {"state_dict": prefixed("module.backbone.", STUDENT.state_dict())},
    },
    "average beside": lambda: {
        "model_state_dict": STUDENT.state_dict(), "ema": {"module": TEACHER.state_dict()}
    },
}


@pytest.mark.parametrize("key", ["teacher", "student"])
@pytest.mark.parametrize("name", FILES)
def test_of_two_networks_in_a_file_the_one_that_was_asked_for_is_read(name, key, tmp_path, capsys):
    torch.save(FILES[name](), tmp_path / "file.pth")
    backbone, _ = load_backbone(tmp_path / "file.pth", key)
    wanted = {"teacher": TEACHER, "student": STUDENT}[key]
    torch.testing.assert_close(backbone(IMAGES), wanted(IMAGES), rtol=0, atol=0)
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and "not read: " in line, "what was left out is named in one line"


ALONE = {
    "timm": dict,
    "Hugging Face": hugging_face,
    "Hugging Face with its task": lambda state: prefixed("vit.", hugging_face(state))
    | {"classifier.weight": torch.zeros(5, 128), "vit.pooler.dense.weight": torch.zeros(3)},
    "Hugging Face's masked image": lambda state: prefixed("vit.", hugging_face(state))
    | {"vit.embeddings.mask_token": torch.zeros(1, 1, 128), "decoder.0.weight": torch.zeros(3)},
    "Hugging Face of 2026": hugging_face_of_2026,
    "torchvision": lambda state: torchvision(state) | {"heads.head.weight": torch.zeros(5, 128)},
    "mmpretrain": lambda state: {
        "state_dict": prefixed("backbone.", mmpretrain(state)) | {"neck.0.weight": torch.zeros(3)},
        "meta": {},
    },
    "MAE": lambda state: {
        "model": state
        | {"mask_token": torch.zeros(1, 1, 5), "decoder_pos_embed": torch.zeros(1, 26, 5),
           "decoder_blocks.0.norm1.weight": torch.zeros(5)}
    },
    "a compiled timm network": lambda state: prefixed("_orig_mod.", state),
    "Lightning's module": lambda state: {"state_dict": prefixed("model.", state)},
    "model_state_dict": lambda state: {"epoch": 7, "model_state_dict": prefixed("module.", state)},
    "VISSL": lambda state: {
        "classy_state_dict": {"base_model": {"model": {"trunk": state}}}, "iteration": 5
    },
    "16 bits": lambda state: {name: value.half() for name, value in state.items()},
}


@pytest.mark.parametrize("name", ALONE)
def test_each_projects_names_give_the_same_features(name, tmp_path):
    torch.save(ALONE[name](TEACHER.state_dict()), tmp_path / "file.pth")
    backbone, _ = load_backbone(tmp_path / "file.pth")
    tolerance = 0.02 if name == "16 bits" else 0
    torch.testing.assert_close(backbone(IMAGES), TEACHER(IMAGES), rtol=tolerance, atol=tolerance)


RESNETS = {
    "MoCo's ResNet": lambda state: {
        "state_dict": prefixed("module.encoder_k.", state)
        | {"module.encoder_k.fc.0.weight": torch.zeros(3)}
    },
    "SwAV": lambda state: prefixed("module.", state)
    | {"module.projection_head.0.weight": torch.zeros(3), "module.prototypes.weight":
       torch.zeros(3)},
    "lightly's sequence": lambda state: renamed(prefixed("backbone.", state), {
        r"\.conv1\.(?=weight$)(?<=backbone\.conv1\.)": ".0.",
        r"backbone\.bn1": "backbone.1",
        r"layer1": "4", r"layer2": "5", r"layer3": "6", r"layer4": "7",
    }),
}


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101"])
@pytest.mark.parametrize("name", RESNETS)
def test_each_resnet_is_known_by_its_blocks(name, arch, tmp_path):
    resnet = build_backbone(arch).eval()
    torch.save(RESNETS[name](resnet.state_dict()), tmp_path / "file.pth")
    backbone, args = load_backbone(tmp_path / "file.pth")
    assert args["arch"] == arch
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(backbone(images), resnet(images), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["wide_resnet50_2", "resnext50_32x4d"])
def test_another_kind_of_resnet_is_called_so(name, tmp_path):
    with torch.device("meta"):
        state = get_model(name).state_dict()
    few = {key: torch.zeros(value.shape) for key, value in state.items() if "conv" in key}
    torch.save(few, tmp_path / "file.pth")
    with pytest.raises(InputError, match="a wider ResNet or a ResNeXt"):
        load_backbone(tmp_path / "file.pth")


def test_an_optimizers_state_is_called_so(tmp_path):
    weight = torch.nn.Parameter(torch.zeros(3, 5))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(InputError, match="is an optimizer's state: use the network's weights"):
        load_backbone(tmp_path / "optimizer.pt")


def test_a_lone_student_is_not_taken_for_the_teacher(tmp_path):
    torch.save(prefixed("student_backbone.", STUDENT.state_dict()), tmp_path / "file.pth")
    with pytest.raises(InputError, match="has no 'teacher', but student_backbone"):
        load_backbone(tmp_path / "file.pth")
    torch.save({"state_dict": both("momentum_a.", "momentum_b.")}, tmp_path / "file.pth")
    with pytest.raises(InputError, match="several networks"):
        load_backbone(tmp_path / "file.pth")


MISFITS = {
    "register tokens": {"register_tokens": torch.zeros(1, 4, 128)},
    "LayerScale": {"blocks.0.ls1.gamma": torch.zeros(128)},
    "distillation token": {"dist_token": torch.zeros(1, 1, 128)},
    "relative positions": {"blocks.0.attn.relative_position_bias_table": torch.zeros(3)},
    "queries and keys": {"blocks.0.attn.q_norm.weight": torch.zeros(3)},
    "normalisation first": {"norm_pre.weight": torch.zeros(128)},
    "averages its patches": {"fc_norm.weight": torch.zeros(128)},
    "films": {"patch_embed.proj.weight": torch.zeros(128, 3, 2, 7, 7)},
    "27 positions": {"pos_embed": torch.zeros(1, 27, 128)},
}


@pytest.mark.parametrize("reason", MISFITS)
def test_a_vit_that_computes_something_else_is_refused_with_the_reason(reason, tmp_path):
    torch.save(TEACHER.state_dict() | MISFITS[reason], tmp_path / "file.pth")
    with pytest.raises(InputError, match=reason):
        load_backbone(tmp_path / "file.pth")


def test_a_vit_without_cls_token_or_positions_is_refused_with_the_reason(tmp_path):
    for name, reason in (("cls_token", "no .CLS. token"), ("pos_embed", "no learnt positions")):
        state = TEACHER.state_dict()
        del state[name]
        torch.save(state, tmp_path / "file.pth")
        with pytest.raises(InputError, match=reason):
            load_backbone(tmp_path / "file.pth")


def test_a_part_of_queries_keys_and_values_is_not_enough(tmp_path):
    state = hugging_face(TEACHER.state_dict())
    del state["encoder.layer.2.attention.attention.key.bias"]
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(InputError, match=r"lacks a part of blocks\.2\.attn\.query\.bias"):
        load_backbone(tmp_path / "file.pth")


def test_safetensors_are_read_with_their_package_and_named_without(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    file = tmp_path / "model.safetensors"
    state = {name: value.contiguous() for name, value in
             hugging_face(TEACHER.state_dict()).items()}
    safetensors.save_file(state, file)
    backbone, _ = load_backbone(file)
    torch.testing.assert_close(backbone(IMAGES), TEACHER(IMAGES), rtol=0, atol=0)

    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(InputError, match="damaged safetensors file"):
        load_backbone(file)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(InputError, match="pip install safetensors"):
        load_backbone(file)


CONTENTS = {
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 8\n",
    "web page": b"\n<!DOCTYPE html><html><head><title>Google Drive</title></head></html>",
    "text file": b'{"weight_map": {"embeddings.cls_token": "model-00001.safetensors"}}',
    "is packed": b"\x1f\x8b\x08\x00" + bytes(99),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(99),
    "pickle of Python's": b"\x80\x04\x95" + bytes(99),
    "NumPy array": b"\x93NUMPY\x01\x00" + bytes(99),
    r"\(0 bytes\)": b"",
}


@pytest.mark.parametrize("reason", CONTENTS)
def test_what_is_no_checkpoint_is_called_what_it_is(reason, tmp_path):
    (tmp_path / "file.pth").write_bytes(CONTENTS[reason])
    with pytest.raises(InputError, match=reason):
        read_checkpoint(tmp_path / "file.pth")


def test_a_torchscript_file_is_called_so_and_not_run(tmp_path):
    torch.jit.script(torch.nn.Linear(3, 5)).save(tmp_path / "file.pt")
    with pytest.raises(InputError, match="TorchScript"):
        read_checkpoint(tmp_path / "file.pt")


def test_an_archive_is_called_by_what_is_in_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "file.zip", "w") as archive:
        archive.writestr("weights/model.pth", b"abc")
    with pytest.raises(InputError, match=r"an archive of weights/model\.pth: unpack it"):
        read_checkpoint(tmp_path / "file.zip")
    np.savez(tmp_path / "file.npz", weight=np.zeros(3))
    with pytest.raises(InputError, match="holds NumPy arrays"):
        read_checkpoint(tmp_path / "file.npz")


def test_an_address_is_called_so():
    with pytest.raises(InputError, match="is an address: download"):
        read_checkpoint("https://example.org/dino.pth")


def test_a_folder_is_answered_with_the_weights_in_it(tmp_path):
    with pytest.raises(InputError, match="has no weights"):
        read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"give the file in it: model\.safetensors$"):
        read_checkpoint(tmp_path)


def test_numpy_and_paths_beside_the_weights_are_read(tmp_path):
    """The release's launcher for Slurm writes paths into its flags."""
    args = argparse.Namespace(arch="vit_small", output_dir=pathlib.PosixPath("runs/a"))
    torch.save({
        "teacher": prefixed("backbone.", TEACHER.state_dict()),
        "args": args,
        "best": np.float32(0.5),
        "steps": np.int64(7),
        "history": np.arange(5.0),
        "meters": collections.defaultdict(list, {"loss": [0.5]}),
        "losses": collections.deque([1.0, 2.0], maxlen=3),
        "generator": ("MT19937", np.arange(3, dtype=np.uint32)),
    }, tmp_path / "file.pth")
    backbone, flags = load_backbone(tmp_path / "file.pth")
    torch.testing.assert_close(backbone(IMAGES), TEACHER(IMAGES), rtol=0, atol=0)
    assert flags["arch"] == "vit_nano" and "output_dir" not in flags


def test_the_settings_of_a_framework_are_read_without_its_code(tmp_path, monkeypatch):
    """omegaconf's, which are not installed here, as solo-learn's files have them."""
    module = type(sys)("omegaconf.dictconfig")
    kind = type("DictConfig", (), {"__module__": "omegaconf.dictconfig"})
    module.DictConfig = kind
    monkeypatch.setitem(sys.modules, "omegaconf", type(sys)("omegaconf"))
    monkeypatch.setitem(sys.modules, "omegaconf.dictconfig", module)
    settings = kind()
    settings.lr = 0.1
    torch.save({"state_dict": TEACHER.state_dict(), "hyper_parameters": settings},
               tmp_path / "file.ckpt")
    monkeypatch.delitem(sys.modules, "omegaconf.dictconfig")
    backbone, _ = load_backbone(tmp_path / "file.ckpt")
    torch.testing.assert_close(backbone(IMAGES), TEACHER(IMAGES), rtol=0, atol=0)


def test_a_line_says_when_the_file_does_not_give_the_heads_and_num_heads_sets_them(
    tmp_path, capsys
):
    other = vit(3, num_heads=8)
    torch.save(other.state_dict(), tmp_path / "file.pth")
    load_backbone(tmp_path / "file.pth")
    assert "does not say its heads: taken as 4; --num_heads" in capsys.readouterr().out
    backbone, args = load_backbone(tmp_path / "file.pth", num_heads=8)
    torch.testing.assert_close(backbone(IMAGES), other(IMAGES), rtol=0, atol=0)
    assert args["num_heads"] == 8 and "heads" not in capsys.readouterr().out

    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 8}))
    backbone, _ = load_backbone(tmp_path / "file.pth")
    assert backbone.blocks[0].attn.num_heads == 8, "Hugging Face says it beside the weights"


def test_other_heads_than_the_file_says_are_refused(tmp_path):
    state = prefixed("backbone.", TEACHER.state_dict())
    torch.save({"teacher": state, "args": {"arch": "vit_nano", "num_heads": 0}},
               tmp_path / "file.pth")
    with pytest.raises(InputError, match=r"--num_heads 8, but .* holds 4: leave the flag out"):
        load_backbone(tmp_path / "file.pth", num_heads=8)
    load_backbone(tmp_path / "file.pth", num_heads=4)


def test_the_attention_tool_takes_the_heads_and_refuses_less_than_none(tmp_path):
    other = vit(3, num_heads=8)
    torch.save(other.state_dict(), tmp_path / "file.pth")
    parser = visualize_attention.attention_command_line("")
    weights = ["--pretrained_weights", str(tmp_path / "file.pth"), "--device", "cpu"]
    network, _ = visualize_attention.load_network(parser.parse_args([*weights, "--num_heads", "8"]))
    torch.testing.assert_close(
        network.get_last_selfattention(IMAGES), other.get_last_selfattention(IMAGES)
    )
    with pytest.raises(InputError, match="--num_heads -1 must be at least 0"):
        visualize_attention.load_network(parser.parse_args([*weights, "--num_heads", "-1"]))
