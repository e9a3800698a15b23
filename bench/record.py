r"""Train on images that stay on the device, with crops made there; print JSON lines.

    python -m bench.record --data_path imagenette/ --preset imagenette --epochs 160 --limit 500 \
        --cuda_graph true --output_dir runs/record

--data_path holds train/ and val/, with class folders. The flags are train.py's, and three more.
Crops, step, schedules, networks and k-NN are train.py's too.
At the end the teacher's backbone is saved as teacher.pth in --output_dir.

Departure: the device keeps each image stretched to a square of --side pixels, and crops are cut
from that. Published numbers of the recipe have crops of the files as they are.

docs/log.md has what was measured with an earlier form, whose crops were part of the graph, and with
squares of 160 pixels (2026-11-26).
There is one process, no continuing, and no checkpoint on the way.
So the flags about loading, checkpoints, the log and --knn_every change nothing.

Shapes: n images of H x H pixels, kept as uint8 (n, 3, H, H); B of them are a step's.
"""

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import resize

from bench import measure
from data import Images, knn_split, open_images
from features import EvaluationView, LabelledFeatures, Pixels, knn_accuracies
from runtime import hardware
from runtime.commandline import InputError, errors_in_one_line
from runtime.hardware import World
from runtime.sampling import CropsInMemory, EpochBatches, seed_of
from settings import Settings, parse_settings, refuse, setting
from teacher import update_teacher
from train import schedules, set_schedules, train_step
from training.checkpoint import save_checkpoint
from training.inputs import make_multicrop
from training.run_state import RunState, prepare_step, start_run


@dataclass
class RecordSettings(Settings):
    """The settings of train.py, and three of the record."""

    limit: float = setting(500.0, "seconds after which no new epoch begins", above=0)
    every: int = setting(10, "epochs between two k-NN evaluations", at_least=1)
    side: int = setting(256, "pixels of the square images that the device keeps", at_least=1)


class Stored(NamedTuple):
    """Images on the device (n, 3, H, H), uint8, and their labels on the CPU, (n,)."""

    pixels: Tensor
    labels: Tensor


def store(images: Images, side: int, device: torch.device) -> Stored:
    """Decode all images, in threads, and put them on the device."""

    def read(index: int) -> Tensor:
        image, _ = images[index]
        # stretched to a square: one tensor holds all, and nothing is cut off
        return resize(image, [side, side], antialias=True)

    with ThreadPoolExecutor() as pool:
        decoded = list(pool.map(read, range(len(images))))
    return Stored(torch.stack(decoded).to(device), images.labels)


def load(settings: RecordSettings, device: torch.device) -> tuple[Stored, Stored]:
    """Return train and test images; raises InputError where they have no labels."""
    source = (settings.data_path, settings.dataset, settings.download)
    train_images, val_images = open_images(*source, levels=settings.levels)
    split = knn_split(train_images, val_images)
    if split is None:
        refuse(settings, "data_path", "has no labels for k-NN: put the images in class folders")
    train_part, test_part = split
    if len(train_part) < settings.batch_size_per_gpu:
        images = len(train_part)
        refuse(settings, "batch_size_per_gpu", f"is more than the {images} images: lower it")
    return store(train_part, settings.side, device), store(test_part, settings.side, device)


def make_view(settings: Settings, device: torch.device) -> EvaluationView:
    """Return the evaluations' view, for batches on the device."""
    view = EvaluationView(settings.eval_size, settings.eval_crop, settings.mean, settings.std)
    view.mean = view.mean.to(device)
    view.std = view.std.to(device)
    return view


@torch.no_grad()
def features(network: nn.Module, pixels: Tensor, view: EvaluationView, world: World) -> Tensor:
    """Return the network's features of stored images, on the CPU: (n, 3, H, H) -> (n, D)."""
    network.eval()
    found = []
    for batch in pixels.split(256):
        views = view(batch)
        with world.autocast(), torch.compiler.set_stance("force_eager"):
            found.append(network(views).float())
    network.train()  # as make_teacher leaves the teacher too; its paths are all kept
    return torch.cat(found).cpu()


