"""Training in fp16, for GPUs without bf16 (V100, T4): scale the loss, unscale the gradients.

Below 6e-8 a gradient would be 0 in fp16. PyTorch's GradScaler multiplies the loss, and divides the
gradients before they are clipped. A step whose gradients overflow is skipped, with a lower scale
from then on. Algorithm 1's step itself (train.py:train_step) knows nothing of it.
"""

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from tqdm import tqdm

from loss import DINOLoss
from optimizer import clip_gradients
from runtime import hardware
from runtime.hardware import World


class ScaledLoss:
    """A loss whose gradient is scaled, with the parts of the loss itself."""

    def __init__(self, dino_loss: DINOLoss, scaler: GradScaler):
        self.dino_loss = dino_loss
        self.scaler = scaler

    def __getattr__(self, name: str):
        return getattr(self.dino_loss, name)

    def __call__(self, *args) -> Tensor:
        loss = self.dino_loss(*args)
        loss.register_hook(self.scaler.scale)  # what backward() brings to the loss: 1 -> scale
        return loss


class ScaledOptimizer:
    """An optimiser that unscales the gradients and clips them before it steps."""

    def __init__(
        self,
        optimizer: Optimizer,
        scaler: GradScaler,
        network: nn.Module,
        max_norm: float,
        world: World,
    ):
        self.optimizer = optimizer
        self.scaler = scaler
        self.network = network
        self.max_norm = max_norm
        self.world = world

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.scaler.unscale_(self.optimizer)
        clip_gradients(self.network, self.max_norm)
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)  # none where a gradient overflowed
        self.scaler.update()
        after = self.scaler.get_scale()
        if after < before and self.world.is_main:
            tqdm.write(f"a gradient overflowed in fp16: step skipped, loss scaled by {after:g} now")


def scaled_step(train_step: Callable, scaler: GradScaler) -> Callable:
    """Return train_step for fp16, with its arguments."""

    def step(
        student, teacher, dino_loss, optimizer, micro_batches, now, settings, world, follow
    ) -> Tensor:
        network = hardware.unwrap(student)
        metrics = train_step(
            student,
            teacher,
            ScaledLoss(dino_loss, scaler),
            ScaledOptimizer(optimizer, scaler, network, settings.clip_grad, world),
            micro_batches,
            now,
            replace(settings, clip_grad=0.0),  # clipped once they are unscaled
            world,
            follow,
        )
        metrics[3] = 0.0  # the scaled gradients' norm, which may well overflow
        return metrics

    return step
