"""The state of a run: built from the settings, saved, and loaded again bit for bit.

No random generator is part of it: each step and each image seeds its own (runtime/sampling.py).
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from head import DINOHead
from loss import DINOLoss
from multicrop import MultiCropNetwork
from optimizer import make_optimizer
from runtime.batch_norm import synchronise_batch_norms
from runtime.commandline import InputError, brief, write_whole
from runtime.hardware import World
from settings import Settings, check, marked, written
from teacher import make_teacher
from training.ablated import refuse_other_head, refuse_other_method
from training.averages import load_averages
from training.backbone import build_backbone
from training.checkpoint import load_strictly, read_checkpoint, save_checkpoint
from training.cuda_graph import graph_step
from training.half import scaled_step
from training.start import START, load_center, read_start
from training.weights import checkpoint_args

FIX = "the last checkpoint is untouched; continue from it with a lower --lr, or --precision fp32"
PATHS = ("data_path", "init_from", "pretrained_weights")  # may be written in two ways


@dataclass
class RunState:
    """Networks, loss with its center and optimizer, and how far the run is."""

    student: MultiCropNetwork
    teacher: MultiCropNetwork
    dino_loss: DINOLoss
    optimizer: torch.optim.Optimizer
    epoch: int = 0  # completed epochs
    images_done: int = 0  # of the unfinished epoch, in all processes
    metrics: Tensor = field(default_factory=lambda: torch.zeros(0, 3))  # its loss, entropy, KL
    seconds: float = 0.0  # spent on its steps
    # the lines of log.txt: the baselines, then one for each completed epoch
    history: list[dict] = field(default_factory=lambda: [{"epoch": -1}])
    images_per_step: int = 0  # of all processes
    scaler: GradScaler = field(default_factory=partial(GradScaler, enabled=False))  # on in fp16


def make_head(settings: Settings, embed_dim: int) -> nn.Module:
    """Return the head of Fig. 9: features (B, D) -> logits (B, K)."""
    return DINOHead(
        embed_dim,
        settings.out_dim,
        nlayers=settings.head_nlayers,
        hidden_dim=settings.head_hidden_dim,
        bottleneck_dim=settings.head_bottleneck_dim,
        use_bn=settings.use_bn_in_head,
        norm_last_layer=settings.norm_last_layer,
        init_std=settings.init_std,
    )


def make_backbone(settings: Settings, img_size: int = 0) -> nn.Module:
    """Return the network of --arch: images (B, 3, S, S) -> features (B, D).

    img_size: pixels of the images whose grid has positions; 0: the global crops'.
    """
    return build_backbone(
        settings.arch,
        settings.patch_size,
        img_size or settings.global_crops_size,
        settings.num_heads,
        drop_path_rate=settings.drop_path_rate,
        init_std=settings.init_std,
    )


def make_loss(settings: Settings) -> nn.Module:
    """Return the loss of Eq. 1 to 3, with its center at 0."""
    return DINOLoss(
        settings.out_dim,
        student_temp=settings.student_temp,
        center_momentum=settings.center_momentum,
    )


def build_student(
    settings: Settings, make_head=make_head, make_backbone=make_backbone
) -> MultiCropNetwork:
    """Return a student with fresh weights from the seed, or with those of --init_from."""
    torch.manual_seed(settings.seed)
    img_size = 0
    if settings.init_from:
        weights, img_size = read_start(settings)

    backbone = make_backbone(settings, img_size)
    head = make_head(settings, backbone.embed_dim)
    if settings.init_from:
        load_strictly(backbone, weights.backbone, settings.init_from)
        if weights.head:
            refuse_other_head(weights.flags, settings, settings.init_from)
            fix = "give the file's --out_dim and head, or --init_head false for a fresh one"
            load_strictly(head, weights.head, settings.init_from, fix)
    return MultiCropNetwork(backbone, head)


def start_run(
    settings: Settings,
    world: World,
    make_head=make_head,
    make_backbone=make_backbone,
    make_loss=make_loss,
) -> RunState:
    """Return a fresh run; the teacher has the student's weights, the center is 0.

    The other arguments take the place of the functions above of these names.
    """
    student = build_student(settings, make_head, make_backbone)
    if world.size > 1:
        student = synchronise_batch_norms(student, world)
    student = student.to(world.device)
    return RunState(
        student,
        make_teacher(student),
        make_loss(settings).to(world.device),
        make_optimizer(settings.optimizer, student),
    )


@contextmanager
def claimed(folder: Path, world: World) -> Iterator[None]:
    """Lock the output folder; raises InputError for a file, and while another training has it.

    Two trainings would write over each other's checkpoints. Only the main process writes.
    """
    if not world.is_main:
        yield
        return
    if os.path.isfile(folder):  # False for a name too long, which saving reports
        raise InputError(f"--output_dir {str(folder)!r} is a file: choose a folder")
    try:
        import fcntl

        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except (ImportError, OSError):  # Windows has no such locks; a read-only folder fails at saving
        yield
        return
    with lock:
        try:
            # unlike flock, no worker of the loader inherits it
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise InputError(
                f"another training is at work in {str(folder)!r}: wait for its end, or choose "
                "another --output_dir"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def first_bad(named: Iterator[tuple[str, Tensor]]) -> str:
    """Return the name of the first tensor that holds NaN or infinity, or ""."""
    for name, tensor in named:
        if not tensor.isfinite().all():
            return name
    return ""


def save_run(path: Path, run: RunState, settings: Settings) -> None:
    """Write the whole state, with the settings as a plain dict under "args".

    Raises InputError if a weight or the center is not finite.
    """
    state = {}
    for one in dataclasses.fields(run):
        value = getattr(run, one.name)
        if hasattr(value, "state_dict"):
            value = value.state_dict()
        state[one.name] = value

    for part in ("student", "teacher", "dino_loss"):
        bad = first_bad(state[part].items())
        if bad:
            after = f"after {run.epoch} epochs and {run.images_done} images"
            raise InputError(f"{part}.{bad} is not finite {after}: {FIX}")
    save_checkpoint(path, state | {"args": dataclasses.asdict(settings)})


def save(run: RunState, settings: Settings, world: World, before_save=None) -> None:
    """Write log.txt and the checkpoints; returns when that is done, in all processes.

    checkpoint.pth comes last. A run killed before it continues from the old one, and writes the
    other files again. before_save(run, world) is called first, in all processes.
    """
    if before_save:
        before_save(run, world)
    if world.is_main:
        output = Path(settings.output_dir)
        write_log(output / "log.txt", run.history)
        if settings.init_from and run.epoch == 0 and run.images_done == 0:
            save_run(output / START, run, settings)
        every = settings.saveckp_freq
        if every and run.epoch and not run.images_done and run.epoch % every == 0:
            save_run(output / f"checkpoint{run.epoch:04d}.pth", run, settings)
        save_run(output / "checkpoint.pth", run, settings)
    world.wait()


def write_log(path: Path, history: list[dict]) -> None:
    """Write log.txt: a JSON object an epoch; the first line, epoch -1, has the baselines."""
    lines = [json.dumps(record) + "\n" for record in history]
    write_whole(path, lambda part: part.write_text("".join(lines)))


def keep_choices(settings: Settings) -> None:
    """Take over what the run to continue found by itself: --precision, --in_memory, --levels."""
    path = Path(settings.output_dir, "checkpoint.pth")
    if not os.path.isfile(path):  # also where the name is too long for a file
        return
    args = checkpoint_args(read_checkpoint(path), path)
    if settings.precision == "auto":
        settings.precision = args.get("precision", "auto")
    if settings.in_memory == "auto":
        settings.in_memory = args.get("in_memory", "false")  # older runs had a loader
    if not any(settings.levels):
        settings.levels = args.get("levels", settings.levels)
    check(settings)


def begin(path: Path, run: RunState, settings: Settings, world: World) -> str:
    """Fill a fresh run from its checkpoint, or from --init_from; return a line about it, or ""."""
    if world.all_see(path):
        return load_run(path, run, settings)
    if not settings.init_from:
        return ""
    return load_center(run.student, run.dino_loss, settings)


def prepare_step(train_step: Callable, run: RunState, settings: Settings, world: World) -> Callable:
    """Return train_step, or one with its arguments: as a CUDA graph, or in fp16.

    In fp16 the run gets the scaler that this one uses.
    """
    if settings.cuda_graph:
        return graph_step(train_step, run.optimizer, settings, world)
    if world.dtype != torch.float16:
        return train_step
    run.scaler = GradScaler(world.device.type)
    return scaled_step(train_step, run.scaler)


def load_run(path: Path, run: RunState, settings: Settings) -> str:
    """Fill the run from a checkpoint; return a line that says where it continues.

    The line also names the settings that are new.
    Raises InputError if the file is of another network, method or program.
    """
    checkpoint = read_checkpoint(path)
    for older in ("pictures", "images"):  # what older files call it
        if older in checkpoint:
            checkpoint["images_done"] = checkpoint.pop(older)
    changed = changed_settings(checkpoint_args(checkpoint, path), settings, path)
    other = "choose another --output_dir, or start from its weights with --init_from"

    for part in ("student", "teacher", "dino_loss"):
        if part not in checkpoint:
            raise InputError(f"{str(path)!r} is not a run of this program: {other}")
        load_strictly(getattr(run, part), checkpoint[part], path, other)
    try:
        load_averages(run.optimizer, checkpoint["optimizer"]["state"])
        run.epoch = int(checkpoint["epoch"])
        run.images_done = int(checkpoint["images_done"])
        run.metrics = checkpoint["metrics"].view(-1, 3)
        run.seconds = float(checkpoint["seconds"])
        run.history = list(checkpoint["history"])
        if checkpoint.get("scaler"):  # of a run in fp16
            run.scaler.load_state_dict(checkpoint["scaler"])
        if len(run.history) != run.epoch + 1:  # one line for each epoch, and the baselines'
            raise ValueError
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        raise InputError(f"{str(path)!r} is not a run of this program: {other}") from None

    if changed and run.epoch >= settings.epochs:
        raise InputError(
            f"{str(path)!r} is finished, and was made with another --{min(changed)}: choose "
            "another --output_dir, or more --epochs"
        )
    place = f"after epoch {run.epoch}"
    if run.images_done:
        place = f"in epoch {run.epoch + 1}, after {run.images_done} of its images"
    line = f"continuing {path} {place}"
    if run.epoch >= settings.epochs:
        line = f"{path} is finished: more --epochs continue it"
    if changed:
        line += f"; settings changed since: {', '.join(changed.values())}"
    before = checkpoint.get("images_per_step") or run.images_per_step  # older files lack it
    if before != run.images_per_step:
        line += (
            f"; a step has {run.images_per_step} images, before {before}, and the learning rate "
            f"scales with them: {run.images_per_step / before:.3g} times what it was"
        )
    return line


def same_setting(name: str, old: object, new: object) -> bool:
    """Return whether a flag has the same value; a path may be written differently."""
    if name in PATHS and old and new:
        return Path(str(old)).resolve() == Path(new).resolve()
    return old == new


def changed_settings(old: dict, settings: Settings, path: Path) -> dict[str, str]:
    """Return a line for each setting that differs from the file's flags, but for the quiet ones.

    Raises InputError for one that is marked fixed, and for the run of another method.
    """
    refuse_other_method(old, settings, path)
    new = dataclasses.asdict(settings)
    changed = {}
    defaults = dataclasses.asdict(type(settings)())  # older files lack the newer settings
    quiet = marked(type(settings), "quiet")
    for name, value in new.items():
        was = old.get(name, defaults[name])
        if name not in quiet and not same_setting(name, was, value):
            changed[name] = f"{name} {written(value)} (before: {written(was)})"

    for name in marked(type(settings), "fixed"):
        if name in changed:
            was = brief(old.get(name, defaults[name]))
            raise InputError(
                f"{str(path)!r} was made with --{name} {was}, not {new[name]}: choose another "
                "--output_dir, or the old value"
            )
    return changed
