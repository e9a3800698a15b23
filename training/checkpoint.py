"""Checkpoints: written whole or not at all, read without running code from them.

Three kinds of file are read, told apart by their keys:
full checkpoints (ours and the release's), the release's backbones, and timm's state dicts.
The prefixes that wrappers leave in the keys are taken off; then loading is strict.
"""

import argparse
import codecs
import os
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from runtime.commandline import InputError, brief, write_whole
from training.backbone import build_backbone

# a ViT's width and number of blocks -> its arch
ARCHS = {
    (128, 4): "vit_nano",
    (192, 12): "vit_tiny",
    (384, 12): "vit_small",
    (768, 12): "vit_base",
}

# The flags that are read back from a file, and their types.
READ_FLAGS = {
    "arch": str,
    "patch_size": int,
    "num_heads": int,
    "init_std": float,
    "eval_size": int,
    "eval_crop": (int, float),
    "mean": tuple,
    "std": tuple,
}

# What the release's full checkpoints hold beside tensors: flags, and NumPy's learning rates.
NUMPY_SCALAR = np.float64(0).__reduce__()[0]
RELEASE_TYPES = [
    argparse.Namespace,
    np.dtype,
    type(np.dtype(np.float64)),
    codecs.encode,
    NUMPY_SCALAR,
    (NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
]


def save_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """Write tensors and plain values; a crash or a loss of power leaves the old file whole."""

    def write(part: Path) -> None:
        with open(part, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())  # on the disk, before it gets its name

    write_whole(path, write)


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU; code in it is never run. Raises InputError."""
    if not os.path.isfile(path):
        raise InputError(f"no checkpoint at {str(path)!r}: check the path")
    try:
        refuse_packed(path)
        with torch.serialization.safe_globals(RELEASE_TYPES):
            with warnings.catch_warnings(action="ignore"):
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn or hostile file can raise anything
        reason = "is truncated or no checkpoint of PyTorch"
        refused = re.search(r"GLOBAL \S+|Unsupported (operand|class)[^\n]*", str(error))
        if refused:
            reason = f"holds code or objects beside tensors ({refused[0]}), which are never run"
        raise InputError(f"{str(path)!r} {reason}: use another copy of it") from None
    if not isinstance(checkpoint, dict):
        kind = type(checkpoint).__name__
        raise InputError(f"{str(path)!r} holds a {kind}, no checkpoint: use another file")
    return checkpoint


def refuse_packed(path: str | Path) -> None:
    """Raise ValueError for a zip that unpacks to more than its size: PyTorch does not pack."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            unpacked = sum(record.file_size for record in file.infolist())
        if unpacked > os.path.getsize(path):
            raise ValueError("packed")


def checkpoint_args(checkpoint: dict, path: str | Path) -> dict:
    """Return the flags of the run that made it, empty where the file has none.

    Raises InputError if one that is read back has another type than a flag of that name.
    """
    args = checkpoint.get("args", {})
    if isinstance(args, argparse.Namespace):  # the release's
        args = vars(args)
    if not isinstance(args, dict):
        return {}
    for name, kind in READ_FLAGS.items():
        value = args.get(name)
        fits = value is None or isinstance(value, kind)
        if fits and isinstance(value, tuple):
            fits = len(value) == 3 and all(isinstance(number, float) for number in value)
        if not fits:
            kind = type(value).__name__
            raise InputError(f"{str(path)!r} has a {kind} as its --{name}: use another copy of it")
    return {name: value for name, value in args.items() if is_plain(value)}


def is_plain(value: object) -> bool:
    """Return whether a value can be one of a flag: text, a number, or a tuple of such."""
    values = value if isinstance(value, tuple) else (value,)
    return all(isinstance(one, (str, int, float)) for one in values)


def named_tensors(state: object, path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict; raises InputError for what is none.

    A file may claim shapes that its memory does not fill: such a tensor is refused, before a
    network of that size is built.
    """
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{str(path)!r} holds no weights by name: use another file")
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{str(path)!r} holds no tensors: use another file")
    for name, tensor in tensors.items():
        in_memory = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not in_memory or tensor.nbytes > tensor.untyped_storage().nbytes():
            claim = f"{brief(name)} of {str(path)!r} claims {tuple(tensor.shape)} and holds less"
            raise InputError(f"{claim}: use another copy of it")
    return tensors


def load_strictly(module: nn.Module, state: object, path: str | Path) -> None:
    """Load all weights, or raise InputError with the keys, shapes and types that do not fit."""
    have = named_tensors(state, path)
    want = module.state_dict()
    problems = {
        "missing": [name for name in want if name not in have],
        "unexpected": [brief(name) for name in state if name not in want],
        "other shapes": [],
        "other types": [],
        "not finite": [],
    }
    for name in want.keys() & have.keys():
        ours, theirs = want[name], have[name]
        if theirs.shape != ours.shape:
            shapes = f"{tuple(theirs.shape)} for {tuple(ours.shape)}"
            problems["other shapes"].append(f"{name} {shapes}")
        elif theirs.is_floating_point() != ours.is_floating_point():
            problems["other types"].append(f"{name} {theirs.dtype}")
        elif not theirs.isfinite().all():
            problems["not finite"].append(name)

    found = []
    for problem, names in problems.items():
        if names:
            more = " ..." if len(names) > 5 else ""
            found.append(f"{problem} {len(names)} ({', '.join(names[:5])}{more})")
    if found:
        raise InputError(
            f"the weights of {str(path)!r} do not fit the network: {', '.join(found)}: check "
            "--arch, --patch_size, and --out_dim and the head's sizes"
        )
    module.load_state_dict(state, strict=True)


def split_weights(checkpoint: dict, key: str, path: str | Path) -> tuple[dict, dict]:
    """Return the weights of the backbone, and those of the DINO head or {}.

    key: teacher or student, of a full checkpoint. Of a plain backbone the classifier that timm
    or torchvision put on it is left out.
    """
    if "teacher" in checkpoint or "student" in checkpoint:
        if key not in checkpoint:
            keys = brief(", ".join(map(str, checkpoint)))
            raise InputError(f"{str(path)!r} has no {key!r}, but {keys}: change --checkpoint_key")
        state = checkpoint[key]
    else:
        state = checkpoint.get("state_dict", checkpoint.get("model", checkpoint))
    named_tensors(state, path)

    backbone, head, plain = {}, {}, {}
    for name, value in state.items():
        name = re.sub(r"^((module|_orig_mod)\.)+", "", name)  # DDP's and torch.compile's
        if name.startswith("backbone."):
            backbone[name.removeprefix("backbone.")] = value
        elif name.startswith("head."):
            head[name.removeprefix("head.")] = value
        elif not name.startswith("fc."):
            plain[name] = value
    if backbone:
        return backbone, head
    return plain, {}


def describe(state: dict[str, Tensor], path: str | Path) -> dict:
    """Return a ViT's arch, patch_size, img_size and in_chans, read off its weights' shapes.

    {} for a convnet.
    """
    if "cls_token" not in state:
        return {}
    try:
        _, _, width = state["cls_token"].shape
        _, tokens, _ = state["pos_embed"].shape
        wide, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    except (KeyError, ValueError, AttributeError):
        raise InputError(f"{str(path)!r} is no ViT that this reads: use another file") from None
    if not tokens or not in_chans or not patch_size or wide != width:
        raise InputError(f"{str(path)!r} is no ViT that this reads: use another file")

    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    if (width, depth) not in ARCHS:
        known = ", ".join(ARCHS.values())
        found = f"a ViT of width {width} with {depth} blocks"
        raise InputError(f"{str(path)!r} is {found}: use the weights of one of {known}")
    grid = round((tokens - 1) ** 0.5)  # patches a side; one token is [CLS]
    return {
        "arch": ARCHS[width, depth],
        "patch_size": patch_size,
        "img_size": grid * patch_size,
        "in_chans": in_chans,
    }


def load_backbone(
    path: str | Path, key: str = "teacher", arch: str = "", patch_size: int = 0
) -> tuple[nn.Module, dict]:
    """Return a checkpoint's backbone in evaluation mode, and the flags it was made with.

    The arch is among the flags. arch and patch_size, where given, must be the file's.
    """
    checkpoint = read_checkpoint(path)
    state, _ = split_weights(checkpoint, key, path)
    args = checkpoint_args(checkpoint, path)
    found = {"arch": arch or args.get("arch")} | describe(state, path)

    for flag, wanted in (("arch", arch), ("patch_size", patch_size)):
        if wanted and found.get(flag) not in (None, wanted):
            holds = f"{str(path)!r} holds {found[flag]}"
            raise InputError(f"--{flag} {wanted}, but {holds}: leave the flag out")
    if not found["arch"] and "layer4.2.conv3.weight" in state:
        found["arch"] = "resnet50"  # the authors' file does not say so
    if not found["arch"]:
        raise InputError(
            f"the arch of {str(path)!r} is not in it: a script that has --arch takes it there"
        )
    if found.get("in_chans", 3) != 3:
        channels = f"images of {found['in_chans']} channels, not 3"
        raise InputError(f"{str(path)!r} reads {channels}: use another file")

    # no shape gives the number of heads
    backbone = build_backbone(**found, num_heads=args.get("num_heads", 0))
    load_strictly(backbone, state, path)
    backbone.eval().requires_grad_(False)
    return backbone, {**args, "patch_size": 1, **found}
