"""Weights from anywhere, strictly: ours, the release's two kinds, timm's; hostile and torn files
are refused.
"""

import argparse
import pickle

import numpy as np
import pytest
import torch

from head import DINOHead
from multicrop import MultiCropNetwork
from runtime.commandline import InputError, write_whole
from teacher import make_teacher
from training import pretrained
from training.backbone import build_backbone
from training.checkpoint import load_backbone, read_checkpoint, save_checkpoint


@pytest.fixture
def network() -> MultiCropNetwork:
    torch.manual_seed(0)
    backbone = build_backbone("vit_nano", patch_size=7, img_size=35)
    return MultiCropNetwork(
        backbone, DINOHead(backbone.embed_dim, 23, hidden_dim=13, bottleneck_dim=7)
    )


def full_checkpoint(network: MultiCropNetwork, args) -> dict:
    """As the release writes it: the student in DDP, flags as a Namespace, NumPy learning rates."""
    return {
        "student": {f"module.{name}": value + 1 for name, value in network.state_dict().items()},
        "teacher": make_teacher(network).state_dict(),
        "epoch": 100,
        "args": args,
        "optimizer": {
            "state": {},
            "param_groups": [{"lr": np.float64(0.0005), "weight_decay": 0.04}],
        },
        "dino_loss": {"center": torch.zeros(1, 23)},
    }


def same_weights(loaded: torch.nn.Module, network: MultiCropNetwork, offset: float = 0.0) -> bool:
    pairs = zip(loaded.parameters(), network.backbone.parameters(), strict=True)
    return all(torch.equal(a, b + offset) for a, b in pairs)


@pytest.mark.parametrize("key", ["teacher", "student"])
def test_the_releases_full_checkpoints_load_for_teacher_and_student(network, key, tmp_path):
    torch.save(
        full_checkpoint(network, argparse.Namespace(arch="deit_small", out_dim=23)),
        tmp_path / "full.pth",
    )
    backbone, args = load_backbone(tmp_path / "full.pth", key)
    assert same_weights(backbone, network, offset=1.0 if key == "student" else 0.0)
    assert args["arch"] == "vit_nano" and args["patch_size"] == 7 and args["out_dim"] == 23


@pytest.mark.parametrize(
    "wrap", [dict, lambda state: {"state_dict": state}, lambda state: {"model": state}]
)
def test_bare_backbones_and_timms_state_dicts_load_with_their_classifier_left_out(
    network, wrap, tmp_path
):
    state = network.backbone.state_dict() | {
        "head.weight": torch.zeros(5, 128),
        "head.bias": torch.zeros(5),
    }
    torch.save(wrap(state), tmp_path / "bare.pth")
    backbone, args = load_backbone(tmp_path / "bare.pth")
    assert same_weights(backbone, network) and backbone.grid == 5
    assert args == {"arch": "vit_nano", "patch_size": 7, "img_size": 35, "in_chans": 3}


def test_a_network_of_grey_images_is_refused(tmp_path):
    torch.save(build_backbone("vit_nano", 8, 48, in_chans=1).state_dict(), tmp_path / "grey.pth")
    with pytest.raises(InputError, match=r"grey\.pth.*1 channels"):
        load_backbone(tmp_path / "grey.pth")


def test_a_resnet_without_its_classifier_loads(tmp_path):
    resnet = build_backbone("resnet50")
    torch.save(resnet.state_dict(), tmp_path / "resnet.pth")
    backbone, args = load_backbone(tmp_path / "resnet.pth")
    assert args["arch"] == "resnet50" and backbone.embed_dim == 2048
    assert backbone(torch.randn(2, 3, 64, 96)).shape == (2, 2048)


def test_what_does_not_fit_is_listed_and_never_ignored(network, tmp_path):
    state = network.backbone.state_dict()
    state["surplus"] = state.pop("norm.weight")
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(InputError, match=r"missing 1 \(norm.weight\), unexpected 1 \(surplus\)"):
        load_backbone(tmp_path / "bad.pth")


