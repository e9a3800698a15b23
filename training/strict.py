"""What a file says is looked at before it is used: weights, an optimiser's state, flags.

A file can claim anything: shapes that its memory does not fill, text where numbers should be, NaN. Here that becomes
one line about the file; nothing is ever left out or cut to fit.
"""
from pathlib import Path

import torch
from torch import Tensor, nn

from runtime.commandline import InputError, brief

# what of a file's flags is read: its type, or of the three colours', and its bounds
READ_FLAGS = {"arch": (str, "", "~"), "patch_size": (int, 1, 1024), "num_heads": (int, 0, 1024),
              "eval_size": (int, 1, 2048), "eval_crop": (float, 0.1, 1), "init_std": (float, 1e-9, 1e9),
              "mean": (tuple, -1e9, 1e9), "std": (tuple, 1e-9, 1e9)}
# what an optimiser keeps of each parameter
STATES = {"AdamW": {"step", "exp_avg", "exp_avg_sq"}, "SGD": {"momentum_buffer"}, "LARS": {"velocity"}}


def check_flags(args: dict, path: str | Path) -> None:
    """Raise InputError if a flag of the file that is read cannot be a flag's value."""
    for name, (kind, low, high) in READ_FLAGS.items():
        value = args.get(name, low if kind is not tuple else (0.5,) * 3)
        fits = isinstance(value, (int, float) if kind is float else kind) and (kind is not tuple or len(value) == 3)
        try:
            fits = fits and all(low <= one <= high for one in (value if kind is tuple else (value,)))
        except TypeError:
            fits = False
        if not fits:
            raise InputError(f"{str(path)!r} says --{name} {str(value)[:50]!r}, which cannot be: use another copy")


def is_number(value: object) -> bool:
    """Whether it is a number that can be reckoned with and drawn."""
    return isinstance(value, (int, float)) and abs(value) < 1e30


def whole_numbers(tensor: Tensor) -> int:
    """How many entries a tensor's memory has: fewer than its shape's where it repeats them, or has none."""
    dense = tensor.layout == torch.strided and tensor.device.type == "cpu"
    return tensor.untyped_storage().nbytes() // max(1, tensor.element_size()) if dense else 0


def is_like(value: Tensor, wanted: Tensor) -> bool:
    """Whether a tensor from a file can be copied into another: dense, in memory, of a float type for a float type."""
    floats = value.is_floating_point() and wanted.is_floating_point()
    return value.layout == torch.strided and value.device.type == "cpu" and (floats or value.dtype == wanted.dtype)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict, path: str | Path) -> None:
    """load_state_dict, or an InputError where the file's is none of an optimiser like this one, or is not finite."""
    groups = optimizer.state_dict()["param_groups"]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    try:
        fits = isinstance(state, dict) and len(groups) == len(state["param_groups"]) and all(
            is_number(theirs[name]) if isinstance(value, float) else theirs.get(name, value) == value
            for ours, theirs in zip(groups, state["param_groups"]) for name, value in ours.items())
        fits = fits and all(parts.keys() == STATES[type(optimizer).__name__] for parts in state["state"].values())
        fits = fits and all(is_like(one, torch.empty(0)) and one.isfinite().all()
                            and one.shape == (params[number].shape if name != "step" else ())
                            for number, parts in state["state"].items() for name, one in parts.items())
        if not fits:
            raise ValueError
        optimizer.load_state_dict(state)
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError):
        raise InputError(f"{str(path)!r} holds no state of this optimiser and network, or numbers that are not finite: "
                         "choose another --output_dir") from None


def load_strictly(module: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """load_state_dict(strict=True), or an InputError with the keys and shapes that do not fit."""
    if not isinstance(state, dict):
        raise InputError(f"{str(path)!r} holds a {type(state).__name__} where weights should be: use another copy")
    want, have = module.state_dict(), {name: value for name, value in state.items() if isinstance(value, Tensor)}
    missing = [name for name in want if name not in have]
    unexpected = [brief(name) for name in state if name not in want]
    both = [(name, have[name], want[name]) for name in want if name in have]
    shapes = [f"{name} {tuple(a.shape)} for {tuple(b.shape)}" for name, a, b in both if a.shape != b.shape]
    kinds = [f"{name} {a.dtype} on {a.device}" for name, a, b in both if not is_like(a, b)]
    bad = [] if shapes or kinds else [name for name, a, _ in both if not a.isfinite().all()]
    problems = [f"{what} {len(names)} ({', '.join(names[:5])}{' ...' if len(names) > 5 else ''})"
                for what, names in (("missing", missing), ("unexpected", unexpected), ("other shapes", shapes),
                                    ("other types", kinds), ("not finite", bad)) if names]
    if problems:
        raise InputError(f"the weights of {str(path)!r} do not fit the network: {', '.join(problems)}: check --arch, "
                         "--patch_size, and --out_dim and the head's sizes")
    module.load_state_dict(state, strict=True)
