"""The training step for the benches: ours and the plain one, whole, in parts, and in a process of its own.

Both start from the same weights and take the same random crops.
"""
import argparse
from collections.abc import Callable
from dataclasses import fields
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bench import measure
from bench.plain import PlainLoss, plain_clip_gradients, plain_copy, plain_optimizer, plain_step, plain_update_teacher
from loss import DINOLoss
from multicrop import MultiCropNetwork, forward_crops
from optimizer import clip_gradients, make_optimizer
from runtime import hardware
from runtime.commandline import InputError
from runtime.hardware import World
from settings import Settings, check
from teacher import make_teacher, update_teacher
from train import Schedules, set_schedules, train_step
from training.run_state import build_student

VALUES, CLIP = Schedules(lr=1e-4, weight_decay=0.04, teacher_momentum=0.996, teacher_temp=0.04), 3.0


class Version(NamedTuple):
    """One version of the step; step: V crops (B, 3, S, S) -> anything."""

    student: MultiCropNetwork
    teacher: MultiCropNetwork
    dino_loss: DINOLoss
    optimizer: torch.optim.Optimizer
    clip_gradients: Callable
    update_teacher: Callable
    step: Callable


def make_ours(settings: Settings, world: World) -> Version:
    """What train.py trains."""
    student = build_student(settings).to(world.device)
    teacher, dino_loss = make_teacher(student), DINOLoss(settings.out_dim).to(world.device)
    optimizer = make_optimizer("adamw", student)
    hardware.compile_hot_path([student.backbone, teacher.backbone, dino_loss], settings.compile, world)

    def step(crops: list[Tensor]) -> Tensor:
        set_schedules(optimizer, VALUES)
        return train_step(student, teacher, dino_loss, optimizer, [crops], VALUES, settings, world)

    return Version(student, teacher, dino_loss, optimizer, clip_gradients, update_teacher, step)


def make_plain(settings: Settings, world: World) -> Version:
    """The textbook's, never compiled."""
    student = plain_copy(build_student(settings)).to(world.device)
    teacher, dino_loss = make_teacher(student), PlainLoss(settings.out_dim).to(world.device)
    optimizer = plain_optimizer(student)
    step = lambda crops: plain_step(student, teacher, dino_loss, optimizer, crops, VALUES, CLIP, world)
    return Version(student, teacher, dino_loss, optimizer, plain_clip_gradients, plain_update_teacher, step)


def random_crops(settings: Settings, world: World) -> list[Tensor]:
    """V crops (B, 3, S, S) of noise: a step takes as long whatever it sees."""
    sizes = [settings.global_crops_size] * 2 + [settings.local_crops_size] * settings.local_crops_number
    return [torch.randn(settings.batch_size_per_gpu, 3, size, size, device=world.device) for size in sizes]


def step_in_parts(version: Version, crops: list[Tensor], world: World) -> dict[str, float]:
    """train_step's calls in its order, with the seconds of each part; the device waits after each, so they add up."""
    student, teacher, dino_loss, optimizer, clip, update, _ = version
    laps, began = {}, measure.now(world.device)

    def lap(name: str) -> None:
        nonlocal began
        ended = measure.now(world.device)
        laps[name], began = ended - began, ended

    with world.autocast():
        with torch.no_grad():
            teacher_logits = teacher(crops[:2])
        lap("teacher")
        features = forward_crops(student.backbone, nn.Identity(), crops)
        lap("student")
        student_logits = student.head(features)
        lap("head")
    loss = dino_loss(student_logits, teacher_logits, VALUES.teacher_temp)
    lap("loss")
    loss.backward()
    lap("backward")
    clip(student, CLIP)
    lap("clip")
    for group in optimizer.param_groups:
        group.update(lr=VALUES.lr, weight_decay=VALUES.weight_decay * group["decays"])
    optimizer.step()
    optimizer.zero_grad()
    lap("optimiser")
    update(student, teacher, VALUES.teacher_momentum)
    dino_loss.update_center(teacher_logits)
    lap("EMA, center")
    return laps


def cost_of_steps(make: Callable, settings: Settings, world: World, threads: int, most: int = 1,
                  budget: float = 0.0) -> dict[str, float | None]:
    """For a fresh process: after a warm-up the step's ms, the MiB that all of it took, and images/s of features.

    The memory that imports take does not count; the second step is the first that finds the optimiser's state there.
    """
    torch.set_num_threads(threads)
    before = measure.peak_mib(world.device)
    version, crops = make(settings, world), random_crops(settings, world)
    times = measure.in_turn([lambda: version.step(crops)], most, budget, world.device)
    after = measure.peak_mib(world.device)
    with torch.no_grad(), world.autocast():
        forward = measure.in_turn([lambda: version.teacher.backbone(crops[0])], 3, 0.0, world.device)
    return {"ms": 1000 * median(time for time, in times), "mib": after and after - before,
            "features_per_s": len(crops[0]) / median(time for time, in forward)}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that the benches share: which step it is, on what, and how often."""
    add = parser.add_argument
    add("--arch", default="vit_small", help="[vit_small]")
    add("--patch_size", type=int, default=16, help="pixels [16]")
    add("--batch_size", type=int, default=4, help="images [4]")
    add("--out_dim", type=int, default=65536, help="K [65536]")
    add("--global_crops_size", type=int, default=224, help="pixels [224]")
    add("--local_crops_size", type=int, default=96, help="pixels [96]")
    add("--local_crops_number", type=int, default=8, help="[8]")
    add("--drop_path_rate", type=float, default=0.1, help="the student's stochastic depth [0.1]")
    add("--compile", action="store_true", help="our blocks and our loss through torch.compile")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    add("--precision", default="fp32", choices=("auto", "fp32", "bf16"))
    add("--threads", type=int, default=0, help="of the CPU; 0: as many as torch takes [0]")
    add("--turns", type=int, default=7, help="measured calls, at most [7]")
    add("--seconds", type=float, default=15, help="two calls, and more until they took so long [15]")
    add("--json", action="store_true", help="one JSON object for each row instead of the table")


def told(settings: Settings, machine: dict) -> str:
    """What the numbers belong to, in words."""
    locals_ = f" + {settings.local_crops_number} x {settings.local_crops_size}" * bool(settings.local_crops_number)
    return (f"{machine['name']} ({machine['device']}), {machine['dtype']}, threads: {machine['threads']}, torch "
            f"{machine['torch']}\n{settings.arch}, patches of {settings.patch_size}, 2 x {settings.global_crops_size}"
            f"{locals_} pixels, K = {settings.out_dim}, {settings.batch_size_per_gpu} images a step")


def step_settings(flags: argparse.Namespace) -> Settings:
    """The flags as a training's settings, checked as there; sets the threads."""
    for name, least in (("batch_size", 1), ("turns", 1), ("threads", 0), ("seconds", 0)):
        if not getattr(flags, name) >= least:
            raise InputError(f"--{name} {getattr(flags, name)} must be at least {least}")
    if flags.threads:
        torch.set_num_threads(flags.threads)
    shared = {field.name for field in fields(Settings)} & set(vars(flags)) - {"compile"}
    settings = Settings(batch_size_per_gpu=flags.batch_size, compile="true" if flags.compile else "false",
                        **{name: getattr(flags, name) for name in shared})
    check(settings)
    return settings
