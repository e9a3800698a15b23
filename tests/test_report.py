"""What a run shows at its end: the figures, and the paragraph in plain words."""

import math
from pathlib import Path

import pytest
import torch

from data import Images
from head import DINOHead
from loss import DINOLoss
from multicrop import MultiCropNetwork
from runtime.creatures import CLASSES, make_creatures
from runtime.hardware import World
from settings import Settings
from teacher import make_teacher
from training import report
from training.backbone import build_backbone
from training.run_state import RunState

HERE = World(0, 1, torch.device("cpu"), torch.float32)


def a_run(entropy: float, kl: float) -> tuple[RunState, Settings]:
    torch.manual_seed(0)
    settings = Settings(arch="vit_nano", patch_size=8, out_dim=64, eval_size=64, eval_crop=1.0)
    backbone = build_backbone("vit_nano", 8, 48)
    student = MultiCropNetwork(backbone, DINOHead(128, 64, hidden_dim=13, bottleneck_dim=7))
    last = {
        "epoch": 0,
        "train_loss": entropy + kl,
        "train_entropy": entropy,
        "train_kl": kl,
        "train_lr": 0.1,
        "train_wd": 0.1,
        "teacher_momentum": 0.9,
        "teacher_temp": 0.04,
        "images_per_s": 9.0,
        "knn_teacher": 71.5,
        "knn_student": 70.0,
    }
    history = [{"epoch": -1, "knn_untrained": 21.5, "knn_pixels": 50.0}, last]
    return RunState(
        student,
        make_teacher(student),
        DINOLoss(64),
        torch.optim.SGD(student.parameters()),
        epoch=1,
        history=history,
    ), settings


def finish(tmp_path: Path, entropy: float, kl: float) -> str:
    return paragraph(tmp_path, *a_run(entropy, kl))


def paragraph(tmp_path: Path, run: RunState, settings: Settings) -> str:
    drawn = make_creatures(3)
    images = Images(drawn.images, drawn.labels, CLASSES, drawn.masks)
    untrained = build_backbone("vit_nano", 8, 48)
    return report.finish(tmp_path, run, untrained, images, settings, HERE)


def test_the_paragraph_gives_every_number_and_the_figures_are_there(tmp_path):
    text = finish(tmp_path, entropy=2.0, kl=0.5)
    for said in (
        "loss is 2.500",
        "ln K = 4.159",
        "71.5 % with the teacher",
        "21.5 % with the same network untrained",
        "50.0 % with raw pixels",
        "of its attention on the object",
        "best head, 60 % of the mass",
        "head mean, 80 % of the mass",
        "No collapse",
        str(tmp_path),
    ):
        assert said in text, f"{said!r} is missing in: {text}"
    assert {path.name for path in tmp_path.iterdir()} == {"attention.png", "curves.png"}


@pytest.mark.parametrize(
    ("entropy", "said"), [(0.999 * math.log(64), "uniform"), (0.001, "one-hot")]
)
def test_a_collapse_is_the_verdict_and_a_loud_line(tmp_path, entropy, said):
    assert f"COLLAPSE, {said}" in finish(tmp_path, entropy=entropy, kl=0.001)
    run, _ = a_run(entropy, 0.001)
    assert f"\nCOLLAPSE, {said}" in report.line(run.history[-1], epochs=3, out_dim=64)


HEALTHY, UNIFORM, ONE_HOT = (2.0, 0.5), (0.999 * math.log(64), 0.001), (0.001, 0.001)
# measured in one epoch of the demo with --teacher student and no batch normalisation in the head:
# the teacher leaves a collapse and falls into it again, three times; K = 256
SWINGS = [
    (3.13, 1.96), (3.43, 1.60), (2.90, 1.60), (0.57, 1.74), (0.07, 0.60), (0.12, 0.16),
    (0.69, 0.08), (3.46, 2.00), (1.12, 2.95), (0.00, 1.19), (0.00, 0.20), (0.02, 0.07),
    (0.52, 0.05), (4.04, 1.87), (3.85, 1.85), (0.37, 1.97), (0.00, 0.31), (0.00, 0.07),
    (0.15, 0.02), (2.47, 0.85),
]  # fmt: skip


def record_of(parts: list[tuple[float, float]]) -> dict:
    """An epoch whose parts have these entropies and KLs."""
    entropies, kls = map(list, zip(*parts))
    return {
        "train_entropy": sum(entropies) / len(parts),
        "train_kl": sum(kls) / len(parts),
        "entropy_curve": entropies,
        "kl_curve": kls,
    }


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (20 * [HEALTHY], ""),
        (20 * [UNIFORM], "COLLAPSE, uniform: "),
        (20 * [ONE_HOT], "COLLAPSE, one-hot: "),
        (12 * [HEALTHY] + 8 * [UNIFORM], "COLLAPSE, uniform: "),  # falls into it, and stays
        (19 * [HEALTHY] + [ONE_HOT], "COLLAPSE, one-hot: "),
        (5 * [ONE_HOT] + 15 * [HEALTHY], ""),  # recovers, as a run with a slow center does
        (5 * [UNIFORM] + 15 * [HEALTHY], ""),
        (10 * [UNIFORM] + 10 * [ONE_HOT], "COLLAPSE, swinging: "),
        (5 * [UNIFORM, HEALTHY, ONE_HOT, HEALTHY], "COLLAPSE, swinging: "),
        (3 * [HEALTHY] + 4 * [ONE_HOT] + 13 * [HEALTHY], "COLLAPSE, swinging: "),
        ([ONE_HOT, HEALTHY, ONE_HOT], "COLLAPSE, swinging: "),
    ],
)
def test_the_verdict_is_on_an_epochs_course_and_not_on_its_mean(parts, said):
    verdict = report.collapse(record_of(parts), 64)
    assert verdict.startswith(said) and bool(verdict) == bool(said)