class Knn(NamedTuple):
    """What k-NN is measured on."""

    train: Stored
    test: Stored
    view: EvaluationView
    world: World

    def accuracy(self, network: nn.Module) -> float:
        """Return the top-1 accuracy of k-NN with k = 20, in %."""
        train_features = features(network, self.train.pixels, self.view, self.world)
        test_features = features(network, self.test.pixels, self.view, self.world)
        data = LabelledFeatures(
            train_features, self.train.labels, test_features, self.test.labels
        )
        top1, _ = knn_accuracies(data)[20]
        return round(top1, 2)


def require_supported(settings: Settings, world: World) -> None:
    """Raise InputError for what a run of train.py has and this one has not."""
    if world.size > 1:
        raise InputError("the record runs in one process: start it with python, not torchrun")
    if settings.accumulate > 1:
        refuse(settings, "accumulate", "is for train.py: leave it out")


def record(settings: RecordSettings, world: World) -> Iterator[dict]:
    """Train and yield the rows: the start, each epoch, the end."""
    require_supported(settings, world)
    device = world.device
    train_part, test_part = load(settings, device)
    knn = Knn(train_part, test_part, make_view(settings, device), world)
    run = start_run(settings, world)
    one_step = prepare_step(train_step, run, settings, world)
    hot_path = [run.student.backbone, run.teacher.backbone, run.dino_loss]
    compiled = hardware.compile_hot_path(hot_path, settings.compile, world)
    yield measure.machine(world) | {
        "images": len(train_part.pixels),
        "test_images": len(test_part.pixels),
        "compiled": compiled,
        "knn_pixels": knn.accuracy(Pixels()),
        "knn_untrained": knn.accuracy(run.teacher.backbone),
        "settings": asdict(settings),
    }

    B = settings.batch_size_per_gpu
    images = len(train_part.pixels)
    batches = EpochBatches(images, B, 1, rank=0, world_size=1, seed=settings.seed)
    sides = torch.tensor([[settings.side, settings.side]]).expand(images, -1)
    crops = CropsInMemory(
        train_part.pixels, sides, make_multicrop(settings), batches, settings.seed
    )
    began = measure.now(device)
    for epoch in range(settings.epochs):
        epoch_began = measure.now(device)
        batches.epoch = epoch
        metrics = []
        for step, views in enumerate(crops):
            global_step = epoch * batches.steps + step
            now = schedules(settings, global_step, batches.steps, B)
            set_schedules(run.optimizer, now)
            torch.manual_seed(seed_of(settings.seed, global_step, world.rank))
            metrics.append(
                one_step(
                    run.student, run.teacher, run.dino_loss, run.optimizer,
                    [views], now, settings, world, update_teacher,
                )
            )

        loss, entropy, kl, norm = torch.stack(metrics).mean(dim=0).tolist()
        ended = measure.now(device)
        if not math.isfinite(loss):
            raise InputError(f"the loss of epoch {epoch + 1} is {loss}: lower --lr")
        row = {
            "epoch": epoch + 1,
            "loss": round(loss, 4),
            "entropy": round(entropy, 4),
            "kl": round(kl, 4),
            "gradient_norm": round(norm, 3),
            "images_per_s": round(batches.steps * B / (ended - epoch_began), 1),
        }
        late = ended - began > settings.limit
        last = late or epoch + 1 == settings.epochs
        if last or (epoch + 1) % settings.every == 0:
            row["knn_teacher"] = knn.accuracy(run.teacher.backbone)
            row["knn_student"] = knn.accuracy(run.student.backbone)
        row["seconds"] = round(measure.now(device) - began, 1)
        yield row
        if late:
            break

    path = Path(settings.output_dir) / "teacher.pth"
    save_teacher(path, run, settings)
    yield {"saved": str(path), "peak_mib": measure.peak_mib(device)}


def save_teacher(path: Path, run: RunState, settings: Settings) -> None:
    """Write the teacher's backbone, as the evaluations read it."""
    weights = {}
    for name, value in run.teacher.backbone.state_dict().items():
        weights[f"backbone.{name}"] = value.cpu()
    save_checkpoint(path, {"teacher": weights, "args": asdict(settings)})


def main(argv: list[str] | None = None) -> None:
    with errors_in_one_line(), measure.full_memory_in_one_line():
        settings = parse_settings(argv, RecordSettings)
        with hardware.start(settings.device, settings.precision, settings.patience) as world:
            for row in record(settings, world):
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
