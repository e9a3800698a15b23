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
    run, settings = a_run(entropy, kl)
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
