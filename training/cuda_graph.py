"""A training's step as one CUDA graph: recorded once, then launched as a whole.

A step has some 2,000 kernels. A CPU launches them one by one, which for a small network takes
longer than their work on a GPU.
A graph repeats what it recorded, on the same memory. So what changes from step to step is written
into tensors that stay: the crops, and the values of the schedules.
Algorithm 1's step itself (train.py:train_step) knows nothing of it.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from runtime.commandline import InputError
from runtime.hardware import World
from settings import Settings, refuse

WARMUP_STEPS = 4  # before the recording: libraries and AdamW allocate in their first steps


class TensorAdamW:
    """An AdamW whose learning rate and weight decay are tensors: a graph would keep floats."""

    def __init__(self, adamw: torch.optim.AdamW, lr: Tensor, weight_decay: Tensor):
        self.adamw = adamw
        self.lr = lr
        self.weight_decay = weight_decay

    def zero_grad(self) -> None:
        self.adamw.zero_grad()

    @torch.no_grad()
    def step(self) -> None:
        groups = self.adamw.param_groups
        kept = [dict(group) for group in groups]
        for group in groups:
            if group["decays"]:
                moving = [param for param in group["params"] if param.grad is not None]
                # w <- w - lr decay w here: torch's AdamW takes a tensor as lr, not as decay
                torch._foreach_mul_(moving, 1 - self.lr * self.weight_decay)
            group.update(lr=self.lr, weight_decay=0.0, capturable=True)
        self.adamw.step()
        for group, before in zip(groups, kept, strict=True):
            group.update(before)  # floats, as a checkpoint keeps them


class GraphStep:
    """train_step with its arguments, as a graph."""

    def __init__(self, train_step: Callable, optimizer: torch.optim.AdamW, device: torch.device):
        self.train_step = train_step
        # what the graph reads, and what each step writes anew
        self.micro_batches: list[list[Tensor]] = []
        names = ("lr", "weight_decay", "teacher_momentum", "teacher_temp")
        self.values = dict(zip(names, torch.zeros(4, device=device).unbind(), strict=True))
        self.optimizer = TensorAdamW(optimizer, self.values["lr"], self.values["weight_decay"])
        self.frozen: bool | None = None
        self.graph = None
        self.steps = 0  # before the recording

    def __call__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        dino_loss: nn.Module,
        optimizer: torch.optim.Optimizer,
        micro_batches: list[list[Tensor]],
        now,
        settings: Settings,
        world: World,
        follow: Callable,
    ) -> Tensor:
        self.write_inputs(micro_batches, now)
        if now.last_layer_frozen != self.frozen:  # then there are other gradients: another graph
            self.frozen = now.last_layer_frozen
            self.graph = None
            self.steps = 0
        step = partial(
            self.train_step, student, teacher, dino_loss, self.optimizer,
            self.micro_batches, now._replace(**self.values), settings, world, follow,
        )
        if self.steps < WARMUP_STEPS:
            self.steps += 1
            return beside(step)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            # recorded, not computed; thread_local: the loader's thread may go on beside it
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.metrics = step()
        self.graph.replay()
        return self.metrics.clone()  # the next replay writes there again

    def write_inputs(self, micro_batches: list[list[Tensor]], now) -> None:
        """Put a step's crops and values where the graph reads them."""
        if not self.micro_batches:
            for crops in micro_batches:
                self.micro_batches.append([torch.empty_like(crop) for crop in crops])
        for places, crops in zip(self.micro_batches, micro_batches, strict=True):
            for place, crop in zip(places, crops, strict=True):
                place.copy_(crop, non_blocking=True)
        for name, tensor in self.values.items():
            tensor.fill_(getattr(now, name))


def beside(step: Callable) -> Tensor:
    """Make a step on a stream of its own, as a recording is."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        metrics = step()
    torch.cuda.current_stream().wait_stream(stream)
    return metrics.clone()


def graph_step(
    train_step: Callable, optimizer: torch.optim.Optimizer, settings: Settings, world: World
) -> GraphStep:
    """Return train_step as a CUDA graph. Raise InputError where there is none of it."""
    if world.device.type != "cuda":
        raise InputError("--cuda_graph true needs a GPU of NVIDIA: leave it out")
    if world.size > 1:
        raise InputError("--cuda_graph true is for one process: start it with python, not torchrun")
    if world.dtype == torch.float16:
        refuse(settings, "precision", "scales its loss, outside of a CUDA graph: take bf16")
    if settings.optimizer != "adamw":
        refuse(settings, "optimizer", "has no CUDA graph here: take adamw")
    return GraphStep(train_step, optimizer, world.device)
