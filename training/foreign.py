"""Weights in the files of other programs: what the file is, where in it the network is, its names.

The bare backbones of the release and of timm are read here too. Known are the names of timm,
Hugging Face, torchvision, mmpretrain, lightly, solo-learn, MoCo, BYOL, SwAV, iBOT and VISSL.
Two networks in a file are told apart by the words in their prefixes, such as momentum_backbone.
"""

import argparse
import codecs
import json
import math
import os
import re
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import torch
from torch import Tensor

from runtime.commandline import InputError, brief
from training.pretrained import PRETRAINED
from training.weights import Weights, checkpoint_args, named_tensors, refuse_packed


def no_pairs(*_) -> dict:
    """Stand for a dictionary with a class of its own; its pairs follow in the file."""
    return {}


def no_items(*_) -> list:
    """Stand for a queue; its items follow in the file."""
    return []


# What full checkpoints hold beside tensors, and what is made of it: flags, NumPy's numbers, paths.
NUMPY_SCALAR = np.float64(0).__reduce__()[0]
NUMPY_ARRAY = np.zeros(1).__reduce__()[0]
HARMLESS = [
    argparse.Namespace,
    int,
    float,
    list,
    dict,
    (no_pairs, "collections.defaultdict"),
    (no_items, "collections.deque"),
    codecs.encode,
    np.dtype,
    np.ndarray,
    *(type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"),
    *((NUMPY_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((NUMPY_ARRAY, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")),
]
# The settings of training frameworks become plain dictionaries: none of their code is run.
SETTINGS_OF = re.compile(
    r"(omegaconf|yacs|addict|easydict|mmengine|mmcv|lightning|lightning_fabric|pytorch_lightning)\."
    r"|typing\.Any$"
)

# How other files begin, and what they are.
BEGINNINGS = [
    (rb"version https://git-lfs", "is a Git LFS pointer, not the file it points to: run git lfs "
     "pull, or download the file itself"),
    (rb"\s*(<!doctype|<html|<\?xml|<head)", "is a web page: download the file behind its link"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd", "is packed: unpack it"),
    (rb"\x89HDF", "is an HDF5 file, of Keras or TensorFlow: use weights of PyTorch"),
    (rb"\x93NUMPY", "is a NumPy array: use weights of PyTorch"),
    (rb"\x80[\x03-\x05]", "is a pickle of Python's, which may hold code and is never run: save the "
     "state_dict() with torch.save"),
    (rb"[\s\x20-\x7e]{24}", "is a text file: download the weights themselves"),
]

# A name that each network has, behind its prefix; the longer ones first.
SIGNS = (
    "embeddings.cls_token",
    "class_token",
    "cls_token",
    "patch_embed.proj.weight",
    "layer1.0.conv1.weight",
    "4.0.conv1.weight",  # a ResNet as a sequence of its layers
)
TEACHER = {"teacher", "momentum", "target", "ema", "swa", "averaged", "k", "key"}
STUDENT = {"student", "online", "q", "query"}

# Names behind the prefix -> ours. Those of timm are ours.
RENAMED = [
    (r"^embeddings\.cls_token$|^class_token$", "cls_token"),
    (r"^(embeddings\.position_embeddings|encoder\.pos_embedding)$", "pos_embed"),
    (r"^(embeddings\.patch_embeddings\.projection|patch_embed\.projection|conv_proj)\.",
     "patch_embed.proj."),
    (r"^(encoder\.layer\.|encoder\.layers\.encoder_layer_|layers\.)(?=\d)", "blocks."),
    (r"^(blocks\.\d+\.)(layernorm_before|ln1|ln_1)\.", r"\1norm1."),
    (r"^(blocks\.\d+\.)(layernorm_after|ln2|ln_2)\.", r"\1norm2."),
    (r"^(blocks\.\d+\.)attention\.(attention\.)?(query|key|value)\.", r"\1attn.\3."),
    (r"^(blocks\.\d+\.)attention\.q_proj\.", r"\1attn.query."),
    (r"^(blocks\.\d+\.)attention\.k_proj\.", r"\1attn.key."),
    (r"^(blocks\.\d+\.)attention\.v_proj\.", r"\1attn.value."),
    (r"^(blocks\.\d+\.)attention\.(output\.dense|o_proj)\.", r"\1attn.proj."),
    (r"^(blocks\.\d+\.)self_attention\.in_proj_", r"\1attn.qkv."),
    (r"^(blocks\.\d+\.)self_attention\.out_proj\.", r"\1attn.proj."),
    (r"^(blocks\.\d+\.)(intermediate\.dense|ffn\.layers\.0\.0|mlp\.linear_1|mlp\.0)\.",
     r"\1mlp.fc1."),
    (r"^(blocks\.\d+\.)(output\.dense|ffn\.layers\.1|mlp\.linear_2|mlp\.3)\.", r"\1mlp.fc2."),
    (r"^(layernorm|ln1|encoder\.ln)\.", "norm."),
]
# The marks of torch.compile, FSDP, and DDP.
WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.|^(module\.)+")
SEQUENCE = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}

# What stands beside a backbone for its training alone, and is left out.
TRAINING_ONLY = re.compile(
    r"(heads?|fc|classifier|pooler|(embeddings\.)?mask_token|masked_embed|decoder\w*|predictor"
    r"|projector|projection_head|prototypes|queue\w*|n_averaged|(dino|ibot)_head)(\.|$)"
)

# What a ViT has that ours has not: without it other features would come out.
MISFITS = [
    (r"(register_tokens|reg_token|storage_tokens)$", "has register tokens, as some DINOv2"),
    (r"\.(ls\d\.gamma|gamma_\d|layer_scale\d\.lambda1|lambda_?\d)$",
     "scales its branches (LayerScale), as DINOv2"),
    (r"(dist_token|distillation_token)$", "has a distillation token, as a distilled DeiT"),
    (r"(relative_position\w*|rel_pos\w*)", "has relative positions, as BEiT"),
    (r"(q_norm|k_norm)\.", "normalises its queries and keys"),
    (r"^(norm_pre|ln_pre|pre_layrnorm|pre_layernorm)\.", "has a normalisation first, as CLIP"),
    (r"^fc_norm\.", "averages its patches in place of a [CLS] token"),
    (r"mlp\.w12\.", "has SwiGLU layers, as DINOv2's giant"),
]


def read_foreign(path: str | Path) -> object:
    """Return what torch.save or safetensors wrote, without running code from the file.

    Raises InputError with what the file is instead.
    """
    if os.path.isdir(path):
        raise InputError(f"{str(path)!r} is a folder: give the file in it{inside(Path(path))}")
    if "://" in str(path):
        raise InputError(f"{str(path)!r} is an address: download the file, and give its path")
    if not os.path.isfile(path):
        raise InputError(
            f"no checkpoint at {str(path)!r}: check the path (the authors' weights by name: "
            f"{', '.join(PRETRAINED)})"
        )
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise InputError(f"cannot read {str(path)!r} ({brief(error)}): use another copy") from None
    if start[8:10] == b'{"':
        return read_safetensors(path)
    for beginning, reason in BEGINNINGS:
        if re.match(beginning, start, re.IGNORECASE):
            raise InputError(f"{str(path)!r} {reason}")
    try:
        refuse_other_archives(path)
        refuse_packed(path)
        allowed = [*HARMLESS, *settings_in(path)]
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # a torn or hostile file can raise anything
        asked = re.search(r"tried to allocate (\d+) bytes", str(error))
        if asked and int(asked[1]) <= os.path.getsize(path):
            raise  # the memory is full, and the file may be whole: errors_in_one_line says so
        refused = re.search(r"GLOBAL \S+|Unsupported class[^\n]*", str(error))
        if refused:
            raise InputError(
                f"{str(path)!r} holds code or objects beside tensors ({brief(refused[0])}), which "
                "are never run: save its state_dict() alone, or use another copy of it"
            ) from None
        if tarfile.is_tarfile(path):
            raise InputError(f"{str(path)!r} is packed: unpack it") from None
        size = os.path.getsize(path)
        raise InputError(
            f"{str(path)!r} is truncated or no checkpoint of PyTorch ({size} bytes): use another "
            "copy of it"
        ) from None
    if isinstance(checkpoint, dict) and isinstance(checkpoint.get("args"), argparse.Namespace):
        checkpoint["args"] = vars(checkpoint["args"])
    return checkpoint


def inside(folder: Path) -> str:
    """Return the names of the weights in a folder, as the end of a sentence."""
    endings = {".pth", ".pt", ".bin", ".safetensors", ".ckpt"}
    names = sorted(file.name for file in folder.iterdir() if file.suffix in endings)
    if not names:
        return ", which has no weights"
    return f": {brief(', '.join(names))}"


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file."""
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise InputError(
            f"{str(path)!r} is read with the package safetensors: pip install safetensors"
        ) from None
    try:
        return load_file(path)
    except Exception as error:  # its own kind of error, or the file system's
        raise InputError(
            f"{str(path)!r} is a damaged safetensors file ({brief(error)}): use another copy of it"
        ) from None


def refuse_other_archives(path: str | Path) -> None:
    """Raise InputError for a zip that torch.save did not write."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("constants.pkl") for name in names):
        raise InputError(
            f"{str(path)!r} is a TorchScript program, which is never run: save the weights alone "
            "where you trust it: torch.save(torch.jit.load(file).state_dict(), another)"
        )
    if names and all(name.endswith(".npy") for name in names):
        raise InputError(f"{str(path)!r} holds NumPy arrays: use weights of PyTorch")
    if not any(name.endswith("data.pkl") for name in names):
        raise InputError(f"{str(path)!r} is an archive of {brief(', '.join(names))}: unpack it")


def settings_in(path: str | Path) -> list[tuple]:
    """Return the classes of settings that a file names, each to be read as a plain dictionary."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # not in PyTorch's zip format
        return []
    return [(OrderedDict, name) for name in names if SETTINGS_OF.match(name)]


def split_foreign(checkpoint: dict, key: str, path: str | Path, fix: str) -> Weights:
    """Return the weights of the teacher or student in a file of any of these programs.

    Raises InputError where the file lacks it, holds several, or a network that ours is not.
    """
    tensors = flatten(averages_first(checkpoint))
    networks = find_networks(tensors)
    flags = checkpoint_args(checkpoint, path)
    if not networks:
        if "param_groups" in checkpoint:
            raise InputError(f"{str(path)!r} is an optimizer's state: use the network's weights")
        named_tensors(checkpoint if not tensors else tensors, path)
        seen = f"its tensors are {brief(', '.join(tensors))}"
        return Weights(tensors, {}, None, flags, seen, [])
    prefix = choose(networks, key, path, fix)

    backbone, unread = {}, []
    for name, tensor in tensors.items():
        rest = name.removeprefix(prefix)
        if not name.startswith(prefix) or TRAINING_ONLY.match(rest):
            unread.append(group(name, networks))
        else:
            backbone[our_name(rest, networks[prefix])] = tensor
    named_tensors(backbone, path)
    join_queries_keys_values(backbone, path)
    refuse_misfits(backbone, path)

    arch = resnet_name(backbone)
    if arch:
        convolution = backbone.get("layer1.0.conv2.weight")
        if convolution is not None and convolution.shape[:2] != (64, 64):
            raise InputError(
                f"{str(path)!r} is a wider ResNet or a ResNeXt (layer1.0.conv2.weight "
                f"{tuple(convolution.shape)}): use a plain ResNet's weights"
            )
        flags["arch"] = arch
    if Path(path).stem in {file for file, _, _ in PRETRAINED.values()}:
        flags.setdefault("num_heads", 0)  # the authors': each arch has its own
    heads = heads_beside(Path(path))
    if heads:
        flags["num_heads"] = heads
    source = prefix or "the whole file"
    return Weights(backbone, {}, None, flags, source, list(dict.fromkeys(unread)))


def averages_first(checkpoint: dict) -> dict:
    """Return a checkpoint whose moving average has a prefix that says so.

    mmengine swaps both when it saves: state_dict is the average, ema_state_dict what is trained.
    """
    meta = checkpoint.get("meta")
    of_mmengine = isinstance(meta, dict) and "mmengine_version" in meta
    if not of_mmengine or "ema_state_dict" not in checkpoint:
        return checkpoint
    return {"ema": checkpoint["state_dict"], "state_dict": checkpoint["ema_state_dict"]}


def flatten(state: object, prefix: str = "", depth: int = 4) -> dict[str, Tensor]:
    """Return all tensors by the path that leads to them, without the marks of wrappers."""
    tensors = {}
    for name, value in state.items():
        if not isinstance(name, str):  # an optimizer numbers its tensors
            continue
        if isinstance(value, Tensor):
            name = WRAPPERS.sub("", name)
            tensors[prefix + name] = value
        elif isinstance(value, dict) and depth:
            tensors |= flatten(value, f"{prefix}{name}.", depth - 1)
    return tensors


def find_networks(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return the prefixes of all networks, and for each the sign that gave it away."""
    networks = {}
    for name in tensors:
        for sign in SIGNS:
            if f".{name}".endswith(f".{sign}"):
                networks.setdefault(name.removesuffix(sign), sign)
                break
    return networks


def choose(networks: dict[str, str], key: str, path: str | Path, fix: str) -> str:
    """Return the prefix of the teacher or the student.

    A file with one network, which nothing calls teacher or student, gives it for both.
    """
    teachers, students, others = [], [], []
    for prefix in networks:
        words = set(re.split(r"[._]", prefix))
        if words & TEACHER:
            teachers.append(prefix)
        elif words & STUDENT:
            students.append(prefix)
        else:
            others.append(prefix)

    mine = teachers
    if key == "student":
        # beside an average, the network without a mark is the trained one
        mine = students
        if teachers and not students:
            mine = others
    if not teachers and not students:
        mine = others
    if len(mine) == 1:
        return mine[0]
    found = brief(", ".join(networks))
    if not mine:
        raise InputError(f"{str(path)!r} has no {key!r}, but {found}: {fix}")
    raise InputError(f"{str(path)!r} has several networks ({found}): save one of them alone")


def group(name: str, networks: dict[str, str]) -> str:
    """Return what a tensor that is left out belongs to, for the line that names it."""
    for prefix in networks:
        if prefix and name.startswith(prefix) and not TRAINING_ONLY.match(name[len(prefix):]):
            return prefix
    return re.split(r"\.(?=\d|weight|bias|running|num_batches)", name)[0]


def our_name(name: str, sign: str) -> str:
    """Return a tensor's name in our networks; name: without its prefix."""
    if sign == SIGNS[-1]:
        first, _, rest = name.partition(".")
        return f"{SEQUENCE.get(first, first)}.{rest}"
    for pattern, ours in RENAMED:
        name = re.sub(pattern, ours, name)
    return name


def join_queries_keys_values(state: dict[str, Tensor], path: str | Path) -> None:
    """Put three layers of (D, D) together as ours, (3 D, D), wherever they stand apart."""
    for name in [name for name in state if ".attn.query." in name]:
        names = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
        try:
            joined = torch.cat([state.pop(part) for part in names])
        except (KeyError, RuntimeError):
            raise InputError(f"{str(path)!r} lacks a part of {name}: use another copy") from None
        state[name.replace(".query.", ".qkv.")] = joined


def refuse_misfits(state: dict[str, Tensor], path: str | Path) -> None:
    """Raise InputError for a ViT that computes something else than ours, with the reason."""
    use = "use a plain ViT's weights"
    for name in state:
        for pattern, reason in MISFITS:
            if re.search(pattern, name):
                raise InputError(f"{str(path)!r} {reason} ({brief(name)}): {use}")
    patches = state.get("patch_embed.proj.weight")
    if patches is None:
        return
    if patches.ndim == 5:
        raise InputError(f"{str(path)!r} reads films, not images: {use}")
    if "cls_token" not in state:
        raise InputError(f"{str(path)!r} has no [CLS] token: {use}")
    positions = state.get("pos_embed")
    if positions is None:
        raise InputError(f"{str(path)!r} has no learnt positions (pos_embed): {use}")
    tokens = positions.shape[1] if positions.ndim == 3 else 0
    if tokens and math.isqrt(tokens - 1) ** 2 != tokens - 1:
        raise InputError(
            f"{str(path)!r} has {tokens} positions, which are not [CLS] and a square: {use}"
        )


def resnet_name(state: dict[str, Tensor]) -> str:
    """Return which of torchvision's ResNets it is, by the blocks of its third stage, or ""."""
    blocks = {name.split(".")[1] for name in state if name.startswith("layer3.")}
    deep = "layer3.0.conv3.weight" in state
    names = {
        (2, False): "resnet18",
        (6, False): "resnet34",
        (6, True): "resnet50",
        (23, True): "resnet101",
        (36, True): "resnet152",
    }
    return names.get((len(blocks), deep), "")


def heads_beside(path: Path) -> int:
    """Return the heads in the config.json that Hugging Face lays beside the weights, or 0."""
    try:
        config = json.loads((path.parent / "config.json").read_text())
        return int(config["num_attention_heads"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0
