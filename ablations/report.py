"""The ablations' tables, of the paper's numbers and these, and their figures (Fig. 4 to 7).

They are made from raw lines, one a row and seed, as __main__.py writes them. A line has lists of
the epochs' values: k-NN of teacher and student in % (None for an epoch without), entropy and KL in
nats, images/s. Speeds and memory in the table are measured by themselves (__main__.py:costs).

Shapes: B images, h heads, r x c patches, S pixels.
"""

import math
from collections import Counter
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ablations.rows import Row, Study, as_flags
from attention import cls_attention, jaccard, keep_mass, overlay, to_pixels
from data import Images
from features import EvaluationView
from runtime.commandline import write_whole
from training.checkpoint import load_backbone
from training.report import unnormalised

Lines = list[dict]  # raw lines
COSTS = {
    "train_per_s": ("hours", "training, images/s"),
    "features_per_s": ("images/s", "features, images/s"),
    "mib": ("GiB", "training, MiB"),
}  # the paper's number that each of ours stands beside, and our column's name
UNTRAINED = {  # what a row has to beat, in a figure's legend
    "untrained": "the same network's k-NN, untrained",
    "linear_untrained": "the same network's linear, untrained",
}
HEAD = (
    "row",
    "the paper's",
    "k-NN, teacher",
    "student",
    "untrained",
    "linear",
    "linear, untrained",
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


def of_row(lines: Lines, row: Row) -> Lines:
    """Return the raw lines of a row, a seed each."""
    return [line for line in lines if line["row"] == row.name]


def last_knn(lines: Lines, network: str) -> list[float | None]:
    """Return each line's k-NN of teacher or student after the last epoch, in %."""
    return [line[f"knn_{network}"][-1] for line in lines]


def typed(settings: dict) -> str:
    """Return settings as one types them, without the dashes."""
    return " ".join(as_flags(settings)).replace("--", "") or "nothing"


def collapses(lines: Lines) -> str:
    """Return the kinds of collapse and their numbers: "one-hot (1), uniform (2)", or "-"."""
    counts = Counter(line["verdict"] for line in lines)
    del counts[""]  # no collapse
    found = []
    for verdict, number in sorted(counts.items()):
        kind = verdict.removeprefix("COLLAPSE, ")
        found.append(f"{kind} ({number})")
    return ", ".join(found) or "-"


def cells(row: Row, lines: Lines, preset: str) -> list[str]:
    """Return a row of the table, as HEAD names its columns."""
    mine = of_row(lines, row)
    paper = [f"{name} {value}" for name, value in row.paper.items()]
    changes = row.changes(preset)
    changed = typed(changes)
    if changes != row.settings:
        changed += f" (the paper: {typed(row.settings)})"

    columns = [
        row.name,
        ", ".join(paper) or "-",
        spread(last_knn(mine, "teacher")),
        spread(last_knn(mine, "student")),
        spread([line["untrained"] for line in mine]),
        spread([line.get("linear") for line in mine]),
        spread([line.get("linear_untrained") for line in mine]),
    ]
    for cost in COSTS:
        columns.append(spread([line.get(cost) for line in mine]))
    return [*columns, collapses(mine), changed]


def markdown(grid: list[list[str]]) -> str:
    """Return a table of the rows, the head first, without columns that have nothing but "-"."""
    columns = []
    for head, *values in zip(*grid, strict=True):
        if set(values) != {"-"}:
            column = [head, "", *values]
            width = max(map(len, column))
            columns.append([cell.ljust(width) for cell in column])

    lines = []
    for row in zip(*columns, strict=True):
        joined = " | ".join(row)
        lines.append(f"| {joined} |")
    lines[1] = lines[1].replace(" ", "-")  # the rule below the head
    return "\n".join(lines)


def surprises(study: Study, lines: Lines) -> list[str]:
    """Return a line for each run that collapsed otherwise than its row expects."""
    found = []
    for row in study.rows:
        for line in of_row(lines, row):
            verdict = line["verdict"]
            if row.verdict in (None, verdict):
                continue
            expected = row.verdict or "no collapse"
            verdict = verdict or "no collapse"
            which = f"{row.name}, seed {line['seed']}"
            found.append(f"{which}: expected was {expected}, found {verdict}")
    return found


def draw_rows(figure: Figure, study: Study, lines: Lines) -> None:
    """Draw each seed's k-NN, its linear top-1 where measured, and the paper's numbers.

    Dotted: the untrained network's means.
    k-NN is of the student too, since a young teacher, an average, lags behind it.
    """
    axes = figure.subplots()

    def draw_seeds(
        values: list[float], height: float, style: str, filled: str, name: str
    ) -> None:
        if not values:
            return
        axes.plot(
            values,
            [height] * len(values),
            style,
            markerfacecolor=filled,
            alpha=0.7,
            label=f"{name} here, a seed each",
        )

    for i, row in enumerate(study.rows):
        mine = of_row(lines, row)
        teacher = last_knn(mine, "teacher")
        student = last_knn(mine, "student")
        linear = [line["linear"] for line in mine if "linear" in line]
        draw_seeds(teacher, i - 0.15, "oC0", "C0", "teacher's k-NN")
        draw_seeds(student, i, "oC0", "none", "student's k-NN")
        draw_seeds(linear, i + 0.15, "sC1", "C1", "teacher's linear")
        for name, style in (("k-NN", "x"), ("linear", "+")):
            if name in row.paper:
                label = f"the paper's {name}, on ImageNet"
                axes.plot(row.paper[name], i, style, color="grey", label=label)
        for key, color in (("untrained", "C0"), ("linear_untrained", "C1")):
            values = [line[key] for line in mine if line.get(key) is not None]
            if values:
                across = [mean(values)] * 2
                axes.plot(across, [i - 0.4, i + 0.4], ":", color=color, label=UNTRAINED[key])
    names = [row.name for row in study.rows]
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="top-1, %", xlim=(0, 100))
    axes.invert_yaxis()


