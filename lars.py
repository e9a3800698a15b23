"""LARS (You et al. 2017), the optimiser of the paper's ResNet-50 baselines at large batches."""
import torch
from torch.optim import Optimizer


class LARS(Optimizer):
    """Momentum SGD whose step for each matrix is scaled to a fixed share of the matrix's own norm.

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
