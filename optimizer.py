"""The schedules and the optimiser (Sec. 3.2, "Implementation details"): AdamW, SGD or LARS; decay and clipping.

The schedules are pure functions of the step, counted from 0. The paper names AdamW and the decay's schedule alone:
which tensors decay, clipping, SGD and LARS are the release's.
"""
import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def cosine(step: int, total_steps: int, start: float, end: float, warmup_steps: int = 0) -> float:
    """Linear from 0 to start over the warm-up, then start -> end on half a cosine.

    Used for the learning rate (with warm-up), the weight decay and the teacher momentum (Sec. 3.1). As in the release,
    the last warm-up step has the full value and the step after the last would have the end value.
    """
    if step < warmup_steps:
        return start * step / max(1, warmup_steps - 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


def linear(step: int, warmup_steps: int, start: float, end: float) -> float:
    """Linear from start to end over the warm-up, then end: the teacher temperature.

    Paper: over the first 30 epochs; release: the same in jumps, one an epoch; here: one a step.
    """
    return end if step >= warmup_steps else start + (end - start) * step / warmup_steps


def parameter_groups(student: nn.Module) -> list[dict]:
    """Matrices decay, as in the release positions and [CLS] too; biases and the scales of normalisations do not.

    "decays" tells whoever sets a step's weight decay which group it is for.
    """
    params = [param for param in student.parameters() if param.requires_grad]
    return [{"params": [param for param in params if param.ndim > 1], "decays": True},
            {"params": [param for param in params if param.ndim <= 1], "decays": False, "weight_decay": 0.0}]


def clip_gradients(student: nn.Module, max_norm: float) -> Tensor:
    """Scale each parameter's gradient down to at most max_norm, each tensor by itself (release), 0: not at all.

    Returns the largest norm before, NaN if one is: a scalar, which a GPU need not be waited for.
    """
    norms = []
    for param in student.parameters():
        if param.grad is not None:
            norms.append(param.grad.norm())
            factor = max_norm / (norms[-1] + 1e-6)
            if max_norm and (param.device.type != "cpu" or factor < 1):  # only a CPU can look without waiting
                param.grad.mul_(factor.clamp(max=1))
    return torch.stack(norms).max()


class LARS(Optimizer):
    """You et al. 2017, for large batches: SGD whose step for a matrix is a fixed share of the matrix's own norm.

    g <- g + decay w; for tensors of 2 and more axes g <- g * eta ||w|| / ||g||; v <- m v + g; w <- w - lr v.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.9, eta: float = 0.001):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                update = param.grad
                if param.ndim > 1:
                    update = update.add(param, alpha=group["weight_decay"])
                    weight_norm, update_norm = param.norm(), update.norm()
                    trust = group["eta"] * weight_norm / update_norm
                    update = update * torch.where((weight_norm > 0) & (update_norm > 0), trust, 1.0)
                velocity = self.state[param].setdefault("velocity", torch.zeros_like(param))
                velocity.mul_(group["momentum"]).add_(update)
                param.sub_(velocity, alpha=group["lr"])


def make_optimizer(name: str, student: nn.Module) -> torch.optim.Optimizer:
    """adamw, sgd or lars; learning rate and decay are set at each step."""
    groups = parameter_groups(student)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=0.0) if name == "sgd" else LARS(groups, lr=0.0)