def draw_curve(
    axes: Axes, lines: Lines, key: str, color: str, style: str, label: str
) -> None:
    """Draw the mean over the seeds against the epoch, and the range from the lowest to the highest.

    k-NN begins with the untrained network. Of several values an epoch, each is the mean of a part
    of it, and is drawn where that part ends.
    """
    values_an_epoch = 1
    if lines:
        values_an_epoch = len(lines[0][key]) / len(lines[0]["knn_teacher"])
    before = []  # of the first step
    if key.startswith("knn"):
        before = [line["untrained"] for line in lines]
    curves = [line[key] for line in lines]
    points = [before, *zip(*curves, strict=True)]  # each has the seeds' values

    at = []
    means = []
    lowest = []
    highest = []
    for number, seeds in enumerate(points):
        if seeds and None not in seeds:
            at.append(number / values_an_epoch)
            means.append(mean(seeds))
            lowest.append(min(seeds))
            highest.append(max(seeds))
    axes.plot(at, means, style, color=color, label=label)
    axes.fill_between(
        at,
        lowest,
        highest,
        color=color,
        alpha=0.15,
        linewidth=0,
    )
    axes.xaxis.get_major_locator().set_params(integer=True)


def draw_teachers(figure: Figure, study: Study, lines: Lines) -> None:
    """Fig. 6: k-NN of teacher and student through training."""
    axes = figure.subplots()
    for i, row in enumerate(study.rows):
        mine = of_row(lines, row)
        color = f"C{i}"
        draw_curve(axes, mine, "knn_teacher", color, "-", f"{row.name}: teacher")
        draw_curve(axes, mine, "knn_student", color, "--", f"{row.name}: student")
    axes.set(xlabel="epoch", ylabel="k-NN top-1, %")
    axes.set_ylim(0, None)


def draw_collapse(figure: Figure, study: Study, lines: Lines) -> None:
    """Fig. 7: the teacher's entropy between 0 and ln K, and the KL, along the steps."""
    entropy_axes, kl_axes = figure.subplots(1, 2)
    entropy_axes.set_title("teacher's entropy")
    kl_axes.set_title("KL")
    for i, row in enumerate(study.rows):
        mine = of_row(lines, row)
        color = f"C{i}"
        draw_curve(entropy_axes, mine, "entropy_curve", color, "-", row.name)
        draw_curve(kl_axes, mine, "kl_curve", color, "-", row.name)
    for axes in (entropy_axes, kl_axes):
        axes.axhline(0, color="grey", linestyle=":")
        axes.set(xlabel="epoch", ylabel="nats")
    for out_dim in {line["out_dim"] for line in lines}:
        log_k = math.log(out_dim)
        label = f"ln K = {log_k:.3f}"
        entropy_axes.axhline(log_k, color="grey", linestyle="--", label=label)


