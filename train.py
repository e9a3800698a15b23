"""The training loop (Algorithm 1, Fig. 2): two views to the teacher, all to the student, the teacher follows.

    torchrun train.py                                                       # the demo, on whatever machine
    python train.py --data_path photos/ --output_dir runs/mine              # your images, one process
    torchrun --nproc_per_node=8 train.py --data_path imagenet/train --output_dir runs/vits16

This is the one file that sees data, networks, loss and teacher at once, and the one that applies device, processes,
precision and compilation to them. Randomness is a function of (seed, step) and of (seed, epoch, image), so a run
that was stopped anywhere goes on as if it had not been. Algorithm 1 shows no local crops; release: the gradients are
clipped, and those of the prototypes dropped during the first epochs.
"""
import math
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from runtime.commandline import InputError, errors_in_one_line
from settings import Settings, parse_settings

if __name__ == "__main__":
    with errors_in_one_line():
        parse_settings()  # a first look: --help and most wrong flags are answered before the seconds that torch takes

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import Images, knn_split, open_images, without_unreadable
from eval_knn import extract, knn_accuracies
from features import EvaluationView, Pixels
from loss import DINOLoss
from multicrop import MultiCrop, MultiCropNetwork
from optimizer import clip_gradients, cosine, linear
from runtime import batch_norm, finite, hardware, sampling
from runtime.hardware import World
from runtime.sampling import CropsDataset, EpochBatches, seed_of
from teacher import make_teacher, update_teacher
from training import report
from training.run_state import RunState, build_student, claimed, save_run, start_run

READ_EVERY = {"cuda": 10}  # steps between looks at the metrics; what is not finite is noticed then


class StepValues(NamedTuple):
    """What the schedules say for one step."""

    lr: float
    weight_decay: float
    teacher_momentum: float
    teacher_temp: float
    teacher_lags: bool = False  # the teacher is the student of the previous iteration (Fig. 6)


def momentum_of(kind: str, scheduled: float) -> float:
    """Fig. 6's teachers as values of lambda after a step: 1 leaves the teacher as it is, 0 makes it the student."""
    return {"momentum": scheduled, "previous_epoch": 1.0, "previous_iteration": 1.0, "student": 0.0}[kind]


def scheduled(settings: Settings, step: int, steps_per_epoch: int, images_per_step: int) -> StepValues:
    """All schedules of Sec. 3.2 at one step; the learning rate is scaled linearly with the batch."""
    total, peak_lr = settings.epochs * steps_per_epoch, settings.lr * images_per_step / 256
    momentum = cosine(step, total, settings.momentum_teacher, 1.0)
    return StepValues(
        cosine(step, total, peak_lr, settings.min_lr, settings.warmup_epochs * steps_per_epoch),
        cosine(step, total, settings.weight_decay, settings.weight_decay_end),
        momentum_of(settings.teacher, momentum),
        linear(step, settings.warmup_teacher_temp_epochs * steps_per_epoch, settings.warmup_teacher_temp,
               settings.teacher_temp),
        settings.teacher == "previous_iteration")


def train_step(student: MultiCropNetwork, ddp_student: nn.Module, teacher: MultiCropNetwork, dino_loss: DINOLoss,
               optimizer: torch.optim.Optimizer, micro_batches: list[list[Tensor]], values: StepValues,
               clip_grad: float, freeze_last_layer: bool, world: World) -> Tensor:
    """Algorithm 1: micro-batches of V crops (B, 3, S, S) -> loss, entropy, KL in nats, gradient norm, (4,)."""
    metrics, teacher_mean = [], []
    optimizer.zero_grad()
    for crops in micro_batches:
        with world.autocast():
            with torch.no_grad():
                teacher_logits = teacher(crops[:2])  # the teacher sees the global views only
            student_logits = ddp_student(crops)
        loss = dino_loss(student_logits, teacher_logits, values.teacher_temp)
        (loss / len(micro_batches)).backward()
        metrics.append(torch.stack([loss.detach(), dino_loss.teacher_entropy, dino_loss.kl]))
        teacher_mean.append(teacher_logits.float().mean(dim=0))
    norm = clip_gradients(student, clip_grad)
    if freeze_last_layer:
        student.head.last_layer.zero_grad()
    for group in optimizer.param_groups:
        group.update(lr=values.lr, weight_decay=values.weight_decay * group["decays"])
    if values.teacher_lags:
        update_teacher(student, teacher, 0.0)
    optimizer.step()  # the student
    update_teacher(student, teacher, values.teacher_momentum)
    dino_loss.update_center(world.mean(torch.stack(teacher_mean)))
    return torch.cat([torch.stack(metrics).mean(dim=0), norm.view(1)])


