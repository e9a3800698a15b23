"""What the ablations show: tables and figures are of the raw lines, and say of what."""

import math

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from test_ablations import weights_of

from ablations import report
from ablations.rows import Row, Study
from data import Images
from runtime.creatures import make_creatures

K = 61
STUDY = Study(
    "Table 0",
    {},
    (
        Row("one", {}, {"k-NN": 71.5, "linear": 76.1}),
        Row("other", {"out_dim": 65536}, {"hours": 45.9}, {"out_dim": 17}),
        Row("missing"),
    ),
)


@pytest.fixture
def lines() -> list[dict]:
    """Two rows with two seeds, 33 and 36 % at the end; the third row has failed."""
    return [
        {
            "row": row.name,
            "seed": seed,
            "data": "images",
            "out_dim": K,
            "untrained": 19.0,
            "verdict": "",
            "knn_teacher": [31.0, 32.0, 33.0 + 3 * seed],
            "knn_student": [30.0, 31.0, 32.0],
            "entropy_curve": [],
            "kl_curve": [],
        }
        for row in STUDY.rows[:2]
        for seed in (0, 1)
    ]


def test_the_table_gives_mean_deviation_and_number_beside_the_paper_s(lines):
    """s = sqrt(((33 - 34.5)^2 + (36 - 34.5)^2) / (2 - 1)) = 2.12; columns that nobody filled are
    left out.
    """
    text = report.markdown(
        [list(report.HEAD), *(report.cells(row, lines, "lab") for row in STUDY.rows)]
    )
    head, _, one, other, missing = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines()
    ]
    assert head == ["row", "the paper's", "k-NN, teacher", "student", "untrained", "changed"], (
        "nor speeds where the paper has none"
    )
    assert one == [
        "one",
        "k-NN 71.5, linear 76.1",
        "34.5 ± 2.1 (2)",
        "32.0 ± 0.0 (2)",
        "19.0 ± 0.0 (2)",
        "nothing",
    ]
    assert other[1] == "hours 45.9" and other[-1] == "out_dim 17 (the paper: out_dim 65536)"
    assert missing == ["missing", "-", "-", "-", "-", "nothing"]


def test_the_table_has_the_untrained_network_s_linear_beside_the_linear(lines):
    """(44 + 48) / 2; it stays out where the paper has no linear number, as the linear does."""
    for line, value in zip(lines, (44.0, 48.0)):
        line |= {"linear": 47.0, "linear_untrained": value}
    text = report.markdown([list(report.HEAD), report.cells(STUDY.rows[0], lines, "lab")])
    head, _, row = [[cell.strip() for cell in one.split("|")] for one in text.splitlines()]
    assert head[6:8] == ["linear", "linear, untrained"]
    assert row[6:8] == ["47.0 ± 0.0 (2)", "46.0 ± 2.8 (2)"]


def drawn(axes: Axes) -> list[tuple]:
    """Each line of a panel that has points: its label in the legend, its marker, its points."""
    assert axes.get_legend(), "without a legend nobody knows which is which"
    shown = {text.get_text() for text in axes.get_legend().get_texts()}
    found = [
        (line.get_label(), line.get_marker(), line.get_xydata().round(3).tolist())
        for line in axes.lines
    ]
    assert shown == {label for label, _, _ in found if not label.startswith("_")}
    return [line for line in found if line[2]]


def test_rows_are_drawn_with_each_seed_s_k_nn_and_linear_beside_the_paper_s(tmp_path, lines):
    """k-NN and linear are different numbers, so their marks differ, ours and the paper's; the axis
    names neither.
    """
    lines[0] |= {"linear": 47.0, "linear_untrained": 44.0}
    (axes,) = report.draw(tmp_path / "figure.png", "components", STUDY, lines).axes
    marks = {
        (label, marker): [points for other, _, points in drawn(axes) if other == label]
        for label, marker, _ in drawn(axes)
    }
    assert marks == {
        ("teacher's k-NN here, a seed each", "o"): [
            [[33.0, -0.15], [36.0, -0.15]],
            [[33.0, 0.85], [36.0, 0.85]],
        ],
        ("student's k-NN here, a seed each", "o"): [
            [[32.0, 0.0], [32.0, 0.0]],
            [[32.0, 1.0], [32.0, 1.0]],
        ],
        ("teacher's linear here, a seed each", "s"): [[[47.0, 0.15]]],
        ("the same network's k-NN, untrained", "None"): [
            [[19.0, -0.4], [19.0, 0.4]],
            [[19.0, 0.6], [19.0, 1.4]],
        ],
        ("the same network's linear, untrained", "None"): [[[44.0, -0.4], [44.0, 0.4]]],
        ("the paper's k-NN, on ImageNet", "x"): [[[71.5, 0.0]]],
        ("the paper's linear, on ImageNet", "+"): [[[76.1, 0.0]]],
    }
    assert axes.get_xlabel() == "top-1, %" and axes.get_xlim() == (0, 100)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "other", "missing"]
    assert (tmp_path / "figure.png").stat().st_size


