"""The state of a run: all that must be saved for a stopped training to end bit for bit where it would have ended.

No generator is among it: every step and every picture seeds its own randomness (see data.py and train.py).
"""
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoint import load_strictly, read_checkpoint, save_checkpoint
from commandline import InputError
from loss import DINOLoss
from multicrop import MultiCropNetwork
from settings import Settings

MUST_AGREE = ("arch", "patch_size", "out_dim", "head_hidden_dim", "head_bottleneck_dim", "use_bn_in_head",
              "norm_last_layer", "global_crops_size", "optimizer")  # else the saved tensors do not fit
MAY_DIFFER = ("preset", "output_dir", "num_workers", "device")  # not worth a word


@dataclass
class RunState:
    """Networks, loss with its center, optimiser; and how far the run is.

    epoch: epochs completed; pictures: those of the unfinished epoch that were trained on; totals: the sums of loss,
    entropy and KL over that epoch's steps; seconds spent on them; history: the lines of log.txt.
    """

    student: MultiCropNetwork
    teacher: MultiCropNetwork
    dino_loss: DINOLoss
    optimizer: torch.optim.Optimizer
    epoch: int = 0
    pictures: int = 0
    totals: Tensor = field(default_factory=lambda: torch.zeros(3))
    seconds: float = 0.0
    history: list[dict] = field(default_factory=list)


def save_run(path: Path, run: RunState, settings: Settings) -> None:
    """Write the whole state, with the settings as a plain dict under "args"."""
    values = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    save_checkpoint(path, {name: value.state_dict() if hasattr(value, "state_dict") else value
                           for name, value in values.items()} | {"args": dataclasses.asdict(settings)})


def load_run(path: Path, run: RunState, settings: Settings) -> str:
    """Fill the run from a checkpoint -> a line that says where it goes on, and which settings are new."""
    checkpoint = read_checkpoint(path)
    if not {field.name for field in dataclasses.fields(run)} | {"args"} <= set(checkpoint):
        raise InputError(f"{str(path)!r} is no run that can be continued: choose another --output_dir, or start from "
                         "its weights with --init_from")
    old, new = checkpoint["args"], dataclasses.asdict(settings)
    changed = {name: value for name, value in new.items() if old.get(name) != value and name not in MAY_DIFFER}
    for name in MUST_AGREE:
        if name in changed:
            raise InputError(f"{str(path)!r} was made with --{name} {old.get(name)}, not {new[name]}: choose another "
                             "--output_dir, or the old value")
    for field_ in dataclasses.fields(run):
        part, value = getattr(run, field_.name), checkpoint[field_.name]
        if isinstance(part, nn.Module):
            load_strictly(part, value, path)
        elif isinstance(part, torch.optim.Optimizer):
            part.load_state_dict(value)
        else:
            setattr(run, field_.name, value)
    if changed and run.epoch >= new["epochs"]:
        raise InputError(f"{str(path)!r} is finished, and was made with another --{min(changed)}: choose another "
                         "--output_dir, or more --epochs")
    told = ", ".join(f"{name} {value}" for name, value in changed.items())
    return (f"continuing {path} after {run.epoch} epochs and {run.pictures} pictures"
            + (f"; settings changed since: {told}" if told else ""))
