"""The training step for the bench: ours, and the same Algorithm 1 with stock parts.

Both are train.py's train_step, start from the same weights and take the same random crops.
"""

import argparse
from collections.abc import Callable
from dataclasses import fields
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from bench import measure
from bench.plain import PlainLoss, PlainViT, plain_optimizer, plain_update_teacher
from runtime import hardware
from runtime.commandline import InputError
from runtime.hardware import World
from settings import Settings, check
from teacher import make_teacher, update_teacher
from train import Schedules, set_schedules, train_step
from training.cuda_graph import WARMUP_STEPS
from training.run_state import RunState, prepare_step, start_run
from vit import VisionTransformer

FLAGS = (  # the settings that are flags here too, with the same defaults
    "arch", "patch_size", "drop_path_rate", "out_dim", "global_crops_size", "local_crops_size",
    "local_crops_number", "num_workers", "device",
)
VALUES = Schedules(lr=1e-4, weight_decay=0.04, teacher_momentum=0.996, teacher_temp=0.04)


class Version(NamedTuple):
    """Networks, loss and optimizer, and their step: V crops (B, 3, S, S) -> the loss in nats."""

    run: RunState
    step: Callable


def make_ours(settings: Settings, world: World) -> Version:
    """Return what train.py trains."""
    run = start_run(settings, world)
    hot_path = [run.student.backbone, run.teacher.backbone, run.dino_loss]
    hardware.compile_hot_path(hot_path, settings.compile, world)
    make_step = prepare_step(train_step, run, settings, world)

    def step(crops: list[Tensor]) -> Tensor:
        set_schedules(run.optimizer, VALUES)
        metrics = make_step(
            run.student, run.teacher, run.dino_loss, run.optimizer,
            [crops], VALUES, settings, world, update_teacher,
        )
        return metrics[0]  # on the device: a GPU is not waited for

    if settings.cuda_graph:  # recorded before anything is timed
        for _ in range(WARMUP_STEPS + 1):
            step(random_crops(settings, world))
    return Version(run, step)


def make_plain(settings: Settings, world: World) -> Version:
    """Return the same networks with stock parts, never compiled."""
    run = start_run(settings, world)
    if isinstance(run.student.backbone, VisionTransformer):
        run.student.backbone = PlainViT(run.student.backbone)
    run.teacher = make_teacher(run.student)
    run.dino_loss = PlainLoss(settings.out_dim).to(world.device)
    run.optimizer = plain_optimizer(run.student)

    def step(crops: list[Tensor]) -> float:
        set_schedules(run.optimizer, VALUES)
        metrics = train_step(
            run.student, run.teacher, run.dino_loss, run.optimizer,
            [crops], VALUES, settings, world, plain_update_teacher,
        )
        return metrics[0].item()  # stock loops look at each loss, and wait for it

    return Version(run, step)


def random_crops(settings: Settings, world: World) -> list[Tensor]:
    """Return V crops (B, 3, S, S) of noise: a step takes as long whatever it sees."""
    global_sizes = [settings.global_crops_size] * 2
    local_sizes = [settings.local_crops_size] * settings.local_crops_number
    B = settings.batch_size_per_gpu
    crops = []
    for size in global_sizes + local_sizes:
        crops.append(torch.randn(B, 3, size, size, device=world.device))
    return crops


def cost_of_steps(
    make: Callable,
    settings: Settings,
    world: World,
    threads: int,
    most: int = 1,
    budget: float = 0.0,
) -> dict[str, float | None]:
    """Return a step's ms, the MiB that all of it took, and the images/s of features.

    For a fresh process. Memory is without that of the imports.
    """
    torch.set_num_threads(threads)
    before = measure.peak_mib(world.device)
    version = make(settings, world)
    crops = random_crops(settings, world)
    # the warm-up makes the optimizer's state: the second step is the first with all of the memory
    times = measure.in_turn([lambda: version.step(crops)], most, budget, world.device)
    after = measure.peak_mib(world.device)
    mib = None
    if after is not None:
        mib = after - before

    backbone = version.run.teacher.backbone
    with torch.no_grad(), world.autocast():
        forward = measure.in_turn([lambda: backbone(crops[0])], 3, 0.0, world.device)
    return {
        "ms": 1000 * median(time for (time,) in times),
        "mib": mib,
        "features_per_s": len(crops[0]) / median(time for (time,) in forward),
    }


def print_profile(version: Version, crops: list[Tensor], world: World) -> None:
    """Print the operations that take most of a step's time."""
    with torch.profiler.profile() as profiler:
        version.step(crops)
        measure.now(world.device)  # waits for a GPU
    column = "self_cpu_time_total"
    if world.device.type == "cuda":
        column = "self_cuda_time_total"
    operations = profiler.key_averages()
    print(operations.table(sort_by=column, row_limit=15, max_name_column_width=40))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say which step it is, on what, and how often."""
    add = parser.add_argument
    for one in fields(Settings):
        if one.name in FLAGS:
            text = f"{one.metadata['help']} [{one.default}]"
            add(f"--{one.name}", type=type(one.default), default=one.default, help=text)
    add("--batch_size", type=int, default=4, help="images [4]")
    add("--precision", default="fp32", help="auto, fp32 or bf16 [fp32]")
    add("--compile", action="store_true", help="our blocks and our loss through torch.compile")
    add("--cuda_graph", action="store_true", help="our step as one CUDA graph")
    add("--threads", type=int, default=0, help="of the CPU; 0: as many as torch takes [0]")
    add("--turns", type=int, default=7, help="measured calls, at most [7]")
    add("--seconds", type=float, default=15, help="two calls, and more for so long [15]")
    add("--profile", action="store_true", help="print where the time of our step goes")
    add("--json", action="store_true", help="one JSON object for each row instead of the table")


def step_settings(flags: argparse.Namespace) -> Settings:
    """Return the flags as checked settings of a training; set the CPU's threads."""
    for name, least in (("batch_size", 1), ("turns", 1), ("threads", 0), ("seconds", 0)):
        value = getattr(flags, name)
        if not value >= least:  # NaN too
            raise InputError(f"--{name} {value} must be at least {least}")
    for name, most in (("batch_size", 2**16), ("threads", 1024)):
        value = getattr(flags, name)
        if value > most:
            raise InputError(f"--{name} {value} must be at most {most}")
    if flags.profile and flags.json:
        raise InputError("--profile prints a table, which is no JSON: leave out one of the two")
    if flags.precision == "fp16":
        raise InputError("--precision fp16 is for train.py, which scales its loss: take bf16")
    if flags.threads:
        torch.set_num_threads(flags.threads)

    values = {name: getattr(flags, name) for name in FLAGS}
    settings = Settings(
        batch_size_per_gpu=flags.batch_size,
        precision=flags.precision,
        compile=str(flags.compile).lower(),
        cuda_graph=flags.cuda_graph,
        **values,
    )
    check(settings)
    return settings


def describe(settings: Settings, machine: dict) -> str:
    """Return two lines that say what the numbers belong to."""
    views = f"2 x {settings.global_crops_size}"
    if settings.local_crops_number:
        views += f" + {settings.local_crops_number} x {settings.local_crops_size}"
    return (
        f"{machine['name']} ({machine['device']}), {machine['dtype']}, "
        f"threads: {torch.get_num_threads()}, torch {machine['torch']}\n"
        f"{settings.arch}, patches of {settings.patch_size}, {views} pixels, "
        f"K = {settings.out_dim}, {settings.batch_size_per_gpu} images a step"
    )