def test_teachers_are_drawn_as_the_mean_over_the_seeds_without_epochs_that_were_not_evaluated(
    tmp_path, lines
):
    """Fig. 6, from the untrained network's k-NN on: (33 + 36) / 2 at the end of the third epoch."""
    lines[0]["knn_teacher"][0] = None
    (axes,) = report.draw(tmp_path / "figure.png", "teachers", STUDY, lines).axes
    curves = {label: points for label, _, points in drawn(axes)}
    assert curves["one: teacher"] == [[0, 19.0], [2, 32.0], [3, 34.5]]
    assert curves["other: student"] == [[0, 19.0], [1, 30.0], [2, 31.0], [3, 32.0]]
    assert axes.get_ylim()[0] == 0 and axes.get_ylabel() == "k-NN top-1, %"


def test_collapse_is_drawn_along_the_parts_of_the_epochs_under_ln_k(tmp_path, lines):
    """Fig. 7: six values in three epochs are half an epoch each, drawn where it ends."""
    for line in lines:
        line["entropy_curve"], line["kl_curve"] = [3.0, 2.5, 2.0, 1.5, 1.0, 0.5], [0.5] * 6
    entropy, kl = report.draw(tmp_path / "figure.png", "collapse", STUDY, lines).axes
    curve = {label: points for label, _, points in drawn(entropy)}
    assert curve["one"] == [[0.5, 3.0], [1, 2.5], [1.5, 2.0], [2, 1.5], [2.5, 1.0], [3, 0.5]]
    assert [y for _, y in curve[f"ln K = {math.log(K):.3f}"]] == [round(math.log(K), 3)] * 2
    assert [y for label, _, points in drawn(kl) if label == "one" for _, y in points] == [0.5] * 6


def test_k_nn_is_drawn_against_the_costs_that_were_measured(tmp_path, lines):
    """Table 8's here: training's images/s and memory; from 0 on, so that a small difference looks
    small.
    """
    lines[0] |= {"train_per_s": 151.0, "mib": 123.0}
    speed, memory = report.draw(tmp_path / "figure.png", "crops", STUDY, lines).axes
    assert drawn(speed) == [("one", "o", [[151.0, 33.0]])] and drawn(memory) == [
        ("one", "o", [[123.0, 33.0]])
    ]
    assert (speed.get_xlabel(), memory.get_xlabel()) == ("training, images/s", "training, MiB")
    assert all(axes.get_xlim()[0] == axes.get_ylim()[0] == 0 for axes in (speed, memory))


def test_where_no_cost_could_be_measured_the_rows_are_drawn(tmp_path, lines):
    (axes,) = report.draw(tmp_path / "figure.png", "crops", STUDY, lines).axes
    assert axes.get_xlabel() == "top-1, %"


def test_the_masks_of_both_networks_stand_side_by_side(tmp_path):
    """Fig. 4: a column for the images and two for each network, showing a part of each image."""
    torch.manual_seed(0)
    weights = {name: weights_of(tmp_path / name) for name in ("supervised", "DINO")}
    made = make_creatures(3)
    images = Images(made.images, masks=made.masks)
    figure = report.draw_masks(tmp_path / "masks.png", weights, images)
    titles = [axes.get_title() for axes in figure.axes[:5]]
    kinds = ("mean of heads", "best head")
    assert titles == ["", *(f"{name},\n{kind}" for name in weights for kind in kinds)]
    assert "60%" in figure.get_suptitle()
    for i in range(3):
        panels = figure.axes[5 * i : 5 * i + 5]
        image, *masked = (axes.get_images()[0].get_array() for axes in panels)
        np.testing.assert_allclose(image, images[i][0].movedim(0, -1) / 255, atol=0.01)
        assert not np.array_equal(masked[0], masked[2]), "two networks attend alike"
        for shown in masked:
            changed = (np.abs(shown - image) > 0.01).any(axis=-1).mean()
            assert 0 < changed < 1, "a mask covers a part of the image"
    assert (tmp_path / "masks.png").stat().st_size


def test_without_the_objects_no_head_is_the_best(tmp_path):
    """Photographs have no masks: a column for each network is left."""
    torch.manual_seed(0)
    weights = {"DINO": weights_of(tmp_path / "DINO")}
    figure = report.draw_masks(tmp_path / "masks.png", weights, Images(make_creatures(2).images))
    assert [axes.get_title() for axes in figure.axes] == ["", "DINO,\nmean of heads", "", ""]


def test_the_best_head_is_the_one_whose_mask_fits_the_object():
    """Three heads, of which the middle one looks at the object's four patches."""
    attention = torch.full((1, 3, 4, 4), 0.01)
    attention[0, 1, :2, :2], attention[0, 2, 2:, 2:] = 1.0, 1.0
    mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    mask[0, :16, :16] = True
    images = Images(torch.zeros(1, 3, 32, 32).byte(), masks=mask)
    assert torch.equal(report.best_heads(attention, images, 0.6), attention[:, 1])
