"""How fast each part of a training is on this machine, beside stock code (bench/plain.py).

    python -m bench                # ViT-S/16, 2 x 224 + 8 x 96, K = 65536, batch 4
    python -m bench --parts step memory --arch vit_tiny --patch_size 4 --precision bf16 --json
    python -m bench --parts step --profile

Both versions of a part take turns in one process, so that a drifting machine treats them alike.
Printed are medians over the turns. plain / ours is the median of the turns' ratios: above 1 ours
needs less. Slow parts get two turns, which say little on a busy machine: raise --seconds.

The step's speed is compared with the rate at which this machine, in the same turns, multiplies
large square matrices (GEMM). Memory is what two steps take in a fresh process, without imports.
End to end is a training on these images, as train.py loads and crops them where they fit in memory.
`python -m ablations patch_size` and `crops` show how a step's cost grows.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.functional import to_pil_image

from bench import measure
from bench import step as bench_step
from bench.plain import PlainCrops, PlainImages, plain_knn, plain_update_teacher
from bench.step import VALUES, cost_of_steps, make_ours, make_plain, random_crops
from data import Images, decode, open_images
from features import knn_votes, nearest_neighbours
from multicrop import MultiCrop
from runtime import hardware
from runtime.commandline import CommandLine, errors_in_one_line
from runtime.creatures import make_creatures
from runtime.crops import padded, shrunk
from runtime.flops import flops
from runtime.hardware import World
from runtime.threads import share_cores
from settings import Settings
from teacher import make_teacher, update_teacher
from training.inputs import make_loader
from training.run_state import build_student


class Bench(NamedTuple):
    """What each part is given."""

    flags: argparse.Namespace
    settings: Settings
    world: World
    files: list[Path]  # the images to load

    def compare(self, *works: Callable) -> list[list[float]]:
        """Return the seconds of each work, turn by turn."""
        flags = self.flags
        return measure.in_turn(list(works), flags.turns, flags.seconds, self.world.device)


def time_row(part: str, times: list[list[float]], images: int = 0) -> dict:
    """Return a row of the table from turns of (seconds of ours, of plain).

    images: how many each of the two took, for the images/s.
    """
    ours = median(turn[0] for turn in times)
    plain = median(turn[1] for turn in times)
    row = {
        "part": part,
        "unit": "ms",
        "ours": 1000 * ours,
        "plain": 1000 * plain,
        "ratio": median(turn[1] / turn[0] for turn in times),
        "measured": len(times),  # turns
    }
    if images:
        row["images_per_s"] = images / ours
        row["plain_images_per_s"] = images / plain
    return row


def make_crops(settings: Settings) -> tuple[MultiCrop, PlainCrops]:
    """Return both ways to the same number of crops of the same sizes."""
    large = settings.global_crops_size
    small = settings.local_crops_size
    number = settings.local_crops_number
    return MultiCrop(large, small, local_number=number), PlainCrops(large, small, number)


def time_crops(bench: Bench) -> Iterator[dict]:
    """Decode the first image and make its crops, on one core."""
    our_crops, plain_crops = make_crops(bench.settings)
    file = bench.files[0]
    torch.set_num_threads(1)

    def ours() -> list[Tensor]:
        return our_crops(decode(file))

    def plain() -> list[Tensor]:
        return plain_crops(Image.open(file).convert("RGB"))

    yield time_row("crops", bench.compare(ours, plain), images=1)


def time_batch(bench: Bench) -> Iterator[dict]:
    """Make the crops of a batch of decoded images at once, on the device; plain: one by one."""
    our_crops, plain_crops = make_crops(bench.settings)
    B = bench.settings.batch_size_per_gpu
    files = [bench.files[i % len(bench.files)] for i in range(B)]
    images = [shrunk(decode(file), 2 * bench.settings.global_crops_size) for file in files]
    pil_images = [to_pil_image(image) for image in images]
    pixels, sides = padded(images)
    pixels = pixels.to(bench.world.device)

    def ours() -> list[Tensor]:
        draws = torch.stack([our_crops.draw() for _ in images])
        return our_crops.batch_views(pixels, sides, draws)

    def plain() -> list[list[Tensor]]:
        return [plain_crops(image) for image in pil_images]

    yield time_row("crops, batch", bench.compare(ours, plain), images=B)


class Loaders(NamedTuple):
    """train.py's loader and a stock one: as many batches, as many workers."""

    ours: Iterable[list[Tensor]]
    plain: DataLoader
    batches: int