def draw_costs(figure: Figure, study: Study, lines: Lines) -> None:
    """Draw k-NN against each cost that was measured (Fig. 5, Table 8), or the rows if none was."""
    costs = [cost for cost in COSTS if any(line.get(cost) for line in lines)]
    if not costs:
        draw_rows(figure, study, lines)
        return

    panels = figure.subplots(1, len(costs), squeeze=False)
    for axes, cost in zip(panels.flat, costs, strict=True):
        for row in study.rows:
            mine = [line for line in of_row(lines, row) if line.get(cost)]
            measured = [line[cost] for line in mine]
            knn = last_knn(mine, "teacher")
            axes.plot(measured, knn, "o", label=row.name)

        _, title = COSTS[cost]
        axes.set(xlabel=title, ylabel="k-NN top-1, %")
        _, right = axes.get_xlim()
        _, top = axes.get_ylim()
        axes.set_xlim(0, 1.1 * right)
        axes.set_ylim(0, 1.1 * top)


FIGURES = {
    "teachers": draw_teachers,
    "collapse": draw_collapse,
    "patch_size": draw_costs,
    "crops": draw_costs,
    "heads": draw_costs,
}


def draw(path: Path, name: str, study: Study, lines: Lines) -> Figure:
    """Write the study's figure and return it; a legend has each label once."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    draw_study = FIGURES.get(name, draw_rows)
    draw_study(figure, study, lines)
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        labelled = dict(zip(labels, handles, strict=True))
        place = {}
        if len(labelled) > 6:  # so many would cover the curves: beside them
            place = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
        axes.legend(labelled.values(), labelled.keys(), fontsize=8, **place)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{name}: {study.where}; {lines[0]['data']}", fontsize=10)
    write_whole(path, figure.savefig)
    return figure


def best_heads(attention: Tensor, images: Images, mass: float) -> Tensor:
    """Return the map of each image's best head, by the Jaccard of its mask with the object.

    (B, h, r, c) -> (B, r, c). images: whose masks (B, S, S) are known.
    """
    masks = keep_mass(attention, mass).float()
    pixels = F.interpolate(masks, images.masks.shape[-2:], mode="nearest").bool()
    overlap = jaccard(pixels, images.masks.unsqueeze(1))  # (B, h)
    best = overlap.argmax(dim=1)
    return attention[torch.arange(len(attention)), best]


@torch.no_grad()
def draw_masks(path: Path, weights: dict[str, Path], images: Images, mass: float = 0.6) -> Figure:
    """Draw a row an image (Fig. 4): the image, and each network's masks.

    A mask has the patches that hold `mass` of the attention's mean over the heads. Beside it, where
    the objects are known, stands that of the best head, which Fig. 4 draws.
    """
    kinds = ["mean of heads"]
    if images.masks is not None:
        kinds.append("best head")
    columns = 1 + len(weights) * len(kinds)
    figure = Figure(figsize=(1.6 * columns, 1.6 * len(images)), layout="constrained")
    grid = figure.subplots(len(images), columns, squeeze=False)
    column = 1
    for title, file in weights.items():
        network, args = load_backbone(file)
        view = EvaluationView(args["eval_size"], args["eval_crop"], args["mean"], args["std"])
        views = torch.stack([view(images[i][0]) for i in range(len(images))])
        shown = unnormalised(views, view)
        attention = cls_attention(network, views)  # (B, h, r, c)
        maps = [attention.mean(dim=1)]  # (B, r, c)
        if images.masks is not None:
            maps.append(best_heads(attention, images, mass))
        for kind, patches in zip(kinds, maps, strict=True):
            masks = to_pixels(keep_mass(patches, mass), network.patch_size)  # (B, S, S)
            for i, panels in enumerate(grid):
                masked = overlay(shown[i], masks[i])
                panels[0].imshow(shown[i].numpy())
                panels[column].imshow(masked.numpy())
            grid[0, column].set_title(f"{title},\n{kind}", fontsize=9)
            column += 1
    for axes in grid.flat:
        axes.axis("off")
    figure.suptitle(f"supervised: Fig. 4; {mass:.0%} of the attention's mass", fontsize=10)
    write_whole(path, figure.savefig)
    return figure
