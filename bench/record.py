r"""Train on images that stay on the device, with crops made there; print JSON lines.

    python -m bench.record --data_path imagenette/ --limit 500 --preset vits16 --epochs 85 \
        --local_crops_number 6 --batch_size_per_gpu 128 --lr 0.001 --min_lr 1e-6 --clip_grad 3 \
        --precision auto --output_dir runs/record

--data_path holds train/ and val/, with class folders. The flags are train.py's, and three more.
Crops, step, schedules, networks and k-NN are train.py's too. On CUDA the step, crops apart, is
one CUDA graph.
At the end the teacher's backbone is saved as teacher.pth in --output_dir.

docs/log.md has what was measured with an earlier form, whose crops were part of the graph
(2026-11-26).
There is one process, no continuing, and no checkpoint on the way.
So the flags about loading, checkpoints, the log and --knn_every change nothing.

Shapes: n images of H x H pixels, kept as uint8 (n, 3, H, H); B of them are a step's.
"""

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import resize

import train
from bench import measure
from data import Images, knn_split, open_images
from features import EvaluationView, LabelledFeatures, Pixels, knn_accuracies
from optimizer import parameter_groups
from runtime import hardware
from runtime.commandline import InputError, errors_in_one_line
from runtime.hardware import World
from runtime.sampling import CropsInMemory, EpochBatches
from settings import Settings, parse_settings, refuse, setting
from teacher import update_teacher
from train import Schedules, schedules, set_schedules, train_step
from training.checkpoint import save_checkpoint
from training.inputs import make_multicrop
from training.run_state import RunState, start_run

WARMUP_STEPS = 4  # before a capture: libraries and the optimizer allocate in their first steps


@dataclass
class RecordSettings(Settings):
    """The settings of train.py, and three of the record."""

    limit: float = setting(500.0, "seconds after which no new epoch begins", above=0)
    every: int = setting(10, "epochs between two k-NN evaluations", at_least=1)
    side: int = setting(160, "pixels of the square images that the device keeps", at_least=1)


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
        with world.autocast():
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


