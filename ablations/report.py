"""The ablations' tables, of the paper's numbers and these, and their figures (Fig. 4 to 7).

They are made from raw lines, one a row and seed, as __main__.py writes them. A line has lists of
the epochs' values: k-NN of teacher and student in % (None for an epoch without), entropy and KL in
nats, images/s. Speeds and memory in the table are measured by themselves (__main__.py:costs).

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

COSTS = {
    "train_per_s": ("hours", "training, images/s"),
    "features_per_s": ("images/s", "features, images/s"),
    "mib": ("GiB", "training, MiB"),
}  # the paper's number that each of ours stands beside, and our column's name
HEAD = (
    "row",
    "the paper's",
    "k-NN, teacher",
    "student",
    "untrained",
    "linear",
    *(name for _, name in COSTS.values()),
    "collapse",
    "changed",
)


def spread(values: list[float | None]) -> str:
    """Return mean, standard deviation and number of the values: [1, 3] -> "2.0 ± 1.4 (2)"."""
    values = [value for value in values if value is not None]
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.1f} (1)"
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
    return [
        row.name,
        ", ".join(f"{name} {value}" for name, value in row.paper.items()) or "-",
        spread([line["knn_teacher"][-1] for line in mine]),
        spread([line["knn_student"][-1] for line in mine]),
        spread([line["untrained"] for line in mine]),
        spread([line.get("linear") for line in mine]),
        *(spread([line.get(cost) for line in mine]) for cost in COSTS),
        ", ".join(f"{name} ({collapses.count(name)})" for name in sorted(set(collapses))) or "-",
        typed(changes)
        + (f" (the paper: {typed(row.settings)})" if changes != row.settings else ""),
    ]


def markdown(grid: list[list[str]]) -> str:
    """Rows of cells, the head first, without the columns in which all others are "-"."""
    columns = [column for column in zip(*grid) if set(column[1:]) != {"-"}]
    widths = [max(map(len, column)) for column in columns]
    rows = [
        f"| {' | '.join(cell.ljust(width) for cell, width in zip(row, widths))} |"
        for row in zip(*columns)
    ]
    return "\n".join([rows[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *rows[1:]])


def surprises(study: Study, lines: list[dict]) -> list[str]:
    """A line for each run that collapsed otherwise than its row expects."""
    return [
        f"{row.name}, seed {line['seed']}: expected was {row.verdict or 'no collapse'}, found "
        f"{line['verdict'] or 'no collapse'}"
        for row in study.rows
        for line in of_row(lines, row)
        if row.verdict not in (None, line["verdict"])
    ]


def draw_rows(figure: Figure, study: Study, lines: list[dict]) -> None:
    """Draw each seed's k-NN, its linear top-1 where measured, and the paper's numbers.

    k-NN is of the student too, since a young teacher, an average, lags behind it.
    """
    axes = figure.subplots()

    def draw_seeds(values: list[float], at: float, style: str, filled: str, name: str) -> None:
        if values:
            heights = [at] * len(values)
            label = f"{name} here, a seed each"
            axes.plot(values, heights, style, markerfacecolor=filled, alpha=0.7, label=label)

    for i, row in enumerate(study.rows):
        mine = of_row(lines, row)
        teacher = [line["knn_teacher"][-1] for line in mine]
        student = [line["knn_student"][-1] for line in mine]
        linear = [line["linear"] for line in mine if "linear" in line]
        draw_seeds(teacher, i - 0.15, "oC0", "C0", "teacher's k-NN")
        draw_seeds(student, i, "oC0", "none", "student's k-NN")
        draw_seeds(linear, i + 0.15, "sC1", "C1", "teacher's linear")
        for name, style in (("k-NN", "x"), ("linear", "+")):
            if name in row.paper:
                label = f"the paper's {name}, on ImageNet"
                axes.plot(row.paper[name], i, style, color="grey", label=label)
    axes.set_yticks(range(len(study.rows)), [row.name for row in study.rows])
    axes.set(xlabel="top-1, %", xlim=(0, 100))
    axes.invert_yaxis()


def draw_curve(axes: Axes, lines: list[dict], key: str, color: str, style: str, label: str) -> None:
    """Draw the mean over the seeds against the epoch, and the range from the lowest to the highest.

    k-NN begins with the untrained network. Of several values an epoch, each is the mean of a part
    of it, and is drawn where that part ends.
    """
    columns = list(zip(*(line[key] for line in lines)))  # a column has the seeds' values
    values_an_epoch = 1
    if lines:
        values_an_epoch = len(lines[0][key]) / len(lines[0]["knn_teacher"])
    if key.startswith("knn"):
        columns.insert(0, [line["untrained"] for line in lines])
    else:
        columns.insert(0, [])
    at, means, lowest, highest = [], [], [], []
    for step, values in enumerate(columns):
        if values and None not in values:
            at.append(step / values_an_epoch)
            means.append(mean(values))
            lowest.append(min(values))
            highest.append(max(values))
    axes.plot(at, means, style, color=color, label=label)
    axes.fill_between(at, lowest, highest, color=color, alpha=0.15, linewidth=0)
    axes.xaxis.get_major_locator().set_params(integer=True)


def draw_teachers(figure: Figure, study: Study, lines: list[dict]) -> None:
    """Fig. 6: k-NN of teacher and student through training."""
    axes = figure.subplots()
    for i, row in enumerate(study.rows):
        for key, style in (("knn_teacher", "-"), ("knn_student", "--")):
            label = f"{row.name}: {key.removeprefix('knn_')}"
            draw_curve(axes, of_row(lines, row), key, f"C{i}", style, label)
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
    """Draw k-NN against each cost that was measured (Fig. 5, Table 8), or the rows if none was."""
    costs = [cost for cost in COSTS if any(line.get(cost) for line in lines)]
    if not costs:
        return draw_rows(figure, study, lines)
    for axes, cost in zip(figure.subplots(1, len(costs), squeeze=False)[0], costs):
        for row in study.rows:
            mine = [line for line in of_row(lines, row) if line.get(cost)]
            axes.plot(
                [line[cost] for line in mine],
                [line["knn_teacher"][-1] for line in mine],
                "o",
                label=row.name,
            )
        axes.set(
            xlabel=COSTS[cost][1],
            ylabel="k-NN top-1, %",
            xlim=(0, 1.1 * axes.get_xlim()[1]),
            ylim=(0, 1.1 * axes.get_ylim()[1]),
        )


FIGURES = {
    "teachers": draw_teachers,
    "collapse": draw_collapse,
    "patch_size": draw_costs,
    "crops": draw_costs,
    "heads": draw_costs,
}


def draw(path: Path, name: str, study: Study, lines: list[dict]) -> Figure:
    """Write the study's figure and return it; a legend has each label once."""
    figure = plt.figure(figsize=(9, 5), layout="constrained")
    FIGURES.get(name, draw_rows)(figure, study, lines)
    for axes in figure.axes:
        labelled = dict(zip(*axes.get_legend_handles_labels()[::-1]))
        place = {}
        if len(labelled) > 6:  # so many would cover the curves: beside them
            place = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
        axes.legend(labelled.values(), labelled.keys(), fontsize=8, **place)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{name}: {study.where}; {lines[0]['data']}", fontsize=10)
    write_whole(path, figure.savefig)
    plt.close(figure)
    return figure


