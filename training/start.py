"""What --init_from brings to a run: backbone, head and center of a teacher."""

import os
from pathlib import Path

from torch import nn

from loss import DINOLoss
from runtime.commandline import InputError
from settings import VITS, Settings
from training.checkpoint import describe, load_strictly, read_checkpoint, split_weights
from training.pretrained import find_weights
from training.weights import Weights

START = "checkpoint0000.pth"  # of a run with --init_from: before its first step


def read_start(settings: Settings) -> tuple[Weights, int]:
    """Return the teacher's weights in --init_from, and the pixels that it was trained on.

    --init_from is a file, or a name of the authors' weights. A run that began has a copy.
    Raises InputError if it is another network than the settings', and names the flags to pass.
    """
    # the file may be gone, or changed, when the run continues
    output = Path(settings.output_dir)
    path = output / START
    copied = os.path.isfile(output / "checkpoint.pth") and os.path.isfile(path)
    if not copied:
        path = find_weights(settings.init_from, "--init_from")
    weights = split_weights(read_checkpoint(path), "teacher", path)
    if copied:
        weights = weights._replace(head={})  # checkpoint.pth has the run's own
    elif weights.head and not settings.init_head:
        weights = weights._replace(head={}, unread=[*weights.unread, "head"])

    found = {}
    for flag in ("arch", "num_heads"):
        if flag in weights.flags:
            found[flag] = weights.flags[flag]
    found |= describe(weights.backbone, path)  # the release has other names for its archs
    needed = []
    for flag, value in found.items():
        if value != getattr(settings, flag, value):
            needed.append(f"--{flag} {value}")
    if needed:
        raise InputError(f"{str(path)!r} holds another network: pass {' '.join(needed)}")
    # the positions' grid is the file's, whatever our crops' size
    return weights, found.get("img_size", settings.global_crops_size)


def load_center(student: nn.Module, dino_loss: nn.Module, settings: Settings) -> str:
    """Give the loss the center that belongs to the head of --init_from.

    Return a line that says what came from the file, what is fresh, and what was not read.
    """
    weights, _ = read_start(settings)
    came = "backbone"
    fresh = "head, center, optimizer and schedules"
    if weights.head:
        came = "backbone and head"
        fresh = "center, optimizer and schedules"
    if weights.head and weights.center is not None and type(dino_loss) is DINOLoss:
        load_strictly(dino_loss, {"center": weights.center}, settings.init_from)
        came = "backbone, head and center"
        fresh = "optimizer and schedules"

    line = f"{came} from {settings.init_from} ({weights.source}); fresh: {fresh}"
    if weights.unread:
        line += f"; not read: {', '.join(weights.unread)}"
    if settings.arch in VITS and not {"arch", "num_heads"} & weights.flags.keys():
        heads = student.backbone.blocks[0].attn.num_heads
        line += f"; the file does not say its heads: taken as {heads}; --num_heads sets them"
    return line
