"""Checkpoints: written so that a crash leaves the last one whole, read without running code from them.

Reads three kinds of file, told apart by their keys: ours and the release's full checkpoints (student, teacher, args
...), the release's backbones, and timm's state dicts. Weights are always loaded with strict=True, after the key
prefixes that wrappers leave were taken off; what does not fit is listed. The architecture is read from the file.
"""
import argparse
import codecs
import hashlib
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
from training.strict import check_flags, load_strictly, whole_numbers

URL = "https://dl.fbaipublicfiles.com/dino/{0}/{0}.pth"
PRETRAINED = {  # --pretrained name -> the authors' file, and the start of its MD5 or SHA-256 (no hash is published
    # beside the files: the ViTs' are those that OpenMetricLearning checks, ResNet-50's that of a user's pinned copy)
    "dino_vits16": ("dino_deitsmall16_pretrain", "md5", "cf0f22"),
    "dino_vits8": ("dino_deitsmall8_pretrain", "md5", "230cd5"),
    "dino_vitb16": ("dino_vitbase16_pretrain", "md5", "552daf"),
    "dino_vitb8": ("dino_vitbase8_pretrain", "md5", "556550"),
    "dino_resnet50": ("dino_resnet50_pretrain", "sha256", "156f8c4166a23dc2951ae811e39d76a0"),
}
VIT_SHAPES = ("cls_token", "pos_embed", "patch_embed.proj.weight")
SIZES = {(128, 4): "vit_nano", (192, 12): "vit_tiny", (384, 12): "vit_small", (768, 12): "vit_base"}  # width, blocks
# what the release's full checkpoints hold beside tensors: their flags, and learning rates as NumPy numbers
RELEASE_TYPES = [argparse.Namespace, np.dtype, type(np.dtype(np.float64)), codecs.encode,
                 (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"), np.float64(0).__reduce__()[0]]


def save_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """Write a checkpoint of tensors and plain values, which is on the disk before it gets its name: power may fail."""
    def write(part: Path) -> None:
        with open(part, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())

    write_whole(path, write)


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU without running code from it; raises InputError that says what is wrong."""
    if not os.path.isfile(path):
        raise InputError(f"no checkpoint at {str(path)!r}: check the path")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as records:  # which PyTorch stores as they are
                if sum(record.file_size for record in records.infolist()) > os.path.getsize(path):
                    raise ValueError
        with torch.serialization.safe_globals(RELEASE_TYPES), warnings.catch_warnings(action="ignore"):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a torn or hostile file raises can be anything
        refused = re.search(r"GLOBAL \S+|Unsupported (operand|class)[^\n]*", str(error))
        reason = (f"holds code or objects beside tensors ({refused[0]}), which are never run" if refused else
                  "is truncated or no checkpoint of PyTorch")
        raise InputError(f"{str(path)!r} {reason}: use another copy of it") from None
    if not isinstance(checkpoint, dict):
        raise InputError(f"{str(path)!r} holds a {type(checkpoint).__name__}, no checkpoint: use another file")
    return checkpoint


def checkpoint_args(checkpoint: dict) -> dict:
    """The flags of the run that made it: a plain dict, empty where the file has none."""
    args = checkpoint.get("args", {})
    args = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    scalars = lambda values: all(isinstance(value, (str, int, float)) for value in values)
    return {name: value for name, value in args.items() if scalars(value if isinstance(value, tuple) else (value,))}


def split_weights(checkpoint: dict, key: str, path: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(backbone's weights, DINO head's weights or none), of `key` (teacher or student) or of a plain state dict.

    Wrappers' prefixes are taken off; the classifier that timm or torchvision put on a plain backbone is left out.
    """
    state = checkpoint.get("state_dict", checkpoint.get("model", checkpoint))
    if "teacher" in checkpoint or "student" in checkpoint:
        if key not in checkpoint:
            raise InputError(f"{str(path)!r} has no {key!r}, but {brief(', '.join(map(str, checkpoint)))}: change "
                             "--checkpoint_key")
        state = checkpoint[key]
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise InputError(f"{str(path)!r} holds no weights by name: use another file")
    if not any(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{str(path)!r} holds no tensors: use another file")
    for name, value in state.items():
        if isinstance(value, Tensor) and value.numel() > whole_numbers(value):
            raise InputError(f"{name[:50]} of {str(path)!r} claims {tuple(value.shape)} and holds less: use another "
                             "copy of it")
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in state.items()}
    parts = {part: {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
             for part in ("backbone.", "head.")}
    if parts["backbone."]:
        return parts["backbone."], parts["head."]
    return {name: value for name, value in state.items() if not name.startswith(("head.", "fc."))}, {}


def describe(state: dict[str, Tensor], path: str | Path) -> dict:
    """A ViT's arch, patch_size, img_size and in_chans, read from its weights' shapes; of a convnet, nothing."""
    if "cls_token" not in state:
        return {}
    shapes = [tuple(getattr(state.get(name), "shape", ())) for name in VIT_SHAPES]
    match shapes:
        case [(1, 1, width), (1, _, wide), (deep, in_chans, patch_size, side)] if (wide, deep, side) == (
                width, width, patch_size) and 0 not in (width, in_chans, side):
            pass
        case _:
            raise InputError(f"{str(path)!r} lacks one of {', '.join(VIT_SHAPES)} in its usual shape: no ViT that this "
                             "reads")
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    if (width, depth) not in SIZES:
        raise InputError(f"{str(path)!r} is a ViT of width {width} with {depth} blocks: this reads "
                         f"{', '.join(SIZES.values())}")
    grid = round((state["pos_embed"].shape[1] - 1) ** 0.5)
    return {"arch": SIZES[width, depth], "patch_size": patch_size, "img_size": grid * patch_size, "in_chans": in_chans}


def load_backbone(path: str | Path, key: str = "teacher", arch: str = "",
                  patch_size: int = 0) -> tuple[nn.Module, dict]:
    """A checkpoint file -> (backbone in evaluation mode, the flags it was made with, its arch among them).

    arch and patch_size, where given, must be the file's: another is an InputError, not a silent mismatch.
    """
    checkpoint = read_checkpoint(path)
    state, args = split_weights(checkpoint, key, path)[0], checkpoint_args(checkpoint)
    check_flags(args, path)
    found = {"arch": arch or args.get("arch")} | describe(state, path)
    for flag, asked in (("arch", arch), ("patch_size", patch_size)):
        if asked and found.get(flag) not in (None, asked):
            raise InputError(f"--{flag} {asked}, but {str(path)!r} holds {found[flag]}: leave the flag out, or take "
                             "another file")
    if not found["arch"] and "layer4.2.conv3.weight" in state:
        found["arch"] = "resnet50"  # what the authors released
    if found.get("in_chans", 3) != 3:
        raise InputError(f"{str(path)!r} reads images of {found['in_chans']} channels, and this program's have 3: "
                         "use another file")
    if not found["arch"]:
        raise InputError(f"the arch of {str(path)!r} cannot be read from it: say which with --arch")
    backbone = build_backbone(**found, num_heads=args.get("num_heads", 0))  # which no shape tells
    load_strictly(backbone, state, path)
    return backbone.eval().requires_grad_(False), {**args, "patch_size": 1, **found}


def download_pretrained(name: str) -> Path:
    """The authors' weights by name, from PyTorch's cache or over the network; the file's hash is checked each time."""
    if name not in PRETRAINED:
        raise InputError(f"--pretrained {name} is unknown: choose one of {', '.join(PRETRAINED)}")
    file, algorithm, start = PRETRAINED[name]
    path = Path(torch.hub.get_dir(), "checkpoints", f"{file}.pth")
    url = URL.format(file)
    if not path.is_file():
        write_whole(path, lambda part: download(url, part))
    digest = hashlib.new(algorithm, path.read_bytes()).hexdigest()
    if not digest.startswith(start):
        raise InputError(f"{str(path)!r} has the {algorithm} {digest}, not {start} ...: it is damaged or another "
                         "file; remove it and start again, or pass a copy you trust as --pretrained_weights")
    return path


def download(url: str, part: Path) -> None:
    """Fetch a file with a progress bar; raises InputError where there is no network."""
    try:
        torch.hub.download_url_to_file(url, str(part))
    except OSError as error:
        raise InputError(f"cannot download {url} ({error}): get it where there is a network and pass it as "
                         "--pretrained_weights") from None


def add_weights_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say whose weights a script reads."""
    add = parser.add_argument
    add("--pretrained_weights", default="", metavar="FILE", help="a checkpoint of ours, of the release, or of timm")
    add("--checkpoint_key", default="teacher", choices=("teacher", "student"), help="whose weights to take")
    add("--pretrained", default="", metavar="NAME", help=f"the authors' weights: {', '.join(PRETRAINED)}")


def weights_path(flags: argparse.Namespace) -> str | Path:
    """The file that --pretrained_weights names or --pretrained fetches: exactly one of them must be given."""
    if bool(flags.pretrained_weights) == bool(flags.pretrained):
        raise InputError("give the weights: --pretrained_weights FILE, or --pretrained NAME")
    return flags.pretrained_weights or download_pretrained(flags.pretrained)