@torch.no_grad()
def clip_at_once(student: nn.Module, max_norm: float) -> Tensor:
    """Do what optimizer.clip_gradients does, with one kernel for many tensors."""
    gradients = [param.grad for param in student.parameters() if param.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if max_norm:
        factors = (max_norm / (norms + 1e-6)).clamp(max=1)
        torch._foreach_mul_(gradients, factors.unbind())
    return norms.max()


@torch.no_grad()
def update_teacher_at_once(student: nn.Module, teacher: nn.Module, momentum: Tensor) -> None:
    """Do what teacher.update_teacher does, with one kernel for many tensors."""
    student_params = dict(student.named_parameters())
    theirs = []
    ours = []
    for name, teacher_param in teacher.named_parameters():
        theirs.append(teacher_param)
        ours.append(student_params[name])
    torch._foreach_mul_(theirs, momentum)
    torch._foreach_add_(theirs, torch._foreach_mul(ours, 1 - momentum))


class TensorAdamW(torch.optim.AdamW):
    """AdamW whose learning rate and weight decay are tensors on the device.

    A captured graph would keep a float as it was. torch's takes the rate as a tensor, not the
    decay, so the decay is done here.
    """

    def __init__(self, groups: list[dict], lr: Tensor, weight_decay: Tensor):
        super().__init__(groups, lr=lr, weight_decay=0.0, fused=True, capturable=True)
        self.lr = lr
        self.weight_decay = weight_decay

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            if group["decays"]:
                moving = [param for param in group["params"] if param.grad is not None]
                # decoupled: w <- w - lr decay w, before Adam's own step
                torch._foreach_mul_(moving, 1 - self.lr * self.weight_decay)
        super().step()


class EagerStep:
    """A step on V crops (B, 3, S, S); returns train_step's metrics (4,)."""

    def __init__(self, run: RunState, settings: Settings, world: World):
        self.run = run
        self.settings = settings
        self.world = world

    def __call__(self, crops: list[Tensor], now: Schedules) -> Tensor:
        set_schedules(self.run.optimizer, now)
        return self.train(crops, now, update_teacher)

    def train(self, crops: list[Tensor], now: Schedules, follow: Callable) -> Tensor:
        run = self.run
        return train_step(
            run.student, run.teacher, run.dino_loss, run.optimizer,
            [crops], now, self.settings, self.world, follow,
        )


class GraphStep(EagerStep):
    """The same step as one CUDA graph: the processor launches it as a whole."""

    def __init__(self, run: RunState, settings: Settings, world: World):
        super().__init__(run, settings, world)
        device = world.device
        # what a captured step reads, and what each step writes anew
        self.crops: list[Tensor] = []
        lr, weight_decay, momentum, temp = torch.zeros(4, device=device).unbind()
        self.now = Schedules(lr, weight_decay, momentum, temp)
        run.optimizer = TensorAdamW(parameter_groups(run.student), lr, weight_decay)
        train.clip_gradients = clip_at_once
        self.warmed_up = {True: 0, False: 0}  # steps, with the last layer frozen and not
        self.graphs = {}

    def write_inputs(self, crops: list[Tensor], now: Schedules) -> None:
        """Put a step's crops and values where the captured step reads them."""
        if not self.crops:
            self.crops = [torch.empty_like(crop) for crop in crops]
        for place, crop in zip(self.crops, crops, strict=True):
            place.copy_(crop)
        for tensor, value in zip(self.now[:4], now[:4]):
            tensor.fill_(value)

    def __call__(self, crops: list[Tensor], now: Schedules) -> Tensor:
        self.write_inputs(crops, now)
        frozen = now.last_layer_frozen  # the two differ in which gradients there are
        if self.warmed_up[frozen] < WARMUP_STEPS:
            self.warmed_up[frozen] += 1
            return self.warm_up(frozen)
        if frozen not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # nothing is computed yet
                metrics = self.captured(frozen)
            self.graphs[frozen] = graph, metrics
        graph, metrics = self.graphs[frozen]
        graph.replay()
        return metrics.clone()  # the next replay writes there again

    def captured(self, frozen: bool) -> Tensor:
        """Make a step from the tensors."""
        now = self.now._replace(last_layer_frozen=frozen)
        return self.train(self.crops, now, update_teacher_at_once)

    def warm_up(self, frozen: bool) -> Tensor:
        """Make a step on a stream of its own, as captures want it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            metrics = self.captured(frozen)
        torch.cuda.current_stream().wait_stream(stream)
        return metrics.clone()


def compile_each_shape(run: RunState) -> None:
    """Compile blocks and loss, with a graph for each shape.

    By default the second shape makes one dynamic graph, which is slower (docs/log.md).
    """
    torch._dynamo.config.cache_size_limit = 64  # two sizes of crops, training or not
    for network in (run.student, run.teacher):
        blocks = getattr(network.backbone, "blocks", [])  # a convnet has none
        for block in blocks[:-1]:  # the last one computes [CLS] alone
            block.compile(dynamic=False)
    run.dino_loss.compile(dynamic=False)


def make_step(run: RunState, settings: Settings, world: World) -> EagerStep:
    """Return the step for this device."""
    if world.device.type != "cuda":
        return EagerStep(run, settings, world)
    torch.set_float32_matmul_precision("high")  # what is left in fp32: TF32
    if settings.compile != "false":
        compile_each_shape(run)
    return GraphStep(run, settings, world)


def require_supported(settings: Settings, world: World) -> None:
    """Raise InputError for what a run of train.py has and this one has not."""
    if world.size > 1:
        raise InputError("the record runs in one process: start it with python, not torchrun")
    if settings.accumulate > 1:
        refuse(settings, "accumulate", "is for train.py: leave it out")
    if settings.precision == "fp16":
        refuse(settings, "precision", "is for train.py, which scales its loss: take bf16")
    if world.device.type == "cuda" and settings.optimizer != "adamw":
        refuse(settings, "optimizer", "has no CUDA graph here: take adamw")


def record(settings: RecordSettings, world: World) -> Iterator[dict]:
    """Train and yield the rows: the start, each epoch, the end."""
    require_supported(settings, world)
    device = world.device
    train_part, test_part = load(settings, device)
    knn = Knn(train_part, test_part, make_view(settings, device), world)
    run = start_run(settings, world)
    yield measure.machine(world) | {
        "images": len(train_part.pixels),
        "test_images": len(test_part.pixels),
        "knn_pixels": knn.accuracy(Pixels()),
        "knn_untrained": knn.accuracy(run.teacher.backbone),
        "settings": asdict(settings),
    }

    one_step = make_step(run, settings, world)
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
            now = schedules(settings, epoch * batches.steps + step, batches.steps, B)
            metrics.append(one_step(views, now))

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
