"""LARS, the optimiser of the released ResNet-50."""
import torch
from torch import Tensor
from torch.optim import Optimizer


class LARS(Optimizer):
    """SGD whose step for a matrix is a fixed fraction of the matrix's norm (You et al. 2017).

    For large batches; the released ResNet-50 was trained with it. A tensor w with gradient g:
    v <- m v + r (g + d w), then w <- w - lr v, with momentum m, decay d, and r = eta ||w|| /
    ||g + d w||. For biases and the scales of normalisations r = 1 and d = 0.
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
        """Move one tensor."""
        update = param.grad
        if param.ndim > 1:  # biases and normalisations take plain SGD's step, undecayed
            update = update.add(param, alpha=group["weight_decay"])  # g + d w
            update = update * trust_ratio(param, update, group["eta"])
        if "velocity" not in self.state[param]:
            self.state[param]["velocity"] = torch.zeros_like(param)
        velocity = self.state[param]["velocity"]
        velocity.mul_(group["momentum"]).add_(update)
        param.sub_(velocity, alpha=group["lr"])


def trust_ratio(param: Tensor, update: Tensor, eta: float) -> Tensor:
    """Return r = eta ||w|| / ||update||, or 1 where a norm is 0."""
    param_norm = param.norm()
    update_norm = update.norm()
    ratio = eta * param_norm / update_norm
    return torch.where((param_norm > 0) & (update_norm > 0), ratio, 1.0)
