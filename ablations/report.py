"""What the ablations show: a table of the paper's numbers and these, and a figure for each study (Fig. 4 to 7).

Everything is made from raw lines, one a row and seed, as __main__.py writes them: lists of the epochs' k-NN of teacher
and student in %, entropy and KL in nats, images/s of runs that shared their machine; None for an epoch without k-NN.
Speeds and memory in table and figure are measured by themselves (__main__.py:costs).

Shapes: B images, h heads, r x c patches, S pixels.
"""
import math
from pathlib import Path
from statistics import mean, stdev

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ablations.rows import Row, Study, as_flags
from attention import cls_attention, keep_mass, overlay, to_pixels
from data import Images
from features import EvaluationView
from runtime.commandline import write_whole
from training.checkpoint import load_backbone
from training.report import unnormalised

COSTS = {"train_per_s": ("hours", "training, images/s"), "features_per_s": ("images/s", "features, images/s"),
         "mib": ("GiB", "training, MiB")}  # the paper's number that each of ours stands beside, and our column's name
HEAD = ("row", "the paper's", "k-NN, teacher", "student", "untrained", "linear", *(name for _, name in COSTS.values()),
        "collapse", "changed")


def spread(values: list[float | None]) -> str:
    """Mean, standard deviation and number of what was measured: [1, 3] -> "2.0 ± 1.4 (2)"."""
    values = [value for value in values if value is not None]
    if len(values) < 2:
        return f"{values[0]:.1f} (1)" if values else "-"
    return f"{mean(values):.1f} ± {stdev(values):.1f} ({len(values)})"


def of_row(lines: list[dict], row: Row) -> list[dict]:
    """The raw lines of a row, a seed each."""
    return [line for line in lines if line["row"] == row.name]


def typed(settings: dict) -> str:
    """Settings as one types them, without the dashes."""
    return " ".join(as_flags(settings)).replace("--", "") or "nothing"


def cells(row: Row, lines: list[dict], preset: str) -> list[str]:
    """A row of the table, as HEAD names its columns."""
    mine, changes = of_row(lines, row), row.changes(preset)
    collapses = [line["verdict"].removeprefix("COLLAPSE, ") for line in mine if line["verdict"]]
    return [row.name, ", ".join(f"{name} {value}" for name, value in row.paper.items()) or "-",
            spread([line["knn_teacher"][-1] for line in mine]), spread([line["knn_student"][-1] for line in mine]),
            spread([line["untrained"] for line in mine]), spread([line.get("linear") for line in mine]),
            *(spread([line.get(cost) for line in mine]) for cost in COSTS),
            ", ".join(f"{name} ({collapses.count(name)})" for name in sorted(set(collapses))) or "-",
            typed(changes) + (f" (the paper: {typed(row.settings)})" if changes != row.settings else "")]


