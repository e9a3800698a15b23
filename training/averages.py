"""What an optimizer keeps of earlier steps, read from a checkpoint: averages of the gradients."""

import torch
from torch.optim import Optimizer


def load_averages(optimizer: Optimizer, saved: dict) -> None:
    """Give the optimizer the averages of a checkpoint: number of a parameter -> name -> tensor.

    Learning rate, decay and so on stay the optimizer's own. Raises ValueError, TypeError,
    LookupError or AttributeError where an average does not fit its parameter, or is not finite.
    """
    names = {name for averages in saved.values() for name in averages}
    for averages in saved.values():
        for name in names:
            if not averages[name].is_floating_point():
                raise TypeError(f"{name} holds no real numbers")
    optimizer.load_state_dict(optimizer.state_dict() | {"state": saved})

    for param, averages in optimizer.state.items():
        for name, average in averages.items():
            shape = param.shape
            if name == "step":
                shape = torch.Size()  # AdamW counts the steps of each tensor
            # the shape first: a file may claim one that no memory holds
            if average.shape != shape or not average.isfinite().all():
                raise ValueError(f"{name} has another shape than its parameter, or is not finite")