@torch.no_grad()
def draw_masks(path: Path, weights: dict[str, Path], images: Images, mass: float = 0.6) -> Figure:
    """Draw a row an image (Fig. 4): the image, and each network's mask.

    A mask has the patches that hold `mass` of the attention's mean over the heads.
    """
    figure, grid = plt.subplots(
        len(images),
        1 + len(weights),
        squeeze=False,
        layout="constrained",
        figsize=(1.6 * (1 + len(weights)), 1.6 * len(images)),
    )
    for column, (title, file) in enumerate(weights.items(), start=1):
        network, args = load_backbone(file)
        view = EvaluationView(args["eval_size"], args["eval_crop"], args["mean"], args["std"])
        views = torch.stack([view(images[i][0]) for i in range(len(images))])
        masks = to_pixels(
            keep_mass(cls_attention(network, views).mean(dim=1), mass), network.patch_size
        )
        for row, image, mask in zip(grid, unnormalised(views, view), masks):
            row[0].imshow(image.numpy())
            row[column].imshow(overlay(image, mask).numpy())
        grid[0, column].set_title(title)
    for axes in grid.flat:
        axes.axis("off")
    figure.suptitle(
        f"supervised: Fig. 4; {mass:.0%} of the attention's mass,\nmean of the heads", fontsize=10
    )
    write_whole(path, figure.savefig)
    plt.close(figure)
    return figure
