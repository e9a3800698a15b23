"""The schedules and the optimiser (Sec. 3.2, "Implementation details").

Schedules are pure functions of the step, counted from 0.
The paper gives AdamW and the four schedules.
Which tensors decay, clipping, SGD and LARS (runtime/lars.py) are the release's.
"""
import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from runtime.lars import LARS


def cosine(step: int, total_steps: int, start: float, end: float, warmup_steps: int = 0) -> float:
    """Return the value at a step: half a cosine from start to end, after a warm-up from 0 to start.

    For the learning rate (with warm-up), the weight decay and the teacher momentum (Sec. 3.1).
    """
    if step < warmup_steps:
        # release: the last warm-up step has the full value already, hence the - 1
        return start * step / max(1, warmup_steps - 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    falling = 0.5 * (1 + math.cos(math.pi * progress))  # from 1 to 0
    # release: the step after the last would have the end value
    return end + (start - end) * falling


def linear(step: int, warmup_steps: int, start: float, end: float) -> float:
    """Return the value at a step: linear from start to end, then end (the teacher temperature)."""
    if step >= warmup_steps:
        return end
    # paper: over the first 30 epochs; release: in jumps, one an epoch; here: at each step
    return start + (end - start) * step / warmup_steps


def parameter_groups(student: nn.Module) -> list[dict]:
    """Return the weights that decay and those that do not, for an optimiser.

    "decays" marks the group that gets each step's weight decay (train.py:set_schedules).
    """
    decaying = []
    not_decaying = []
    for param in student.parameters():
        if not param.requires_grad:  # the frozen gain of the prototypes
            continue
        if param.ndim > 1:  # release: matrices, positions, [CLS], a trained gain
            decaying.append(param)
        else:  # biases and the scales of normalisations
            not_decaying.append(param)
    return [
        {"params": decaying, "decays": True},
        {"params": not_decaying, "decays": False, "weight_decay": 0.0},  # AdamW's default is 0.01
    ]


def clip_gradients(student: nn.Module, max_norm: float) -> Tensor:
    """Scale each gradient down to a norm of at most max_norm; 0: leave them as they are.

    Returns the largest norm before, as a scalar tensor; NaN if a gradient has one.
    """
    gradients = [param.grad for param in student.parameters() if param.grad is not None]
    # release: each tensor by itself, not the global norm
    # in one call: a GPU's kernels for one norm after the other take longer to launch than to run
    norms = torch.stack(torch._foreach_norm(gradients))
    if max_norm:
        # min(1, max_norm / norm); an if would have to wait for a GPU's number
        factors = (max_norm / (norms + 1e-6)).clamp(max=1)
        for gradient, factor in zip(gradients, factors, strict=True):
            gradient.mul_(factor)
    return norms.max()


def make_optimizer(name: str, student: nn.Module) -> Optimizer:
    """Return adamw, sgd or lars; a training sets learning rate and decay at each step."""
    groups = parameter_groups(student)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)  # fused: one kernel for all tensors
    if name == "sgd":
        # 0.0, not the default 0: what a checkpoint keeps is a float, as the schedule's values are
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=0.0)
    return LARS(groups, lr=0.0)
