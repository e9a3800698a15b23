"""Numbers that are not finite stop the run in their step, which says where they came from; extremes
stay finite.
"""

import math

import pytest
import torch
from test_report import a_run
from test_runs import TINY, write_photos
from test_train import HERE, parts, step

import train
from ablations.variants import SinkhornLoss
from head import DINOHead
from loss import DINOLoss
from runtime.commandline import InputError
from runtime.hardware import World
from settings import Settings
from train import Schedules
from training.checkpoint import read_checkpoint
from training.report import require_finite
from training.run_state import save_run

pytestmark = [pytest.mark.faults, pytest.mark.slow]


def told(p, micro_batches=None) -> str:
    """What a step's numbers make require_finite say, as the seventh step of the third epoch."""
    with pytest.raises(InputError) as stopped:
        metrics = step(p, micro_batches)[None]
        require_finite(metrics, metrics, 3, 7, micro_batches or [p.crops], p.student)
    return str(stopped.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("view", [0, 4])
def test_a_bad_batch_is_named_by_its_view(view, value):
    p = parts()
    p.crops[view][1, 2, 3, 3] = value
    said = told(p)
    assert (
        f"first bad: view {view + 1} of the batch" in said
        and "epoch 3, step 7" in said
        and "--lr" in said
    )


def test_a_bad_logit_is_named_by_its_network():
    """Weights so large that a logit overflows: the teacher's also make the entropy NaN, the
    student's only the KL.
    """
    for network, name in (("student", "student's"), ("teacher", "teacher's")):
        p = parts()
        with torch.no_grad():
            getattr(p, network).backbone.norm.weight.fill_(math.inf)
        assert f"first bad: the {name} logits" in told(p)


def test_a_bad_gradient_under_a_good_loss_is_named_by_its_parameter():
    """The loss alone would notice it a step later, when the weights are lost."""
    p = parts()
    p.student.head.mlp[2].weight.register_hook(lambda gradient: gradient * math.nan)
    said = told(p)
    assert "a gradient's norm is nan" in said and "the gradient of head.mlp.2.weight" in said


def test_steps_that_are_finite_pass_and_the_first_bad_of_several_is_told():
    p = parts()
    good = step(p)
    require_finite(torch.stack([good, good]), torch.stack([good, good]), 1, 2, [p.crops], p.student)
    bad = torch.stack([good, good * math.nan, good * math.nan])
    with pytest.raises(
        InputError, match="step 5, first bad: not known"
    ):  # the crops at hand are those of step 6
        require_finite(bad, bad, 1, 6, [p.crops], p.student)


def test_what_is_bad_in_another_process_is_not_sought_in_ones_own():
    p = parts()
    good = step(p)[None]
    with pytest.raises(InputError, match="first bad: in another process"):
        require_finite(good * math.nan, good, 1, 1, [p.crops], p.student)


@pytest.mark.parametrize("last_step", [1, 6])
def test_a_bad_gradient_stops_the_run_in_its_step_and_spares_the_checkpoint(
    last_step, tmp_path, capsys, monkeypatch
):
    """Also in an epoch's last step, after which the checkpoint would have been written."""
    photos, clip, calls = (
        write_photos(tmp_path / "photos"),
        train.clip_gradients,
        iter(range(1, 100)),
    )

    def poison(student, max_norm):
        if next(calls) == 6 + last_step:  # in the second epoch of six steps
            student.backbone.cls_token.grad[..., 0] = math.inf
        return clip(student, max_norm)

    monkeypatch.setattr(train, "clip_gradients", poison)
    with pytest.raises(SystemExit) as stopped:
        train.main(
            [
                *TINY,
                "--data_path",
                str(photos),
                "--output_dir",
                str(tmp_path / "run"),
                "--log_every",
                "1" if last_step == 1 else "4",
            ]
        )  # so that it is read in that step
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2
    assert (
        f"a gradient's norm is inf at epoch 2, step {last_step}, "
        "first bad: the gradient of backbone.cls_tok" in said
    )
    kept = read_checkpoint(tmp_path / "run/checkpoint.pth")
    assert kept["epoch"] == 1 and all(value.isfinite().all() for value in kept["student"].values())


@pytest.mark.parametrize("part", ["student", "teacher", "dino_loss"])
def test_weights_or_a_center_that_are_not_finite_are_not_saved(part, tmp_path):
    run, settings = a_run(2.0, 0.5)
    save_run(tmp_path / "checkpoint.pth", run, settings)
    with torch.no_grad():
        next(iter(getattr(run, part).state_dict().values())).view(-1)[0] = math.nan
    before = (tmp_path / "checkpoint.pth").read_bytes()
    with pytest.raises(InputError, match=rf"{part}\.\w+.* is not finite after 1 epochs"):
        save_run(tmp_path / "checkpoint.pth", run, settings)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("K", [4099, 262_144])
@pytest.mark.parametrize("temp", [0.01, 0.04])
def test_low_temperatures_and_many_prototypes_stay_finite(temp, K, dtype):
    """Logits at the ends of what cosines can be, and the center far off: exp(1 / 0.01) alone would
    be infinite.
    """
    torch.manual_seed(0)
    head, dino_loss = (
        DINOHead(7, K, hidden_dim=11, bottleneck_dim=5),
        DINOLoss(K, student_temp=temp),
    )
    dino_loss.center.uniform_(-1, 1)
    features = torch.randn(4 * 2, 7, requires_grad=True)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits = head(features * 100)
    teacher = logits.detach()[:4].clone()
    teacher[0], teacher[1], teacher[2, 0] = -1, 1, 1
    loss = dino_loss(logits, teacher, temp)
    loss.backward()
    for name, value in (
        ("loss", loss),
        ("entropy", dino_loss.teacher_entropy),
        ("KL", dino_loss.kl),
        ("features' gradient", features.grad),
        *((name, param.grad) for name, param in head.named_parameters() if param.grad is not None),
    ):
        assert value.isfinite().all(), (
            f"{name} is not finite at temperature {temp}, K = {K}, {dtype}"
        )
    assert dino_loss.teacher_entropy >= 0 and dino_loss.teacher_entropy <= math.log(K) * 1.001


@pytest.mark.parametrize("iterations", [1, 3])
def test_the_other_assignments_stay_finite_at_the_lowest_temperature(iterations):
    dino_loss = SinkhornLoss(31, student_temp=0.01, iterations=iterations)
    logits = torch.randn(12, 31).sign().requires_grad_()
    dino_loss(logits, logits.detach()[:6], 0.01).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_at_the_lowest_temperature_stay_finite(dtype):
    p, values = (
        parts(),
        Schedules(lr=0.01, weight_decay=0.3, teacher_momentum=0.9, teacher_temp=0.01),
    )
    p.dino_loss.student_temp = 0.01
    world = World(0, 1, HERE.device, dtype)
    for _ in range(7):
        train.set_schedules(p.optimizer, values)
        metrics = train.train_step(
            p.student, p.teacher, p.dino_loss, p.optimizer, [p.crops], values, Settings(), world
        )
        require_finite(metrics[None], metrics[None], 1, 1, [p.crops], p.student)