def make_loaders(bench: Bench, in_memory: str) -> Loaders:
    """Return loaders of the bench's images; in_memory: as train.py's flag."""
    flags, settings, world, files = bench
    workers = share_cores(settings.num_workers, world.device)
    if flags.threads:
        torch.set_num_threads(flags.threads)  # share_cores may have set them
    batches = max(2, min(32, 8 * workers))
    images = settings.batch_size_per_gpu * batches
    while len(files) < images:
        files = files + files
    files = files[:images]

    loaded = replace(settings, num_workers=workers, in_memory=in_memory)
    with redirect_stdout(sys.stderr):  # what it says is no row
        ours, order = make_loader(Images(files), loaded, world)
    plain = DataLoader(
        PlainImages(files, make_crops(settings)[1]),
        settings.batch_size_per_gpu,
        shuffle=True,
        num_workers=workers,
        pin_memory=world.device.type == "cuda",
        drop_last=True,
        persistent_workers=workers > 0,
    )
    return Loaders(ours, plain, order.steps)


def run_epoch(loader: Iterable[list[Tensor]], world: World, step: Callable = len) -> None:
    """Take all batches to the device, and make a step on each; without a step do nothing."""
    for crops in loader:
        step([crop.to(world.device, non_blocking=True) for crop in crops])


def time_loader(bench: Bench) -> Iterator[dict]:
    """Load a batch from files, by workers that have started already."""
    loaders = make_loaders(bench, in_memory="false")
    times = bench.compare(
        lambda: run_epoch(loaders.ours, bench.world),
        lambda: run_epoch(loaders.plain, bench.world),
    )
    per_batch = [[seconds / loaders.batches for seconds in turn] for turn in times]
    row = time_row("loader", per_batch, bench.settings.batch_size_per_gpu)
    yield row | {"workers": loaders.ours.num_workers}


def time_end_to_end(bench: Bench) -> Iterator[dict]:
    """Load, crop and train; beside it our step alone, on crops that are there already."""
    settings, world = bench.settings, bench.world
    loaders = make_loaders(bench, in_memory="auto")
    crops = random_crops(settings, world)
    ours = make_ours(settings, world)
    plain = make_plain(settings, world)

    def steps_alone() -> None:
        for _ in range(loaders.batches):
            ours.step(crops)

    times = bench.compare(
        lambda: run_epoch(loaders.ours, world, ours.step),
        lambda: run_epoch(loaders.plain, world, plain.step),
        steps_alone,
    )
    per_batch = [[seconds / loaders.batches for seconds in turn] for turn in times]
    step_percent = 100 * median(turn[2] / turn[0] for turn in times)
    row = time_row("end to end", per_batch, settings.batch_size_per_gpu)
    yield row | {"step_percent": step_percent, "workers": loaders.ours.num_workers}


def time_ema(bench: Bench) -> Iterator[dict]:
    """Update the teacher, backbone and head."""
    student = build_student(bench.settings).to(bench.world.device)
    teacher = make_teacher(student)
    momentum = VALUES.teacher_momentum
    times = bench.compare(
        lambda: update_teacher(student, teacher, momentum),
        lambda: plain_update_teacher(student, teacher, momentum),
    )
    yield time_row("EMA", times)


def time_knn(bench: Bench) -> Iterator[dict]:
    """Classify 2,000 images by 50,000 of 1,000 classes, 384 features each, on the CPU."""
    train_features = torch.randn(50_000, 384)
    train_labels = torch.randint(1000, (50_000,))
    test_features = torch.randn(2_000, 384)

    def ours() -> Tensor:
        cosines, nearest = nearest_neighbours(train_features, test_features, 20)
        return knn_votes(cosines, train_labels[nearest], 1000)

    def plain() -> Tensor:
        return plain_knn(train_features, train_labels, test_features, 1000)

    yield time_row("k-NN", bench.compare(ours, plain))


def measure_step(bench: Bench) -> Iterator[dict]:
    """Make a whole step on crops that are there already; count its work."""
    settings, world = bench.settings, bench.world
    crops = random_crops(settings, world)
    ours = make_ours(settings, world)
    plain = make_plain(settings, world)
    matmul, matmul_flops = measure.square_matmul(world.device, world.dtype)
    times = bench.compare(lambda: ours.step(crops), lambda: plain.step(crops), matmul)
    step_row = time_row("step", times, settings.batch_size_per_gpu)
    yield step_row

    # products are not seen that are compiled, or in a graph
    eager = make_ours(replace(settings, compile="false", cuda_graph=False), world)
    work = flops(lambda: eager.step(crops))
    plain_work = flops(lambda: plain.step(crops))
    flops_per_ms = matmul_flops / median(turn[2] for turn in times) / 1000
    yield {
        "part": "work",
        "unit": "GFLOP",
        "ours": work / 1e9,
        "plain": plain_work / 1e9,
        "ratio": plain_work / work,
        "gemm_percent": 100 * work / step_row["ours"] / flops_per_ms,
        "plain_gemm_percent": 100 * plain_work / step_row["plain"] / flops_per_ms,
        "gemm_gflop_per_s": flops_per_ms / 1e6,
    }
    if bench.flags.profile:
        bench_step.print_profile(ours, crops, world)