def test_a_total_mismatch_is_an_error(tmp_path):
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pth")
    reason = r"no ViT or ResNet that this reads: its tensors are layer\.weight"
    with pytest.raises(InputError, match=reason):
        load_backbone(tmp_path / "other.pth")
    with pytest.raises(InputError, match="missing 54"):
        load_backbone(tmp_path / "other.pth", arch="vit_nano", patch_size=8)


@pytest.mark.parametrize(("flag", "value"), [("arch", "vit_small"), ("patch_size", 16)])
def test_another_arch_or_patch_size_than_asked_is_an_error(network, flag, value, tmp_path):
    torch.save(network.backbone.state_dict(), tmp_path / "nano.pth")
    with pytest.raises(InputError, match=f"--{flag} {value}, but"):
        load_backbone(tmp_path / "nano.pth", **{flag: value})


class Evil:
    def __reduce__(self):
        return (open, ("evil-was-here", "w"))


def test_a_pickle_with_code_is_refused_and_its_code_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"teacher": Evil()}, "evil.pth")
    with pytest.raises(InputError, match="never run"):
        read_checkpoint("evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(InputError, match=r"plain\.pth"):
        read_checkpoint("plain.pth")
    assert not (tmp_path / "evil-was-here").exists()


def test_a_checkpoint_truncated_anywhere_is_refused_in_one_line(network, tmp_path):
    save_checkpoint(tmp_path / "whole.pth", {"teacher": network.state_dict()})
    whole = (tmp_path / "whole.pth").read_bytes()
    for twentieth in range(20):
        (tmp_path / "cut.pth").write_bytes(whole[: len(whole) * twentieth // 20])
        with pytest.raises(InputError, match=r"cut\.pth' is truncated or no checkpoint"):
            read_checkpoint(tmp_path / "cut.pth")


def test_a_missing_file_and_a_file_that_holds_no_dict_are_named(tmp_path):
    with pytest.raises(InputError, match="no checkpoint at"):
        read_checkpoint(tmp_path / "nowhere.pth")
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(InputError, match="holds a Tensor"):
        read_checkpoint(tmp_path / "tensor.pth")


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, {"epoch": 1})

    def half(part):
        part.write_bytes(b"half of")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"No space left.*untouched"):
        write_whole(path, half)
    assert read_checkpoint(path) == {"epoch": 1} and len(list(tmp_path.iterdir())) == 1


def test_a_downloaded_file_with_another_hash_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/dino_deitsmall8_pretrain.pth").write_bytes(b"something else")
    with pytest.raises(InputError, match="not 230cd5"):
        pretrained.download_pretrained("dino_vits8")
    with pytest.raises(InputError, match="choose one of dino_vits16"):
        pretrained.download_pretrained("dino_vitg14")


@pytest.mark.parametrize(
    "content",
    [
        {"teacher": [1]},
        {"model": torch.zeros(2)},
        {1: torch.zeros(2)},
        {},
        {"args": "x", "teacher": {"cls_token": 5}},
        {"cls_token": torch.zeros(2)},
    ],
)
def test_a_file_of_another_make_is_refused_in_one_line(content, tmp_path):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(InputError, match=r"odd\.pth"):
        load_backbone(tmp_path / "odd.pth")


def test_any_convnet_that_this_project_trained_loads_again(tmp_path):
    resnet = build_backbone("resnet18")
    state = {f"backbone.{name}": value for name, value in resnet.state_dict().items()}
    torch.save(
        {"teacher": state, "args": {"arch": "resnet18", "patch_size": 16}}, tmp_path / "ours.pth"
    )
    backbone, args = load_backbone(tmp_path / "ours.pth")
    assert args["arch"] == "resnet18" and args["patch_size"] == 1 and backbone.embed_dim == 512


def test_a_whole_checkpoint_that_memory_cannot_hold_is_not_called_torn(tmp_path, monkeypatch):
    """But one that asks for more than it has is."""
    path = tmp_path / "whole.pth"
    torch.save({"a": torch.zeros(100)}, path)
    asked = 400

    def full(*args, **kwargs):
        raise RuntimeError(f"DefaultCPUAllocator: you tried to allocate {asked} bytes.")

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(RuntimeError, match="tried to allocate 400 bytes"):
        read_checkpoint(path)
    asked = 10**12
    with pytest.raises(InputError, match="truncated"):
        read_checkpoint(path)