def markdown(grid: list[list[str]]) -> str:
    """Rows of cells, the head first, without the columns in which all others are "-"."""
    columns = [column for column in zip(*grid) if set(column[1:]) != {"-"}]
    widths = [max(map(len, column)) for column in columns]
    rows = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths))} |" for row in zip(*columns)]
    return "\n".join([rows[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *rows[1:]])


def surprises(study: Study, lines: list[dict]) -> list[str]:
    """A line for each run that collapsed otherwise than its row expects."""
    return [f"{row.name}, seed {line['seed']}: expected was {row.verdict or 'no collapse'}, found "
            f"{line['verdict'] or 'no collapse'}"
            for row in study.rows for line in of_row(lines, row) if row.verdict not in (None, line["verdict"])]


def draw_rows(figure: Figure, study: Study, lines: list[dict]) -> None:
    """Each seed's k-NN, of teacher and student since a young average lags behind, and linear top-1 where measured;
    and the paper's numbers."""
    axes = figure.subplots()
    for i, row in enumerate(study.rows):
        mine = of_row(lines, row)
        for name, here, marker, filled, at in (
                ("teacher's k-NN", [line["knn_teacher"][-1] for line in mine], "oC0", "C0", i - 0.15),
                ("student's k-NN", [line["knn_student"][-1] for line in mine], "oC0", "none", i),
                ("teacher's linear", [line["linear"] for line in mine if "linear" in line], "sC1", "C1", i + 0.15)):
            if here:
                axes.plot(here, [at] * len(here), marker, markerfacecolor=filled, alpha=0.7,
                          label=f"{name} here, a seed each")
        for name, style in (("k-NN", "x"), ("linear", "+")):
            if name in row.paper:
                axes.plot(row.paper[name], i, style, color="grey", label=f"the paper's {name}, on ImageNet")
    axes.set_yticks(range(len(study.rows)), [row.name for row in study.rows])
    axes.set(xlabel="top-1, %", xlim=(0, 100))
    axes.invert_yaxis()


def draw_curve(axes: Axes, lines: list[dict], key: str, color: str, style: str, label: str) -> None:
    """The mean over the seeds against the epoch, and from the lowest to the highest; k-NN begins untrained.

    Curves with several values an epoch are drawn where the part of it ends that each is the mean of.
    """
    starts = [line["untrained"] if key.startswith("knn") else None for line in lines]
    n = len(lines[0][key]) / len(lines[0]["knn_teacher"]) if lines else 1
    steps = enumerate([starts, *zip(*(line[key] for line in lines))])
    points = [(step / n, values) for step, values in steps if values and None not in values]
    at, values = [epoch for epoch, _ in points], [values for _, values in points]
    axes.plot(at, list(map(mean, values)), style, color=color, label=label)
    axes.fill_between(at, list(map(min, values)), list(map(max, values)), color=color, alpha=0.15, linewidth=0)
    axes.xaxis.get_major_locator().set_params(integer=True)


def draw_teachers(figure: Figure, study: Study, lines: list[dict]) -> None:
    """Fig. 6: k-NN of teacher and student through training."""
    axes = figure.subplots()
    for i, row in enumerate(study.rows):
        for key, style in (("knn_teacher", "-"), ("knn_student", "--")):
            draw_curve(axes, of_row(lines, row), key, f"C{i}", style, f"{row.name}: {key.removeprefix('knn_')}")
    axes.set(xlabel="epoch", ylabel="k-NN top-1, %", ylim=(0, None))


def draw_collapse(figure: Figure, study: Study, lines: list[dict]) -> None:
    """Fig. 7: the teacher's entropy between 0 and ln K, and the KL, along the steps."""
    panels = figure.subplots(1, 2)
    for axes, key, title in zip(panels, ("entropy_curve", "kl_curve"), ("teacher's entropy", "KL")):
        for i, row in enumerate(study.rows):
            draw_curve(axes, of_row(lines, row), key, f"C{i}", "-", row.name)
        axes.axhline(0, color="grey", linestyle=":")
        axes.set(xlabel="epoch", ylabel="nats", title=title)
    for log_k in {math.log(line["out_dim"]) for line in lines}:
        panels[0].axhline(log_k, color="grey", linestyle="--", label=f"ln K = {log_k:.3f}")


def draw_costs(figure: Figure, study: Study, lines: list[dict]) -> None:
    """Fig. 5 and Table 8: k-NN against each of its costs that was measured; the rows alone if none was."""
    costs = [cost for cost in COSTS if any(line.get(cost) for line in lines)]
    if not costs:
        return draw_rows(figure, study, lines)
    for axes, cost in zip(figure.subplots(1, len(costs), squeeze=False)[0], costs):
        for row in study.rows:
            mine = [line for line in of_row(lines, row) if line.get(cost)]
            axes.plot([line[cost] for line in mine], [line["knn_teacher"][-1] for line in mine], "o", label=row.name)
        axes.set(xlabel=COSTS[cost][1], ylabel="k-NN top-1, %", xlim=(0, 1.1 * axes.get_xlim()[1]),
                 ylim=(0, 1.1 * axes.get_ylim()[1]))


FIGURES = {"teachers": draw_teachers, "collapse": draw_collapse, "patch_size": draw_costs, "crops": draw_costs,
           "heads": draw_costs}


def draw(path: Path, name: str, study: Study, lines: list[dict]) -> Figure:
    """Write the study's figure, each label once in its legend -> it."""
    figure = plt.figure(figsize=(9, 5), layout="constrained")
    FIGURES.get(name, draw_rows)(figure, study, lines)
    for axes in figure.axes:
        labelled = dict(zip(*axes.get_legend_handles_labels()[::-1]))
        place = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if len(labelled) > 6 else {}  # beside so many curves
        axes.legend(labelled.values(), labelled.keys(), fontsize=8, **place)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{name}: {study.where}; {lines[0]['data']}", fontsize=10)
    write_whole(path, figure.savefig)
    plt.close(figure)
    return figure


@torch.no_grad()
def draw_masks(path: Path, weights: dict[str, Path], images: Images, mass: float = 0.6) -> Figure:
    """Fig. 4: a row an image: it, and of each network the patches that hold `mass` of its heads' mean attention."""
    figure, grid = plt.subplots(len(images), 1 + len(weights), squeeze=False, layout="constrained",
                                figsize=(1.6 * (1 + len(weights)), 1.6 * len(images)))
    for column, (title, file) in enumerate(weights.items(), start=1):
        network, args = load_backbone(file)
        view = EvaluationView(args["eval_size"], args["eval_crop"], args["mean"], args["std"])
        views = torch.stack([view(images[i][0]) for i in range(len(images))])
        masks = to_pixels(keep_mass(cls_attention(network, views).mean(dim=1), mass), network.patch_size)
        for row, image, mask in zip(grid, unnormalised(views, view), masks):
            row[0].imshow(image.numpy())
            row[column].imshow(overlay(image, mask).numpy())
        grid[0, column].set_title(title)
    for axes in grid.flat:
        axes.axis("off")
    figure.suptitle(f"supervised: Fig. 4; {mass:.0%} of the attention's mass,\nmean of the heads", fontsize=10)
    write_whole(path, figure.savefig)
    plt.close(figure)
    return figure
