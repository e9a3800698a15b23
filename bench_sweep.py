"""How a step's cost grows with the patch, the crops and the batch: Fig. 5's throughput, Table 8's time and memory.

    python bench_sweep.py --output cost.png --batch_size 2                      # ViT-S/16, 2 x 224 + 8 x 96; minutes
    python bench_sweep.py --arch vit_tiny --global_crops_size 96 --local_crops_size 48 --out_dim 4096 --json

One of the three changes, the others stay as the flags say. Each point is a fresh process, which tells its own memory;
one that does not fit is named and left out. Dashed is the growth in the paper, scaled to our first point: images/s of
ViT-S at patches of 16, 8 and 5, hours and memory of Table 8.
"""
import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import matplotlib
import torch

import bench_step
import hardware
import measure
from ablation_rows import STUDIES
from commandline import CommandLine, InputError, errors_in_one_line
from settings import Settings, check

matplotlib.use("Agg")  # draws to files, needs no screen
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from commandline import write_whole

AXES = {"patch_size": "patch size, pixels", "local_crops_number": "local crops",
        "batch_size_per_gpu": "pictures a step"}
CURVES = {"images_per_s": "training, images/s", "features_per_s": "features, images/s", "mib": "peak memory, MiB"}
PATCHES, CROPS = STUDIES["patch_size"].rows, STUDIES["crops"].rows
PAPER = {  # of its own machines: only the growth can be compared
    ("patch_size", "features_per_s"): (
        "Fig. 5", {row.settings["patch_size"]: row.paper["images/s"] for row in PATCHES}),
    ("local_crops_number", "images_per_s"): (
        "Table 8", {row.settings["local_crops_number"]: 1 / row.paper["hours"] for row in CROPS}),
    ("local_crops_number", "mib"): (
        "Table 8", {row.settings["local_crops_number"]: row.paper["GiB"] for row in CROPS})}


def variations(base: Settings, flags: argparse.Namespace) -> dict[str, list[Settings]]:
    """The three sweeps through the base, each checked."""
    values = dict(zip(AXES, (flags.patch_sizes, flags.local_crops_numbers, flags.batch_sizes), strict=True))
    if min(flags.batch_sizes) < 1:
        raise InputError(f"--batch_sizes {min(flags.batch_sizes)} must be at least 1")
    sweeps = {axis: [replace(base, **{axis: value}) for value in some] for axis, some in values.items()}
    for points in sweeps.values():
        for settings in points:
            check(settings)
    return sweeps


def measure_point(settings: Settings, flags: argparse.Namespace, world: hardware.World) -> dict | None:
    """The cost of a step of ours, or None where it does not fit."""
    try:
        found = measure.in_fresh_process(bench_step.cost_of_steps, bench_step.make_ours, settings, world,
                                         torch.get_num_threads(), flags.turns, flags.seconds)
    except MemoryError:
        return None
    return found | {"images_per_s": 1000 * settings.batch_size_per_gpu / found["ms"]}


def sweep(sweeps: dict[str, list[Settings]], flags: argparse.Namespace, world: hardware.World) -> Iterator[dict]:
    """A row for each point of each axis; a point that two axes share is measured once."""
    known = {}
    for axis, points in sweeps.items():
        for settings in points:
            point = tuple(getattr(settings, name) for name in AXES)
            if point not in known:
                known[point] = measure_point(settings, flags, world)
            yield {"axis": axis, **dict(zip(AXES, point, strict=True)), **(known[point] or {"ms": None})}


def line(row: dict) -> str:
    """A row of the table."""
    text = f"{AXES[row['axis']]:<20}{row[row['axis']]:>5}"
    if row["ms"] is None:
        return f"{text}   does not fit in memory"
    memory = "" if row["mib"] is None else f"{row['mib']:9.0f} MiB"
    return f"{text}{row['ms']:>11.1f} ms{row['images_per_s']:>10.2f} images/s{memory}" \
           f"{row['features_per_s']:>10.1f} features/s"


def draw_curve(panel: Axes, axis: str, key: str, rows: list[dict]) -> None:
    """One number against what changed, and the paper's, scaled to meet our first point."""
    points = {row[axis]: row[key] for row in rows if row.get(key)}
    if not points:
        return
    ours, = panel.plot(list(points), list(points.values()), "o-", label=CURVES[key])
    name, paper = PAPER.get((axis, key), ("", {}))
    first = next(iter(points))
    if first in paper:
        scaled = [points[first] * value / paper[first] for value in paper.values()]
        panel.plot(list(paper), scaled, "s--", color=ours.get_color(), alpha=0.4, label=f"the paper's growth, {name}")


def draw(path: Path, rows: list[dict], title: str) -> None:
    """Columns: patch, crops, batch. Above images/s, below peak memory."""
    figure, grid = plt.subplots(2, len(AXES), figsize=(13, 7), layout="constrained")
    for axis, (speed, memory) in zip(AXES, grid.T, strict=True):
        mine = [row for row in rows if row["axis"] == axis]
        draw_curve(speed, axis, "images_per_s", mine)
        draw_curve(memory, axis, "mib", mine)
        if axis == "patch_size":
            draw_curve(speed, axis, "features_per_s", mine)
        for panel, ylabel in ((speed, "images/s"), (memory, "MiB")):
            if axis != "local_crops_number":
                panel.set_xscale("log", base=2)
            if axis == "patch_size" and panel is speed:
                panel.set_yscale("log")
            else:
                panel.set_ylim(bottom=0)
            panel.set_xticks([row[axis] for row in mine], [row[axis] for row in mine])
            panel.set(xlabel=AXES[axis], ylabel=ylabel)
            panel.grid(alpha=0.3)
            if panel.lines:
                panel.legend(fontsize=8)
    figure.suptitle(f"{title}; one of these changes in each column", fontsize=10)
    write_whole(path, lambda part: figure.savefig(part, dpi=110))
    plt.close(figure)


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line -> flags, of which the step's are still to be checked."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    bench_step.add_flags(parser)
    add("--patch_sizes", type=int, nargs="+", default=[16, 8, 4], help="to go through [16 8 4]")
    add("--local_crops_numbers", type=int, nargs="+", default=[0, 4, 8, 10], help="to go through [0 4 8 10]")
    add("--batch_sizes", type=int, nargs="+", default=[1, 2, 4, 8], help="to go through [1 2 4 8]")
    add("--output", default="cost.png", metavar="FILE", help="gets the figure [cost.png]")
    flags = parser.parse_args(argv)
    if Path(flags.output).suffix not in (".png", ".pdf", ".svg"):
        raise InputError(f"--output {flags.output} must end in .png, .pdf or .svg")
    return flags


def main(argv: list[str] | None = None) -> None:
    with errors_in_one_line():
        flags = parse_flags(argv)
        base = bench_step.step_settings(flags)
        with hardware.start(flags.device, flags.precision) as world:
            machine, rows = measure.machine(world), []
            title = bench_step.told(base, machine)
            points = sweep(variations(base, flags), flags, world)
            draw(Path(flags.output), rows, title)  # a file that cannot be written is told before an hour's work
            print(end="" if flags.json else f"{title}\n\n")
            for row in points:
                rows.append(row)
                print(json.dumps({**vars(flags), **machine, **row}) if flags.json else line(row), flush=True)
                draw(Path(flags.output), rows, title)


if __name__ == "__main__":
    main()
