"""Batch normalisation over the batch of all processes, as the paper's ResNet-50 has it."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from runtime.hardware import World


class TotalOverProcesses(torch.autograd.Function):
    """World.total with a gradient.

    All processes' losses depend on the total, so the gradient is summed over them too.
    """

    @staticmethod
    def forward(ctx, x: Tensor, world: World) -> Tensor:
        ctx.world = world
        return world.total(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.world.total(gradient), None


class GlooBatchNorm(_BatchNorm):
    """nn.SyncBatchNorm for CPUs: (B, C, ...) -> the same shape, equally many B in each process."""

    world: World

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of axes will do."""

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of each channel over all processes: (B, C, ...) -> (1, C, 1 ...)."""
        axes = [0, *range(2, x.ndim)]
        mean = x.mean(axes, keepdim=True)
        return TotalOverProcesses.apply(mean, self.world) / self.world.size

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        mean = self.mean(x.float())
        variance = self.mean((x - mean).square())
        with torch.no_grad():
            n = x.numel() // x.shape[1] * self.world.size
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            # n / (n - 1), as PyTorch: the running variance is unbiased, the batch's is not
            self.running_var.lerp_(variance.flatten() * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        weight, bias = self.weight.view(mean.shape), self.bias.view(mean.shape)
        return (x - mean) / (variance + self.eps).sqrt() * weight + bias


def synchronise_batch_norms(network: nn.Module, world: World) -> nn.Module:
    """Make every batch normalisation use the batch of all processes; return the network."""
    if world.size == 1:
        return network
    if world.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = GlooBatchNorm  # which keeps its weights, buffers and names
            module.world = world
    return network