def measure_memory(bench: Bench) -> Iterator[dict]:
    """Make two steps of each version in a process of its own."""
    peaks = []
    for make in (make_ours, make_plain):
        cost = measure.in_fresh_process(
            cost_of_steps, make, bench.settings, bench.world, torch.get_num_threads()
        )
        peaks.append(cost["mib"])
    ours, plain = peaks
    ratio = None
    if ours is not None:
        ratio = plain / ours
    yield {"part": "memory", "unit": "MiB", "ours": ours, "plain": plain, "ratio": ratio}


PARTS = {
    "crops": time_crops,
    "batch": time_batch,
    "loader": time_loader,
    "step": measure_step,
    "end": time_end_to_end,
    "ema": time_ema,
    "knn": time_knn,
    "memory": measure_memory,
}


def notes(row: dict) -> list[str]:
    """Return what stands behind a row's numbers."""
    found = []
    if "measured" in row:
        found.append(f"{row['measured']} turns")
    if "images_per_s" in row:
        found.append(f"{row['images_per_s']:.2f} images/s, plain {row['plain_images_per_s']:.2f}")
    if "gemm_percent" in row:
        percent, plain_percent = row["gemm_percent"], row["plain_gemm_percent"]
        found.append(f"{percent:.0f} % of the GEMM rate, plain {plain_percent:.0f} %")
        found.append(f"GEMM: {row['gemm_gflop_per_s']:.0f} GFLOP/s")
    if "step_percent" in row:
        found.append(f"{row['step_percent']:.0f} % of the step's rate")
    if "workers" in row:
        found.append(f"workers: {row['workers']}, threads: {torch.get_num_threads()}")
    return found


def line(row: dict) -> str:
    """Return a row of the table."""
    if row["ours"] is None:
        return f"{row['part']:<14}  not known on this system"
    numbers = f"{row['ours']:>10.1f}{row['plain']:>10.1f} {row['unit']:<6}{row['ratio']:>8.2f}"
    return f"{row['part']:<14}{numbers}   {'; '.join(notes(row))}".rstrip()


def draw_jpegs(folder: Path) -> list[Path]:
    """Write eight images of 400 x 533 pixels, as a folder of photos might hold them."""
    for i, image in enumerate(make_creatures(8, side=533).images):
        to_pil_image(image[:, :400]).save(folder / f"{i}.jpg", quality=90)
    return sorted(folder.iterdir())


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """Return the flags, still to be checked."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    every = list(PARTS)
    names = ", ".join(every)
    add("--parts", nargs="+", choices=every, default=every, metavar="PART", help=f"[{names}]")
    add("--data_path", default="", help="a folder of images to load; default: eight drawn JPEGs")
    bench_step.add_flags(parser)
    return parser.parse_args(argv)


def run(flags: argparse.Namespace, folder: Path) -> None:
    """Measure the parts and print their rows; folder: for images to load."""
    settings = bench_step.step_settings(flags)
    with hardware.start(flags.device, flags.precision) as world:
        if flags.data_path:
            files = open_images(flags.data_path)[0].source
        else:
            files = draw_jpegs(folder)
        bench = Bench(flags, settings, world, files)
        machine = measure.machine(world)
        if not flags.json:
            print(bench_step.describe(settings, machine))
            print(f"\n{'part':<14}{'ours':>10}{'plain':>10}{'plain / ours':>16}")

        threads = torch.get_num_threads()
        for part in flags.parts:
            torch.set_num_threads(threads)  # a part may have taken fewer
            for row in PARTS[part](bench):
                if flags.json:
                    belongs_to = vars(flags) | machine | {"threads": torch.get_num_threads()}
                    print(json.dumps(row | belongs_to), flush=True)
                else:
                    print(line(row), flush=True)


def main(argv: list[str] | None = None) -> None:
    with (
        errors_in_one_line(),
        measure.full_memory_in_one_line(),
        tempfile.TemporaryDirectory() as folder,
    ):
        run(parse_flags(argv), Path(folder))


if __name__ == "__main__":
    main()
