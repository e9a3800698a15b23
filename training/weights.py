"""What files of weights have in common: flags, named tensors, and the parts of a network."""

import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.commandline import InputError, brief

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
    "levels": tuple,
    "precision": str,
    "in_memory": str,
}


class Weights(NamedTuple):
    """What a file holds of one network."""

    backbone: dict[str, Tensor]
    head: dict[str, Tensor]  # of DINO; {}: none
    center: object  # of the loss, beside the head; None: none
    flags: dict  # of the run that made the file
    source: str  # where the backbone stands in the file: teacher, or a prefix of names
    unread: list[str]  # what else is in the file


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
    if not isinstance(args, dict):
        return {}
    for name, kind in READ_FLAGS.items():
        value = args.get(name)
        fits = value is None or isinstance(value, kind)
        if fits and isinstance(value, tuple):
            length = 2 if name == "levels" else 3  # black and white, or the three colours
            fits = len(value) == length and all(isinstance(number, float) for number in value)
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
