"""How fast each part is, beside a plain textbook version of it (bench/plain.py), in this machine's own numbers.

    python -m bench                                      # ViT-S/16, 2 x 224 + 8 x 96, K = 65536, batch 4
    python -m bench --parts step memory --arch vit_tiny --patch_size 4 --precision bf16 --json

The two versions of a part take turns in one process, so that a drifting machine treats them alike; what is printed are
medians over the turns, and "plain / ours" is the median of the turns' ratios: of times, work or memory, so above 1 ours
needs less. Two turns, all that slow parts get, tell little on a busy machine: raise --seconds.
A step's work is counted on uncompiled networks, and its speed compared with the rate at which this machine, in the same
turns, multiplies large square matrices of the same type. Memory is what two steps take in a fresh process, networks
included and imports not. `python -m ablations patch_size` and `crops` show how a step's cost grows.
"""
import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_pil_image

from bench import measure
from bench import step as bench_step
from bench.plain import PlainCrops, PlainImages, PlainLoss, plain_knn, plain_update_teacher
from bench.step import VALUES, make_ours, make_plain, random_crops, step_in_parts
from data import Images, decode, open_images
from eval_knn import knn_votes, nearest_neighbours
from loss import DINOLoss
from multicrop import MultiCrop
from runtime import hardware
from runtime.commandline import CommandLine, errors_in_one_line
from runtime.creatures import make_creatures
from runtime.hardware import World
from settings import Settings
from teacher import make_teacher, update_teacher
from training.inputs import make_loader
from training.run_state import build_student


class Bench(NamedTuple):
    """What every part is given; files: the images for the parts that read some."""

    flags: argparse.Namespace
    settings: Settings
    world: World
    files: list[Path]


def compare(bench: Bench, ours: Callable, plain: Callable, *others: Callable) -> list[list[float]]:
    """The seconds of each, in turn, as often as --turns and --seconds say."""
    return measure.in_turn([ours, plain, *others], bench.flags.turns, bench.flags.seconds, bench.world.device)


def time_row(part: str, times: list[list[float]], images: int = 0, **more) -> dict:
    """Turns of (seconds of ours, of plain, of others) -> what is told of them; images: how many each took."""
    ours, plain = (median(turn[i] for turn in times) for i in (0, 1))
    speeds = {"images_per_s": images / ours, "plain_images_per_s": images / plain} if images else {}
    return {"part": part, "unit": "ms", "ours": 1000 * ours, "plain": 1000 * plain,
            "ratio": median(turn[1] / turn[0] for turn in times), "measured": len(times), **speeds, **more}


def make_crops(settings: Settings) -> tuple[MultiCrop, PlainCrops]:
    """Both ways to the same number of crops of the same sizes."""
    large, small, number = settings.global_crops_size, settings.local_crops_size, settings.local_crops_number
    return MultiCrop(large, small, local_number=number), PlainCrops(large, small, number)


def time_crops(bench: Bench) -> Iterator[dict]:
    """Decode the first image and make its crops, on one core."""
    (ours, plain), file = make_crops(bench.settings), bench.files[0]
    torch.set_num_threads(1)
    yield time_row("crops", compare(bench, lambda: ours(decode(file)), lambda: plain(Image.open(file).convert("RGB"))),
                   images=1)


