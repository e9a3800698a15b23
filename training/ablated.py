"""Checkpoints of ablations/train.py, where the settings say nothing of the ablation, or other."""

from pathlib import Path

from runtime.commandline import InputError, brief
from settings import Settings

# Settings of ablations/train.py, and the values that make them plain DINO.
# Older files have all of them.
PLAIN_DINO = {
    "loss": "cross_entropy",
    "centering": "center",
    "predictor": False,
    "teacher": "momentum",
    "head_l2_bottleneck": True,
    "head_activation": "gelu",
}


def refuse_other_method(args: dict, settings: Settings, path: Path) -> None:
    """Raise InputError if train.py is to continue an ablation's run; args: the file's flags."""
    for name, plain in PLAIN_DINO.items():
        was = args.get(name, plain)
        if was != plain and not hasattr(settings, name):
            raise InputError(
                f"{str(path)!r} was made with --{name} {brief(was)}: continue it with "
                f"python -m ablations.train --{name} {brief(was)} ..., or choose another "
                "--output_dir"
            )


def refuse_other_head(args: dict, settings: Settings, path: Path) -> None:
    """Raise InputError if a run is to start from another kind of head; args: the file's flags."""
    for name in ("head_l2_bottleneck", "head_activation", "predictor"):
        plain = PLAIN_DINO[name]
        was = args.get(name, plain)
        now = getattr(settings, name, plain)  # train.py's settings lack it
        if name == "predictor" and now:
            continue  # a predictor may start fresh on weights that have none
        if was != now:
            raise InputError(
                f"--init_from {str(path)!r} has a head made with --{name} {brief(was)}, not {now}: "
                f"start with python -m ablations.train --{name} {brief(was)} ..., or from other "
                "weights"
            )