def read_images(settings: Settings, world: World) -> tuple[Images, Images | None]:
    """The training part and the evaluation part, without what cannot be read if the settings say so."""
    train, val = open_images(settings.data_path, settings.dataset, settings.download)
    if settings.skip_bad_images:
        (train, bad), (val, bad_val) = without_unreadable(train), without_unreadable(val) if val else (None, [])
        if world.is_main:
            named = [message.split(": mend it")[0] for message in bad + bad_val]
            print(*named, f"skipped {len(named)} images that cannot be read", sep="\n")
    return train, val


def make_loader(images: Images, settings: Settings, world: World) -> tuple[DataLoader, EpochBatches]:
    """Micro-batches of crops for this process, and the order they follow."""
    batches = EpochBatches(len(images), settings.batch_size_per_gpu, settings.accumulate, world.rank,
                           world.size, settings.seed)
    if not batches.steps:
        raise InputError(f"{len(images)} images are fewer than one step of {batches.images_per_step}: lower "
                         "--batch_size_per_gpu, or add images")
    multicrop = MultiCrop(settings.global_crops_size, settings.local_crops_size, settings.global_crops_scale,
                          settings.local_crops_scale, settings.local_crops_number, settings.mean, settings.std,
                          settings.color_jitter, settings.blur, settings.solarize)
    crops = CropsDataset(images, multicrop, settings.seed)
    return sampling.make_loader(crops, batches, settings.num_workers, world), batches


def distribute(run: RunState, settings: Settings, world: World) -> nn.Module:
    """The student as the step calls it: blocks compiled where that pays, gradients averaged over the processes."""
    hot_path = [run.student.backbone, run.teacher.backbone]
    if settings.loss == "cross_entropy" and settings.centering == "center":
        hot_path.append(run.dino_loss)
    told = hardware.compile_hot_path(hot_path, settings.compile, world)
    if world.is_main:
        print(f"{world.size} x {world.device.type}, {str(world.dtype).removeprefix('torch.')}, {told}")
    return hardware.average_gradients(run.student, world)


def train_epoch(run: RunState, ddp_student: nn.Module, loader: DataLoader, batches: EpochBatches, settings: Settings,
                world: World, signals: list[int], bar: tqdm) -> None:
    """The steps of one epoch that are still to do; returns early after a signal."""
    batches.epoch, batches.first_step = run.epoch, run.images // batches.images_per_step
    if settings.teacher == "previous_epoch" and not batches.first_step:
        update_teacher(run.student, run.teacher, 0.0)
    crops = iter(loader)
    began = time.perf_counter() - run.seconds
    unread = []  # metrics still on the device: reading them waits for all that a GPU has in its queue
    for step in range(batches.first_step, batches.steps):
        micro_batches = [[crop.to(world.device, non_blocking=True) for crop in next(crops)]
                         for _ in range(settings.accumulate)]
        global_step = run.epoch * batches.steps + step
        torch.manual_seed(seed_of(settings.seed, global_step, world.rank))  # of the dropped paths
        values = scheduled(settings, global_step, batches.steps, batches.images_per_step)
        unread.append(train_step(run.student, ddp_student, run.teacher, run.dino_loss, run.optimizer, micro_batches,
                                 values, settings.clip_grad, run.epoch < settings.freeze_last_layer, world))
        bar.update(batches.images_per_step)
        stopping = world.any(bool(signals))  # asked over the CPUs, so that a GPU's queue is not waited for
        if len(unread) < READ_EVERY.get(world.device.type, 1) and step + 1 < batches.steps and not stopping:
            continue
        own = torch.stack(unread).cpu()
        metrics = world.mean(own)
        finite.check_steps(metrics, own, run.epoch + 1, step + 1, micro_batches, run.student)
        run.metrics = torch.cat([run.metrics, metrics[:, :3]])
        run.images += len(unread) * batches.images_per_step
        run.seconds = time.perf_counter() - began
        unread = []
        bar.set_postfix(epoch=run.epoch + 1, loss=f"{metrics[-1, 0]:.3f}", refresh=False)
        if stopping:
            return


def due_for_knn(run: RunState, settings: Settings) -> dict[str, nn.Module]:
    """The networks whose k-NN the last record still wants: teacher and student after every so many epochs, the
    untrained network and raw pixels before the first; none where it has them."""
    every = settings.knn_every
    if not every or (run.epoch % every and run.epoch != settings.epochs):
        return {}
    networks = {"knn_teacher": run.teacher.backbone, "knn_student": run.student.backbone}
    if run.epoch == 0:
        networks = {"knn_untrained": run.teacher.backbone, "knn_pixels": Pixels()}
    return {} if networks.keys() <= run.history[-1].keys() else networks


