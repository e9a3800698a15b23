"""The state of a run: built from the settings, and saved so that a stopped training ends bit for bit where it would.

No generator is among it: every step and every image seeds its own randomness (see runtime/sampling.py and train.py).
"""
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ablations.byol import SquaredDistance
from ablations.moco import InfoNCE, shuffle_batches
from ablations.variants import SinkhornLoss, VariantHead, remove_predictor
from loss import DINOLoss
from multicrop import MultiCropNetwork
from optimizer import make_optimizer
from runtime import batch_norm
from runtime.commandline import InputError, brief
from runtime.finite import MEND, first_bad
from runtime.hardware import World
from settings import Settings
from teacher import make_teacher
from training.backbone import build_backbone
from training.checkpoint import checkpoint_args, describe, read_checkpoint, save_checkpoint, split_weights
from training.strict import check_flags, is_like, is_number, load_optimizer, load_strictly

MUST_AGREE = ("arch", "patch_size", "num_heads", "out_dim", "head_hidden_dim", "head_bottleneck_dim", "use_bn_in_head",
              "head_nlayers", "head_activation", "head_l2_bottleneck", "predictor", "loss",
              "norm_last_layer", "global_crops_size", "optimizer")  # else the saved tensors do not fit
LOGGED = {"train_loss", "train_lr", "train_wd", "teacher_temp", "teacher_momentum", "images_per_s"}  # of every epoch
MAY_DIFFER = ("preset", "download", "output_dir", "num_workers", "device", "patience")  # not worth a word


@dataclass
class RunState:
    """Networks, loss with its center, optimiser; and how far the run is.

    epoch: epochs completed; images: those of the unfinished epoch that were trained on; metrics: loss, entropy and KL
    of that epoch's steps, (steps, 3); seconds spent on them; history: the lines of log.txt.
    """

    student: MultiCropNetwork
    teacher: MultiCropNetwork
    dino_loss: DINOLoss
    optimizer: torch.optim.Optimizer
    epoch: int = 0
    images: int = 0
    metrics: Tensor = field(default_factory=lambda: torch.zeros(0, 3))
    seconds: float = 0.0
    history: list[dict] = field(default_factory=list)


def build_student(settings: Settings) -> MultiCropNetwork:
    """The student with fresh weights from the seed, or with those of --init_from."""
    torch.manual_seed(settings.seed)
    path, img_size = settings.init_from, settings.global_crops_size
    if path:
        stored = read_checkpoint(path)
        backbone_weights, head_weights = split_weights(stored, "teacher", path)
        check_flags(checkpoint_args(stored), path)
        heads = checkpoint_args(stored).get("num_heads", 0)  # which no shape tells
        if heads != settings.num_heads:
            raise InputError(f"--num_heads {settings.num_heads}, but {str(path)!r} was trained with {heads}: pass "
                             f"--num_heads {heads}")
        img_size = describe(backbone_weights, path).get("img_size", img_size)  # the grid of its positions
    backbone = build_backbone(settings.arch, settings.patch_size, img_size, settings.num_heads,
                              drop_path_rate=settings.drop_path_rate, init_std=settings.init_std)
    head = VariantHead(backbone.embed_dim, settings.out_dim, settings.head_nlayers, settings.head_hidden_dim,
                    settings.head_bottleneck_dim, settings.use_bn_in_head, settings.norm_last_layer, settings.init_std,
                    settings.head_activation, settings.head_l2_bottleneck)
    if path:
        load_strictly(backbone, backbone_weights, path)
        if head_weights:
            load_strictly(head, head_weights, path)
    if settings.predictor:
        head.add_predictor()
    return MultiCropNetwork(backbone, head)


def make_loss(settings: Settings, world: World) -> DINOLoss:
    """Eq. 3, or what Table 7 puts in its place; sums, maxima and keys of all processes come from outside."""
    if settings.loss == "mse":
        return SquaredDistance(settings.out_dim, center_momentum=settings.center_momentum)
    if settings.loss == "infonce":
        return InfoNCE(settings.out_dim, settings.student_temp, settings.queue_length, world)
    if settings.centering != "center":
        iterations = {"batch_softmax": 1, "sinkhorn": 3}[settings.centering]
        return SinkhornLoss(settings.out_dim, settings.student_temp, settings.center_momentum, iterations, world)
    return DINOLoss(settings.out_dim, settings.student_temp, settings.center_momentum)


