"""Train DINO (Algorithm 1, Fig. 2).

    torchrun train.py                                            # the demo: embedded images
    python train.py --data_path photos/ --output_dir runs/mine   # your own images
    torchrun --nproc_per_node=8 train.py --data_path imagenet/train --output_dir runs/vits16

train_step is Algorithm 1, and train the loop around it: read its seven numbered headings first.
World (runtime/hardware.py) is this process's rank, device and precision.

Ctrl-C saves and stops, and the same command continues. --help lists the settings.
"""

import math
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data import knn_split
from features import EvaluationView
from loss import DINOLoss
from optimizer import clip_gradients, cosine, linear
from runtime import hardware
from runtime.commandline import bar_style, errors_in_one_line
from runtime.hardware import World
from runtime.sampling import seed_of
from runtime.threads import FreeCores
from settings import Settings, parse_settings
from teacher import update_teacher
from training import report, run_state
from training.hooks import DINO, Hooks
from training.inputs import advice, views_in_memory
from training.knn import evaluate


class Schedules(NamedTuple):
    """The values of one step (Sec. 3.1 and 3.2)."""

    lr: float
    weight_decay: float
    teacher_momentum: float
    teacher_temp: float
    last_layer_frozen: bool = False


def schedules(settings: Settings, step: int, epoch_steps: int, images_per_step: int) -> Schedules:
    """Return the values of a step, counted from the start of the run."""
    total = settings.epochs * epoch_steps
    warmup = round(settings.warmup_epochs * epoch_steps)  # epochs may be fractional
    temp_warmup = round(settings.warmup_teacher_temp_epochs * epoch_steps)
    peak_lr = settings.lr * images_per_step / 256  # the linear scaling rule
    return Schedules(
        lr=cosine(step, total, peak_lr, settings.min_lr, warmup),
        weight_decay=cosine(step, total, settings.weight_decay, settings.weight_decay_end),
        teacher_momentum=cosine(
            step, total, settings.momentum_teacher, settings.momentum_teacher_end
        ),
        teacher_temp=linear(step, temp_warmup, settings.warmup_teacher_temp, settings.teacher_temp),
        last_layer_frozen=step < settings.freeze_last_layer * epoch_steps,
    )