def make_loaders(bench: Bench, most: int) -> tuple[DataLoader, DataLoader]:
    """Ours, as train.py makes it, and the plain one: the same files, batches and workers, 2 ... `most` batches."""
    flags, settings, world, files = bench
    workers = hardware.share_cores(flags.num_workers, world.device)
    if flags.threads:
        torch.set_num_threads(flags.threads)
    count = settings.batch_size_per_gpu * max(2, min(most, 8 * workers))
    files = (files * (1 + count // len(files)))[:count]
    ours, _ = make_loader(Images(files), replace(settings, num_workers=workers), world)
    return ours, DataLoader(PlainImages(files, make_crops(settings)[1]), settings.batch_size_per_gpu, shuffle=True,
                            num_workers=workers, pin_memory=world.device.type == "cuda", drop_last=True,
                            persistent_workers=workers > 0)


def run_through(loader: DataLoader, step: Callable, world: World) -> None:
    """One pass over the loader, as an epoch makes it."""
    for crops in loader:
        step([crop.to(world.device, non_blocking=True) for crop in crops])


def per_batch(loader_times: list[list[float]], batches: int) -> list[list[float]]:
    """Seconds of passes -> seconds of batches."""
    return [[time / batches for time in turn] for turn in loader_times]


def time_loader(bench: Bench) -> Iterator[dict]:
    """Batches from the loader alone, on the device, with workers that have started already."""
    ours, plain = make_loaders(bench, 32)
    works = [lambda loader=loader: run_through(loader, len, bench.world) for loader in (ours, plain)]
    yield time_row("loader", per_batch(compare(bench, *works), len(ours)), bench.flags.batch_size,
                   workers=ours.num_workers)


def time_end_to_end(bench: Bench) -> Iterator[dict]:
    """Loader and step together: what a training on files does."""
    settings, world = bench.settings, bench.world
    versions, crops = (make_ours(settings, world), make_plain(settings, world)), random_crops(settings, world)
    for version in versions:
        version.step(crops)
    most = bench.flags.seconds / 2 / measure.seconds(lambda: versions[0].step(crops), world.device)
    loaders = make_loaders(bench, int(most))
    works = [lambda loader=loader, version=version: run_through(loader, version.step, world)
             for loader, version in zip(loaders, versions, strict=True)]
    yield time_row("end to end", per_batch(compare(bench, *works), len(loaders[0])), bench.flags.batch_size,
                   workers=loaders[0].num_workers)


def time_loss(bench: Bench) -> Iterator[dict]:
    """Forward and backward of the loss for a batch."""
    settings, world = bench.settings, bench.world
    B, K, crops = settings.batch_size_per_gpu, settings.out_dim, 2 + settings.local_crops_number
    student = torch.randn(crops * B, K, device=world.device).requires_grad_()
    teacher = torch.randn(2 * B, K, device=world.device) / 10
    losses = [kind(K).to(world.device) for kind in (DINOLoss, PlainLoss)]
    hardware.compile_hot_path(losses[:1], settings.compile, world)

    def forward_and_backward(dino_loss: nn.Module) -> None:
        student.grad = None
        dino_loss(student, teacher, VALUES.teacher_temp).backward()

    yield time_row("loss", compare(bench, *(lambda each=each: forward_and_backward(each) for each in losses)))


def time_ema(bench: Bench) -> Iterator[dict]:
    """The teacher's average over backbone and head."""
    student = build_student(bench.settings).to(bench.world.device)
    teacher, momentum = make_teacher(student), VALUES.teacher_momentum
    yield time_row("EMA", compare(bench, lambda: update_teacher(student, teacher, momentum),
                                  lambda: plain_update_teacher(student, teacher, momentum)))


def time_knn(bench: Bench) -> Iterator[dict]:
    """Votes for 2,000 images among 50,000 of 1,000 classes, 384 features each, on the CPU."""
    train_features, test_features = torch.randn(50_000, 384), torch.randn(2_000, 384)
    labels = torch.randint(1000, (50_000,))

    def ours() -> Tensor:
        cosines, nearest = nearest_neighbours(train_features, test_features, 20)
        return knn_votes(cosines, labels[nearest], 1000)

    yield time_row("k-NN", compare(bench, ours, lambda: plain_knn(train_features, labels, test_features, 1000)))


def measure_step(bench: Bench) -> Iterator[dict]:
    """A whole step on crops that are there already; its work; its parts."""
    settings, world = bench.settings, bench.world
    crops, eager = random_crops(settings, world), replace(settings, compile="false")  # compiled products are not seen
    work = [measure.flops(lambda make=make: make(eager, world).step(crops)) for make in (make_ours, make_plain)]
    ours, plain = make_ours(settings, world), make_plain(settings, world)
    matmul, matmul_flops = measure.square_matmul(world.device, world.dtype)
    times = compare(bench, lambda: ours.step(crops), lambda: plain.step(crops), matmul)
    yield time_row("step", times, settings.batch_size_per_gpu)

    rate = matmul_flops / median(turn[2] for turn in times)
    shares = [100 * flops / median(turn[i] for turn in times) / rate for i, flops in enumerate(work)]
    yield {"part": "work", "unit": "GFLOP", "ours": work[0] / 1e9, "plain": work[1] / 1e9, "ratio": work[1] / work[0],
           "gemm_share": shares[0], "plain_gemm_share": shares[1], "gemm_gflop_per_s": rate / 1e9}

    both = [[step_in_parts(version, crops, world) for version in (ours, plain)]
            for _ in measure.turns(bench.flags.turns, bench.flags.seconds)]
    whole = median(sum(laps.values()) for laps, _ in both)
    for name in both[0][0]:
        row = time_row(f"  {name}", [[laps[name] for laps in turn] for turn in both])
        yield row | {"step_share": row["ours"] / whole / 10}


def measure_memory(bench: Bench) -> Iterator[dict]:
    """The peak of two steps, each version in a process of its own."""
    ours, plain = (measure.in_fresh_process(bench_step.cost_of_steps, make, bench.settings, bench.world,
                                            torch.get_num_threads()) for make in (make_ours, make_plain))
    yield {"part": "memory", "unit": "MiB", "ours": ours["mib"], "plain": plain["mib"],
           "ratio": ours["mib"] and plain["mib"] / ours["mib"]}


PARTS = {"crops": time_crops, "loader": time_loader, "loss": time_loss, "ema": time_ema, "knn": time_knn,
         "step": measure_step, "memory": measure_memory, "end_to_end": time_end_to_end}
NOTES = (("images_per_s", "{:.2f} images/s, plain {:.2f}"), ("step_share", "{:.1f} % of our step"),
         ("gemm_share", "{:.0f} % of the GEMM rate, plain {:.0f} %"), ("gemm_gflop_per_s", "GEMM: {:.0f} GFLOP/s"))


def line(row: dict) -> str:
    """A row of the table."""
    if row["ours"] is None:
        return f"{row['part']:<14}  not told by this system"
    notes = [f"{row['measured']} turns"] if "measured" in row else []
    notes += [text.format(row[key], row.get(f"plain_{key}")) for key, text in NOTES if key in row]
    if "workers" in row:
        notes.append(f"workers: {row['workers']}, threads: {row['threads']}")
    return (f"{row['part']:<14}{row['ours']:>10.1f}{row['plain']:>10.1f} {row['unit']:<6}{row['ratio']:>8.2f}"
            f"   {'; '.join(notes)}").rstrip()


def draw_jpegs(folder: Path) -> list[Path]:
    """Eight images of 400 x 533 pixels, as a photo folder might hold them."""
    for i, image in enumerate(make_creatures(8, side=533).images):
        to_pil_image(image[:, :400]).save(folder / f"{i}.jpg", quality=90)
    return sorted(folder.iterdir())


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line -> flags, still to be checked."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help=f"[{' '.join(PARTS)}]", metavar="PART")
    bench_step.add_flags(parser)
    add("--data_path", default="", help="a folder of images to load; default: eight drawn JPEGs of 400 x 533 pixels")
    add("--num_workers", type=int, default=-1, help="of loader and end_to_end; -1: as many as train.py takes [-1]")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    with errors_in_one_line(), measure.full_memory_in_one_line(), tempfile.TemporaryDirectory() as folder:
        flags = parse_flags(argv)
        settings = bench_step.step_settings(flags)
        with hardware.start(flags.device, flags.precision) as world:
            files = open_images(flags.data_path)[0].source if flags.data_path else draw_jpegs(Path(folder))
            threads = torch.get_num_threads()
            machine = measure.machine(world)
            if not flags.json:
                print(bench_step.told(settings, machine))
                print(f"\n{'part':<14}{'ours':>10}{'plain':>10}{'plain / ours':>16}")
            for part in flags.parts:
                torch.set_num_threads(threads)
                for row in PARTS[part](Bench(flags, settings, world, files)):
                    settled = {**row, **vars(flags), **machine, "threads": torch.get_num_threads()}
                    print(json.dumps(settled) if flags.json else line(settled), flush=True)


if __name__ == "__main__":
    main()