def start_run(settings: Settings, world: World) -> RunState:
    """Networks, loss and optimiser, on the device: fresh, or where the checkpoint in the output folder left them."""
    student = build_student(settings)
    if settings.loss != "infonce":  # which shuffles the batches instead
        student = batch_norm.synchronise_batch_norms(student, world)
    student = student.to(world.device)
    run = RunState(student, make_teacher(student), make_loss(settings, world).to(world.device),
                   make_optimizer(settings.optimizer, student))
    remove_predictor(run.teacher)
    if settings.loss == "infonce":
        shuffle_batches(run.teacher, world)
    path = Path(settings.output_dir, "checkpoint.pth")
    if world.all_see(path):
        told = load_run(path, run, settings)
        if world.is_main:
            print(told)
    return run


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold the output folder's lock inside, where there are locks; raises InputError while another training has it.

    Two would write over each other's checkpoints.
    """
    try:
        import fcntl
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")
    except (ImportError, OSError):  # Windows; or a folder that cannot be written, which saving tells
        yield
        return
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which no loader's worker inherits, unlike flock
        except (BlockingIOError, PermissionError):
            raise InputError(f"another training is at work in {str(folder)!r}: wait for its end, or choose another "
                             "--output_dir") from None
        except OSError:  # this file system has none
            pass
        yield


def save_run(path: Path, run: RunState, settings: Settings) -> None:
    """Write the whole state, with the settings as a plain dict under "args"; raises InputError if it is not finite."""
    values = {field.name: getattr(run, field.name) for field in dataclasses.fields(run)}
    states = {name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in values.items()}
    bad = first_bad((f"{name}.{key}", tensor) for name in ("student", "teacher", "dino_loss")
                    for key, tensor in states[name].items())
    if bad:
        raise InputError(f"{bad} is not finite after {run.epoch} epochs and {run.images} images: {MEND}")
    save_checkpoint(path, states | {"args": dataclasses.asdict(settings)})


def check_counts(run: RunState, path: Path) -> None:
    """Raise InputError unless a checkpoint's counts and history are those of a run."""
    counts = [isinstance(count, int) and is_number(count) and count >= 0 for count in (run.epoch, run.images)]
    steps = isinstance(run.metrics, Tensor) and run.metrics.shape[1:] == (3,) and is_like(run.metrics, run.metrics[:])
    fits = all(counts) and steps and run.metrics.isfinite().all() and isinstance(run.seconds, float)
    fits = fits and (run.images > 0) == (len(run.metrics) > 0) == (run.seconds > 0)
    records = run.history if isinstance(run.history, list) and all(isinstance(one, dict) for one in run.history) else []
    numbers = all(is_number(number) for one in records for name, value in one.items()
                  for number in (value if isinstance(value, list) and str(name).endswith("_curve") else [value]))
    if not (fits and numbers and len(records) == run.epoch + 1 and all(LOGGED <= one.keys() for one in records[1:])
            and all(one.get("epoch") == epoch for epoch, one in enumerate(records, start=-1))):
        raise InputError(f"{str(path)!r} does not say how far its run is: choose another --output_dir, or start from "
                         "its weights with --init_from")


def load_run(path: Path, run: RunState, settings: Settings) -> str:
    """Fill the run from a checkpoint -> a line that says where it goes on, and which settings are new."""
    checkpoint = read_checkpoint(path)
    if not {field.name for field in dataclasses.fields(run)} | {"args"} <= set(checkpoint):
        raise InputError(f"{str(path)!r} is no run that can be continued: choose another --output_dir, or start from "
                         "its weights with --init_from")
    new = dataclasses.asdict(settings)
    old = dataclasses.asdict(Settings()) | checkpoint_args(checkpoint)  # an older file lacks the newer settings
    changed = {name: value for name, value in new.items() if old.get(name) != value and name not in MAY_DIFFER}
    for name in (*MUST_AGREE, *(["queue_length"] if settings.loss == "infonce" else [])):
        if name in changed:
            raise InputError(f"{str(path)!r} was made with --{name} {brief(old.get(name))}, not {new[name]}: choose "
                             "another --output_dir, or the old value")
    for field_ in dataclasses.fields(run):
        part, value = getattr(run, field_.name), checkpoint[field_.name]
        if isinstance(part, nn.Module):
            load_strictly(part, value, path)
        elif isinstance(part, torch.optim.Optimizer):
            load_optimizer(part, value, path)
        else:
            setattr(run, field_.name, value)
    check_counts(run, path)
    stepped = {param for param in run.student.parameters() if param.requires_grad}
    stepped -= set(run.student.head.last_layer.parameters())  # whose state begins when it is no longer frozen
    if run.epoch + run.images and not stepped <= run.optimizer.state.keys():
        raise InputError(f"{str(path)!r} lacks the optimiser's state of some weights: choose another --output_dir, or "
                         "start from its weights with --init_from")
    if changed and run.epoch >= new["epochs"]:
        raise InputError(f"{str(path)!r} is finished, and was made with another --{min(changed)}: choose another "
                         "--output_dir, or more --epochs")
    told = ", ".join(f"{name} {value}" for name, value in changed.items())
    return (f"continuing {path} after {run.epoch} epochs and {run.images} images"
            + (f"; settings changed since: {told}" if told else ""))
