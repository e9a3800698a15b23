"""Batch normalisation where several processes share a batch: synchronised, or with running statistics averaged.

The paper's ResNet-50 normalises with the statistics of all processes; MoCo shuffles the batches instead.
"""
import torch
from torch import Tensor, nn

from runtime.hardware import World


class TotalOverProcesses(torch.autograd.Function):
    """`World.total` with a gradient: which is summed over all processes too, since all losses depend on the sum."""

    @staticmethod
    def forward(ctx, x: Tensor, world: World) -> Tensor:
        ctx.world = world
        return world.total(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.world.total(gradient), None


class GlooBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation with the statistics of all processes: what nn.SyncBatchNorm is on GPUs, for CPUs.

    Every process must hold equally many samples. (B, C, ...) -> the same shape.
    """

    world: World

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of axes."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        axes, world_size = [0, *range(2, x.ndim)], self.world.size
        mean = TotalOverProcesses.apply(x.float().mean(axes, keepdim=True), self.world) / world_size
        variance = TotalOverProcesses.apply((x - mean).square().mean(axes, keepdim=True), self.world) / world_size
        with torch.no_grad():
            n = x.numel() // x.shape[1] * world_size
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(variance.flatten() * n / (n - 1), self.momentum)
            self.num_batches_tracked += 1
        shape = mean.shape
        return (x - mean) / (variance + self.eps).sqrt() * self.weight.view(shape) + self.bias.view(shape)


def average_buffers(network: nn.Module, world: World) -> None:
    """Let all processes have the mean of their running statistics, where batch normalisation is not synchronised."""
    for buffer in network.buffers():
        if buffer.is_floating_point():
            buffer.copy_(world.mean(buffer))


def synchronise_batch_norms(network: nn.Module, world: World) -> nn.Module:
    """Make every batch normalisation use the batch of all processes, as the paper's ResNet-50 does."""
    if world.size == 1:
        return network
    if world.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__, module.world = GlooBatchNorm, world  # keeps its weights, buffers and names
    return network