def evaluate(run: RunState, split: tuple[Images, Images], settings: Settings, world: World,
             num_workers: int) -> None:
    """Put k-NN top-1 in % into the last record, of the networks that are due."""
    view = EvaluationView(settings.eval_size, settings.eval_crop, settings.mean, settings.std)
    for name, network in due_for_knn(run, settings).items():
        features = extract(network, split, view, world, num_workers=num_workers)
        run.history[-1][name] = round(knn_accuracies(features, world=world)[20][0], 2)


def epoch_record(run: RunState, settings: Settings, batches: EpochBatches) -> dict:
    """The epoch's line of log.txt, in the release's terms and ours: means over its steps, and of entropy and KL those
    over each of up to 20 parts of the epoch; resets what it is made of."""
    loss, entropy, kl = run.metrics.mean(dim=0).tolist()
    last = scheduled(settings, (run.epoch + 1) * batches.steps - 1, batches.steps, batches.images_per_step)
    record = {"epoch": run.epoch, "train_loss": loss, "train_lr": last.lr, "train_wd": last.weight_decay,
              "teacher_temp": last.teacher_temp, "teacher_momentum": last.teacher_momentum,
              "images_per_s": round(run.images / run.seconds, 1)}
    if settings.loss == "cross_entropy":  # the others have no such parts
        parts = torch.stack([part.mean(dim=0) for part in run.metrics.tensor_split(min(20, batches.steps))])
        record |= {"train_entropy": entropy, "train_kl": kl, "entropy_curve": parts[:, 1].tolist(),
                   "kl_curve": parts[:, 2].tolist()}
    run.epoch, run.images, run.seconds, run.metrics = run.epoch + 1, 0, 0.0, run.metrics[:0]
    return record


def save(run: RunState, settings: Settings, world: World) -> None:
    """Write log.txt and the checkpoint, and that to be kept; returns when it is done in all processes.

    checkpoint.pth comes last: a run killed before it goes on from the old one, and writes all the others again.
    """
    if settings.loss == "infonce":  # whose batch normalisations are each process's own
        for network in (run.student, run.teacher):
            batch_norm.average_buffers(network, world)
    if world.is_main:
        output = Path(settings.output_dir)
        report.write_log(output / "log.txt", run.history)
        for name in (*report.kept_name(run, settings.saveckp_freq), "checkpoint.pth"):
            save_run(output / name, run, settings)
    world.wait()


def train(settings: Settings, world: World, signals: list[int]) -> None:
    """The whole run: epochs, evaluations, log, checkpoints, and the report at the end."""
    say = tqdm.write if world.is_main else lambda line: None
    with world.main_first(settings.download):
        images, val = read_images(settings, world)
    loader, batches = make_loader(images, settings, world)
    split = knn_split(images, val, settings.knn_images)
    run = start_run(settings, world)
    ddp_student = distribute(run, settings, world)
    say(f"{len(images)} images, {batches.steps} steps of {batches.images_per_step} an epoch; "
        + (f"K = {settings.out_dim}, ln K = {math.log(settings.out_dim):.4f}" if settings.loss == "cross_entropy" else
           f"{settings.out_dim} outputs")
        + ("" if split else "; no labels, so no k-NN on the way"))

    if not run.history:
        run.history.append({"epoch": -1})
    if split and due_for_knn(run, settings):
        evaluate(run, split, settings, world, loader.num_workers)
    save(run, settings, world)
    per_epoch = batches.steps * batches.images_per_step
    with tqdm(total=settings.epochs * per_epoch, initial=run.epoch * per_epoch + run.images, unit="img",
              disable=not world.is_main) as bar:
        while run.epoch < settings.epochs:
            train_epoch(run, ddp_student, loader, batches, settings, world, signals, bar)
            if world.any(bool(signals)):
                save(run, settings, world)
                say(f"stopped after {run.epoch} epochs and {run.images} images; the same command goes on there")
                sys.exit(128 + (signals or [signal.SIGTERM])[0])
            run.history.append(epoch_record(run, settings, batches))
            if split and due_for_knn(run, settings):
                save(run, settings, world)  # the evaluation may take long
                evaluate(run, split, settings, world, loader.num_workers)
            save(run, settings, world)
            say(report.line(run.history[-1], settings.epochs, settings.out_dim))
    if world.is_main:
        untrained = make_teacher(build_student(settings)).backbone.to(world.device)
        print(report.finish(Path(settings.output_dir), run, untrained, val or images, settings, world))


def main(argv: list[str] | None = None) -> None:
    with errors_in_one_line():
        settings = parse_settings(argv)
        with (hardware.start(settings.device, settings.precision, settings.patience) as world,
              hardware.stop_signals() as signals,
              claimed(Path(settings.output_dir)) if world.is_main else nullcontext()):
            train(settings, world, signals)


if __name__ == "__main__":
    main()