def test_a_teacher_that_swings_as_measured_is_not_called_healthy(tmp_path):
    record = record_of(SWINGS)
    assert 1 < record["train_entropy"] < 5 and 1 < record["train_kl"], "the means look healthy"
    verdict = report.collapse(record, 256)
    assert verdict.startswith(
        "COLLAPSE, swinging: of the epoch's 20 parts 4 are one-hot and 0 uniform, with others "
        "between, and the entropy goes from 0.000 to 4.040, where ln K = 5.545"
    )
    run, settings = a_run(2.0, 0.5)
    settings.out_dim = 256
    run.history[-1] |= record
    text = paragraph(tmp_path, run, settings)
    assert verdict in text and "No collapse" not in text


@pytest.mark.parametrize("place", [0, 7])
def test_a_collapse_that_is_met_once_and_left_is_none(place):
    """Targets of entropy 5.54 of ln 256 = 5.545 in one part of twenty, the others healthy."""
    parts = [(3.0, 1.0)] * 20
    parts[place] = (5.54, 0.01)
    assert report.collapse(record_of(parts), 256) == ""
    parts[15] = (5.54, 0.01)
    assert "swinging" in report.collapse(record_of(parts), 256)


def test_a_uniform_teacher_is_described_and_nothing_is_said_of_what_is_learnt(tmp_path):
    text = finish(tmp_path, *UNIFORM)
    assert "the teacher's targets are as good as uniform, with an entropy of 4.155" in text
    assert "71.5 % with the teacher" in text and "nothing is learnt" not in text


@pytest.mark.parametrize(
    ("teacher", "before", "pixels", "said"),
    [
        (71.5, 21.5, 50.0, False),
        (25.0, 24.0, 20.0, False),  # a gain of one point is a gain
        (24.0, 24.0, 20.0, True),
        (45.0, 24.0, 46.0, True),  # pixels do as well
        (46.0, 47.0, 20.0, True),
        (100.0, 97.0, 90.0, False),
        (100.0, 100.0, 100.0, False),
        (99.0, 100.0, 20.0, True),
    ],
)
def test_a_longer_run_is_advised_where_training_has_raised_nothing(
    teacher, before, pixels, said, tmp_path
):
    run, settings = a_run(2.0, 0.5)
    run.history[0] |= {"knn_untrained": before, "knn_pixels": pixels}
    run.history[-1] |= {"knn_teacher": teacher}
    text = paragraph(tmp_path, run, settings)
    assert ("The training has not raised it above both" in text) == said
    assert "That is little" not in text


def test_a_loss_without_entropy_has_neither_nats_nor_a_verdict(tmp_path):
    run, settings = a_run(2.0, 0.5)
    for key in ("train_entropy", "train_kl", "knn_teacher", "knn_student"):
        del run.history[-1][key]
    text = paragraph(tmp_path, run, settings)
    assert "After epoch 1 the loss is 2.500.\n" in text
    for word in ("nats", "ln K", "k-NN", "ollapse", "COLLAPSE", "longer run"):
        assert word not in text


def test_the_same_attention_scores_alike_trained_and_untrained(tmp_path):
    """A network compared with itself: the ratio is 1, and every arrow joins equal numbers."""
    run, settings = a_run(2.0, 0.5)
    drawn = make_creatures(3)
    images = Images(drawn.images, drawn.labels, CLASSES, drawn.masks)
    network = run.teacher.backbone
    first, _, *table = report.attention_report(tmp_path, network, network, images, settings, HERE)
    assert "(1.00 times)" in first and len(table) == 4
    for row in table:
        before, after = row.split(": ")[1].rstrip(" %").split(" -> ")
        assert before == after


def test_the_curves_are_those_of_the_log_over_the_baselines():
    run, _ = a_run(2.0, 0.5)
    second = run.history[1] | {"epoch": 1, "train_lr": 0.05, "train_loss": 1.5}
    second.pop("knn_teacher")  # not every epoch has one
    losses, knn, schedules = report.draw_curves([*run.history, second], 64).axes
    shown = {}
    for axes in (losses, knn, schedules):
        for curve in axes.lines:
            values = (list(curve.get_xdata()), list(curve.get_ydata()))
            shown[curve.get_label().partition(":")[0]] = values
    assert shown["train_loss"] == ([1, 2], [2.5, 1.5])
    assert shown["knn_teacher"] == ([1], [71.5])
    assert shown["knn_untrained"] == ([0, 2], [21.5, 21.5])
    assert shown["train_lr"] == ([1, 2], [1.0, 0.5])
    assert shown["ln K"][1] == [math.log(64)] * 2
