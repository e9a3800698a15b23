"""The schedules and the optimiser (Sec. 3.2, "Implementation details").

Schedules are pure functions of the step, counted from 0.
The paper gives AdamW and the four schedules.
Which tensors decay, clipping, SGD and LARS are the release's.
"""
import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def cosine(step: int, total_steps: int, start: float, end: float, warmup_steps: int = 0) -> float:
    """Return the value at a step: linear from 0 to start, then half a cosine from start to end.

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

    "decays" says which group a step's weight decay is for.
    """
    decaying = []
    others = []
    for param in student.parameters():
        if not param.requires_grad:  # the frozen gain of the prototypes
            continue
        if param.ndim > 1:  # release: matrices, positions, [CLS], a trained gain
            decaying.append(param)
        else:  # biases and the scales of normalisations
            others.append(param)
    return [
        {"params": decaying, "decays": True},
        {"params": others, "decays": False, "weight_decay": 0.0},  # AdamW's default is 0.01
    ]


def clip_gradients(student: nn.Module, max_norm: float) -> Tensor:
    """Scale each gradient down to a norm of at most max_norm; 0: leave them as they are.

    Returns the largest norm before, as a scalar tensor; NaN if a gradient has one.
    """
    gradients = [param.grad for param in student.parameters() if param.grad is not None]
    # release: each tensor by itself, not the global norm
    # all at once: a GPU's kernels for one tensor after the other take longer to launch than to run
    norms = torch.stack(torch._foreach_norm(gradients))
    if max_norm:
        # min(1, max_norm / norm); an if would have to wait for a GPU's number
        factors = (max_norm / (norms + 1e-6)).clamp(max=1)
        for gradient, factor in zip(gradients, factors, strict=True):
            gradient.mul_(factor)
    return norms.max()


class LARS(Optimizer):
    """SGD whose step for a matrix is a fixed fraction of the matrix's norm (You et al. 2017).

    For large batches; the released ResNet-50 was trained with it.
    """

    def __init__(
        self,
        params,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
    ):
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.step_of(param, group)

    def step_of(self, param: Tensor, group: dict) -> None:
        """Move one tensor: v <- m v + g, w <- w - lr v."""
        update = param.grad
        if param.ndim > 1:  # biases and normalisations take plain SGD's step, undecayed
            update = update.add(param, alpha=group["weight_decay"])  # g <- g + decay w
            update = update * trust_ratio(param, update, group["eta"])
        if "velocity" not in self.state[param]:
            self.state[param]["velocity"] = torch.zeros_like(param)
        velocity = self.state[param]["velocity"]
        velocity.mul_(group["momentum"]).add_(update)
        param.sub_(velocity, alpha=group["lr"])


def trust_ratio(param: Tensor, update: Tensor, eta: float) -> Tensor:
    """Return eta ||w|| / ||g||, or 1 where a norm is 0."""
    param_norm = param.norm()
    update_norm = update.norm()
    ratio = eta * param_norm / update_norm
    return torch.where((param_norm > 0) & (update_norm > 0), ratio, 1.0)


def make_optimizer(name: str, student: nn.Module) -> Optimizer:
    """Return adamw, sgd or lars; a training sets learning rate and decay at each step."""
    groups = parameter_groups(student)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)  # fused: one kernel for all tensors
    if name == "sgd":
        # 0.0, not the default 0: what a checkpoint keeps is a float, as the schedule's values are
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=0.0)
    return LARS(groups, lr=0.0)