def set_schedules(optimizer: torch.optim.Optimizer, now: Schedules) -> None:
    """Give the optimizer this step's learning rate and weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = now.lr
        if group["decays"]:  # biases and the scales of normalisations do not
            group["weight_decay"] = now.weight_decay


def train_step(
    student: nn.Module,
    teacher: nn.Module,
    dino_loss: DINOLoss,
    optimizer: torch.optim.Optimizer,
    micro_batches: list[list[Tensor]],
    now: Schedules,
    settings: Settings,
    world: World,
    follow=update_teacher,
) -> Tensor:
    """Make one step of Algorithm 1.

    micro_batches: lists of V crops (B, 3, S, S), the two global ones first.
    Returns loss, entropy and KL in nats, and the largest norm of a gradient: (4,).
    """
    metrics, teacher_means = [], []
    optimizer.zero_grad()
    for crops in micro_batches:  # one, unless --accumulate says more
        with world.autocast():
            with torch.no_grad():
                teacher_logits = teacher(crops[:2])  # the teacher sees the two global views
            student_logits = student(crops)  # the student sees all of them
        loss = dino_loss(student_logits, teacher_logits, now.teacher_temp)  # Eq. 1 to 3
        # with several processes DDP averages the gradients over them here
        (loss / len(micro_batches)).backward()
        metrics.append(torch.stack([loss.detach(), dino_loss.teacher_entropy, dino_loss.kl]))
        teacher_means.append(teacher_logits.float().mean(dim=0))  # (K,), for Eq. 4

    network = hardware.unwrap(student)  # without DDP
    norm = clip_gradients(network, settings.clip_grad)  # release: each tensor by itself
    if now.last_layer_frozen:  # release: steadier in the first epoch
        network.head.last_layer.zero_grad()  # grad = None: AdamW skips it, weight decay too
    optimizer.step()  # the student learns
    follow(network, teacher, now.teacher_momentum)  # update_teacher, but in Fig. 6's ablations
    # Eq. 4, after the loss that used the old center
    dino_loss.update_center(world.mean(torch.stack(teacher_means)))
    return torch.cat([torch.stack(metrics).mean(dim=0), norm.view(1)])


def train(settings: Settings, world: World, signals: list[int], hooks: Hooks = DINO) -> None:
    """Train to the last epoch, from the checkpoint in the output folder if there is one.

    signals: receives the numbers of the signals that ask to stop.
    hooks: what ablations/ and classroom/ replace; without them it is DINO.
    """
    output = Path(settings.output_dir)
    say = tqdm.write if world.is_main else lambda text: None  # once, above the bar

    # 1. Images: their crops, and a train and a test part for k-NN
    images, val_images = hooks.read_images(settings, world)
    # batches: which images a step takes; the loader follows it, and the loop sets its epoch
    loader, batches = hooks.make_loader(images, settings, world)
    split = knn_split(images, val_images, settings.knn_images)  # None without labels
    view = EvaluationView(settings.eval_size, settings.eval_crop, settings.mean, settings.std)
    if split and settings.knn_every and settings.in_memory == "true":  # the loader decided that
        split, view = views_in_memory(split, view, quiet=not world.is_main)

    # 2. Student (ViT and head), teacher (its copy), loss, optimizer: see run_state.start_run.
    # make_step is train_step, but with --cuda_graph or in fp16
    with world.main_first(bool(settings.init_from)):  # weights are downloaded once
        run = hooks.start_run(settings, world)
    run.images_per_step = batches.images_per_step
    make_step = run_state.prepare_step(train_step, run, settings, world)

    # 3. Continue where a run was stopped, or start from other weights
    begun = run_state.begin(output / "checkpoint.pth", run, settings, world)
    if begun:
        say(begun)
    # the checkpoint written next shows the learning rate and decay of the last step
    steps_done = run.images_done // batches.images_per_step  # in this epoch
    last_step = max(0, run.epoch * batches.steps + steps_done - 1)
    now = schedules(settings, last_step, batches.steps, batches.images_per_step)
    set_schedules(run.optimizer, now)
    follow = update_teacher
    if hooks.make_follow:
        follow = hooks.make_follow(run, batches.steps, steps_done)

    # 4. Compile what is slow, in place; DDP, which averages the gradients over the processes
    hot_path = [run.student.backbone, run.teacher.backbone]
    if getattr(run.dino_loss, "compiles", True):  # some of the ablations' losses do not
        hot_path.append(run.dino_loss)
    compiled = hardware.compile_hot_path(hot_path, settings.compile, world)
    student = hardware.average_gradients(run.student, world)

    dtype = str(world.dtype).removeprefix("torch.")
    outputs = f"K = {settings.out_dim}"
    if run.dino_loss.has_entropy:  # it lies between 0 and ln K
        outputs += f", ln K = {math.log(settings.out_dim):.4f}"
    say(f"{world.size} x {world.device.type}, {dtype}{world.rates}, {compiled}")
    count = f"{len(images)} images"
    if batches.passes > 1:
        count += f", {batches.passes} times an epoch"
    say(f"{count}, "
        f"{batches.steps} steps of {batches.images_per_step} an epoch; {outputs}")
    if split:
        say(f"k-NN: {len(split[0])} train images, {len(split[1])} test images")
    else:
        say("no labels, so no k-NN on the way")
    if not begun:
        for line in advice(len(images), settings):
            say(line)

    # 5. k-NN before the first step: the untrained network, and raw pixels
    if run.epoch < settings.epochs:
        # before the evaluation, which may take long
        run_state.save(run, settings, world, hooks.before_save)
    evaluated = evaluate(run, split, view, loader.num_workers, settings, world)
    if evaluated:
        run_state.save(run, settings, world, hooks.before_save)
    if evaluated and run.epoch > 0:  # the run was stopped in this epoch's evaluation
        say(report.line(run.history[-1], settings.epochs, settings.out_dim))

    # 6. Train
    # metrics not yet read: loss, entropy, KL, gradient norm
    recent = torch.zeros(min(settings.log_every, batches.steps), 4, device=world.device)
    per_epoch = batches.steps * batches.images_per_step
    images_done = run.epoch * per_epoch + run.images_done
    free_cores = FreeCores(world.device, loader.num_workers, settings.compile == "true")
    with tqdm(
        total=settings.epochs * per_epoch,
        initial=images_done,
        unit="img",
        disable=not world.is_main,
        **bar_style(),
    ) as bar:
        while run.epoch < settings.epochs:
            # the epoch's crops, from where a stopped run left off
            batches.epoch = run.epoch
            batches.first_step = run.images_done // batches.images_per_step
            crops = iter(loader)
            began = time.perf_counter() - run.seconds  # the clock of a stopped run goes on
            unread = 0

            for step in range(batches.first_step, batches.steps):
                free_cores.take()  # on a CPU that other programs use too
                micro_batches = []
                for _ in range(settings.accumulate):
                    views = next(crops)
                    micro_batches.append([v.to(world.device, non_blocking=True) for v in views])

                global_step = run.epoch * batches.steps + step
                now = schedules(settings, global_step, batches.steps, batches.images_per_step)
                set_schedules(run.optimizer, now)
                # a step's own seed: a resumed run drops the same paths as an uninterrupted one
                torch.manual_seed(seed_of(settings.seed, global_step, world.rank))
                recent[unread] = make_step(
                    student, run.teacher, run.dino_loss, run.optimizer,
                    micro_batches, now, settings, world, follow,
                )
                unread += 1
                run.images_done += batches.images_per_step
                bar.update(batches.images_per_step)

                # Reading the metrics waits for the GPU, so they are read rarely.
                stopping = world.any(bool(signals))
                if unread == settings.log_every or step + 1 == batches.steps or stopping:
                    own = recent[:unread].cpu()
                    metrics = world.mean(own)
                    report.require_finite(
                        metrics, own, run.epoch + 1, step + 1, micro_batches, run.student
                    )
                    run.metrics = torch.cat([run.metrics, metrics[:, :3]])  # without the norm
                    run.seconds = time.perf_counter() - began
                    unread = 0
                    bar.set_postfix(epoch=run.epoch + 1, loss=metrics[-1, 0].item(), refresh=False)

                if stopping:
                    run_state.save(run, settings, world, hooks.before_save)
                    say(f"stopped in epoch {run.epoch + 1}, after {run.images_done} of its "
                        f"{per_epoch} images: the same command continues there")
                    number = signals[0] if signals else signal.SIGTERM  # or another process got it
                    sys.exit(128 + number)

            # the epoch is over: its line of the log, and a new count
            run.history.append(report.epoch_record(run, now))
            run.epoch += 1
            run.images_done = 0
            run.seconds = 0.0
            run.metrics = run.metrics[:0]
            run_state.save(run, settings, world, hooks.before_save)
            if evaluate(run, split, view, loader.num_workers, settings, world):
                run_state.save(run, settings, world, hooks.before_save)
            say(report.line(run.history[-1], settings.epochs, settings.out_dim))
            if world.is_main:
                report.draw_epochs(output, run.history, settings)

    # 7. Figures, and a paragraph that says how it went
    if world.is_main:
        # from the same seed: the weights of the first step
        untrained = hooks.start_run(settings, world).student.backbone
        print(report.finish(output, run, untrained, val_images or images, settings, world))


def launch(settings: Settings, hooks: Hooks = DINO) -> None:
    """Train in this process and those beside it, which torchrun has started; hooks: train's."""
    run_state.keep_choices(settings)
    with (
        hardware.start(
            settings.device, settings.precision, settings.patience, settings.width
        ) as world,
        hardware.stop_signals() as signals,
        run_state.claimed(Path(settings.output_dir), world),  # by one training at a time
    ):
        settings.precision = hardware.name_of(world.dtype)  # auto is decided now, and kept
        train(settings, world, signals, hooks)


def main(argv: list[str] | None = None) -> None:
    with errors_in_one_line():
        launch(parse_settings(argv))


if __name__ == "__main__":
    main()
