"""Refuse a checkpoint of ablations/train.py whose method or head the settings do not have."""

from pathlib import Path

from runtime.commandline import InputError, brief
from settings import Settings

# All settings of ablations/train.py that train.py lacks, and the values that make them plain DINO.
# Older files have not all of them.
PLAIN_DINO = {
    "loss": "cross_entropy",
    "centering": "center",
    "predictor": False,
    "queue_length": 65536,
    "teacher": "momentum",
    "head_l2_bottleneck": True,
    "head_activation": "gelu",
}


def as_typed(args: dict) -> str:
    """Return settings as one types them: {"predictor": True} -> "--predictor true"."""
    flags = []
    for name, value in args.items():
        text = brief(value)
        if isinstance(value, bool):
            text = text.lower()
        flags.append(f"--{name} {text}")
    return " ".join(flags)


def not_plain(args: dict) -> dict:
    """Return what of a file's flags is an ablation's: the settings that are not plain DINO's."""
    other = {}
    for name, plain in PLAIN_DINO.items():
        was = args.get(name, plain)
        if was != plain:
            other[name] = was
    return other


def refuse_other_method(args: dict, settings: Settings, path: Path) -> None:
    """Raise InputError if train.py is to continue an ablation's run; args: the file's flags."""
    other = {name: was for name, was in not_plain(args).items() if not hasattr(settings, name)}
    if other:
        flags = as_typed(other)
        raise InputError(
            f"{str(path)!r} was made with {flags}: continue it with python -m ablations.train "
            f"{flags} ..., or choose another --output_dir"
        )


def refuse_other_head(args: dict, settings: Settings, path: Path) -> None:
    """Raise InputError if a run is to start from another kind of head; args: the file's flags.

    The head is the teacher's, which has no predictor.
    """
    other = {}
    for name in ("head_l2_bottleneck", "head_activation"):
        plain = PLAIN_DINO[name]
        was = args.get(name, plain)
        now = getattr(settings, name, plain)  # train.py's settings lack it
        if was != now:
            other[name] = was
    if other:
        flags = as_typed(other)
        raise InputError(
            f"--init_from {str(path)!r} has a head made with {flags}: start with python -m "
            f"ablations.train {flags} ..., or from other weights"
        )
