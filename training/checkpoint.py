"""Checkpoints: written whole or not at all, read without running code from them.

Full checkpoints, ours and the release's, are read here. All other files, the bare backbones of the
release and of timm among them, are read by training/foreign.py. Loading is strict.
"""

import os
import re
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from runtime.commandline import InputError, brief, write_whole
from training.backbone import build_backbone
from training.foreign import read_foreign, split_foreign
from training.weights import Weights, checkpoint_args, named_tensors, refuse_packed

# a ViT's width and number of blocks -> its arch
ARCHS = {
    (128, 4): "vit_nano",
    (192, 12): "vit_tiny",
    (384, 12): "vit_small",
    (768, 12): "vit_base",
}

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
    checkpoint = None
    if os.path.isfile(path):
        try:
            refuse_packed(path)
            with warnings.catch_warnings(action="ignore"):
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # a torn or hostile file can raise anything
            pass
    if checkpoint is None:
        # a run's own files hold nothing but tensors and plain values
        checkpoint = read_foreign(path)
    if not isinstance(checkpoint, dict):
        kind = type(checkpoint).__name__
        raise InputError(f"{str(path)!r} holds a {kind}, no checkpoint: use another file")
    return checkpoint


def load_strictly(
    module: nn.Module, state: object, path: str | Path, fix: str = "use another file"
) -> None:
    """Load all weights, or raise InputError with the keys, shapes and types that do not fit.

    fix: what the person can do, in the words of the command.
    """
    have = named_tensors(state, path)
    want = module.state_dict()
    problems = {
        "missing": [name for name in want if name not in have],
        "unexpected": [brief(name) for name in state if name not in want],
        "other shapes": [],
        "other types": [],
        "not finite": [],
    }
    for name in want:  # in the network's order
        if name not in have:
            continue
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
            f"the weights of {str(path)!r} do not fit the network: {', '.join(found)}: {fix}"
        )
    module.load_state_dict(state, strict=True)


def split_weights(
    checkpoint: dict, key: str, path: str | Path, fix: str = "use another file"
) -> Weights:
    """Return the weights of one of a file's networks; key: teacher or student.

    fix: what the person can do where the file lacks it, in the words of the command.
    """
    state = checkpoint.get(key)
    if not isinstance(state, dict):
        state = {}
    parts = {"backbone": {}, "head": {}}
    for name, value in state.items():
        name = str(name).replace("_orig_mod.", "")  # torch.compile's
        name = re.sub(r"^(module\.)+", "", name)  # DDP's
        part, _, rest = name.partition(".")
        if part not in parts or rest.startswith(("mask", "_")):
            parts = {}  # the file of another program
            break
        parts[part][rest] = value
    if not parts or not parts["backbone"]:
        return split_foreign(checkpoint, key, path, fix)

    named_tensors(state, path)
    loss = checkpoint.get("dino_loss")
    center = loss.get("center") if isinstance(loss, dict) else None
    unread = [other for other in ("student", "teacher") if other in checkpoint and other != key]
    return Weights(**parts, center=center, flags=checkpoint_args(checkpoint, path), source=key,
                   unread=unread)


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
    path: str | Path,
    key: str = "teacher",
    arch: str = "",
    patch_size: int = 0,
    num_heads: int = 0,
    say=print,
) -> tuple[nn.Module, dict]:
    """Return a checkpoint's backbone in evaluation mode, and the flags it was made with.

    The arch is among the flags. arch, patch_size and num_heads, where given, must be the file's.
    say gets one line: what was read, and what of the file was not.
    """
    fix = "choose the other checkpoint key, or use another file"
    weights = split_weights(read_checkpoint(path), key, path, fix)
    args = weights.flags
    found = {"arch": arch or args.get("arch")} | describe(weights.backbone, path)
    if not found["arch"]:
        raise InputError(f"{str(path)!r} holds no ViT or ResNet that this reads: {weights.source}")
    if found.get("in_chans", 3) != 3:
        channels = found["in_chans"]
        raise InputError(f"{str(path)!r} reads {channels} channels, not 3: use another file")

    # no shape gives the number of heads
    heads_known = "num_heads" in args or "arch" in args
    heads = args.get("num_heads", 0) if heads_known else num_heads
    backbone = build_backbone(**found, num_heads=heads)
    load_strictly(backbone, weights.backbone, path)
    backbone.eval().requires_grad_(False)

    line = f"backbone from {path} ({weights.source})"
    unread = list(weights.unread)
    if weights.head:
        unread.append("head")
    if unread:
        line += f"; not read: {', '.join(unread)}"
    holds = dict(found)
    if hasattr(backbone, "blocks"):
        heads = backbone.blocks[0].attn.num_heads
        holds["num_heads"] = heads
        if not heads_known and not num_heads:
            line += f"; the file does not say its heads: taken as {heads}; --num_heads sets them"
    say(line)

    asked = {"arch": arch, "patch_size": patch_size, "num_heads": num_heads}
    for flag, wanted in asked.items():
        if wanted and holds.get(flag) not in (None, wanted):
            raise InputError(
                f"--{flag} {wanted}, but {str(path)!r} holds {holds[flag]}: leave the flag out"
            )
    if num_heads:
        args = args | {"num_heads": num_heads}
    return backbone, {**args, "patch_size": 1, **found}
