"""Algorithm 1 in its order, and what surrounds it: schedules, weight decay, clipping, the frozen
last layer.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import settings
from head import DINOHead
from loss import DINOLoss
from multicrop import MultiCropNetwork, forward_crops
from optimizer import clip_gradients, cosine, make_optimizer, parameter_groups
from runtime import hardware
from runtime.hardware import World
from runtime.lars import LARS
from settings import Settings, parse_settings
from teacher import make_teacher, update_teacher
from train import Schedules, schedules, set_schedules, train_step
from training import report
from training.half import scaled_step
from training.run_state import RunState
from vit import VisionTransformer

HERE = World(0, 1, torch.device("cpu"), torch.float32)
VALUES = Schedules(lr=0.01, weight_decay=0.3, teacher_momentum=0.9, teacher_temp=0.05)
K, B = 13, 3


def parts(seed: int = 0) -> SimpleNamespace:
    """A student, a teacher that differs from it, a center that is not zero, and crops."""
    torch.manual_seed(seed)
    backbone = VisionTransformer(7, 14, embed_dim=22, depth=2, num_heads=2, init_std=0.2)
    student = MultiCropNetwork(
        backbone, DINOHead(22, K, hidden_dim=17, bottleneck_dim=5, init_std=0.2)
    )
    teacher = make_teacher(student)
    for param in teacher.parameters():
        param.add_(0.1 * torch.randn_like(param))
    dino_loss = DINOLoss(K)
    dino_loss.center.normal_(std=0.1)
    crops = [torch.randn(B, 3, size, size) for size in (14, 14, 7, 7, 7)]
    return SimpleNamespace(
        student=student,
        ddp_student=student,
        teacher=teacher,
        dino_loss=dino_loss,
        crops=crops,
        optimizer=make_optimizer("adamw", student),
    )


def step(
    p: SimpleNamespace, micro_batches=None, values=VALUES, clip=0.0, freeze=False, world=HERE
) -> torch.Tensor:
    set_schedules(p.optimizer, values)
    return train_step(
        p.ddp_student,
        p.teacher,
        p.dino_loss,
        p.optimizer,
        micro_batches or [p.crops],
        values._replace(last_layer_frozen=freeze),
        Settings(clip_grad=clip),
        world,
    )


def step_by_hand(p: SimpleNamespace, clip: float) -> torch.Tensor:
    """Loss with the old center and the old teacher, clipping, the student's step, then the EMA,
    then the center.
    """
    student_logits = forward_crops(p.student.backbone, p.student.head, p.crops)
    teacher_logits = forward_crops(p.teacher.backbone, p.teacher.head, p.crops[:2]).detach()
    loss = p.dino_loss(student_logits, teacher_logits, 0.05)
    p.student.zero_grad()
    loss.backward()
    largest = max(param.grad.norm() for param in p.student.parameters() if param.grad is not None)
    clip_gradients(p.student, clip)
    for group in p.optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.01, 0.3 if group["decays"] else 0.0
    p.optimizer.step()
    update_teacher(p.student, p.teacher, 0.9)
    p.dino_loss.center = 0.9 * p.dino_loss.center + 0.1 * teacher_logits.mean(dim=0, keepdim=True)
    return torch.stack([loss.detach(), p.dino_loss.teacher_entropy, p.dino_loss.kl, largest])


def test_the_labs_preset_differs_from_the_demo_as_the_class_is_told():
    """The labs compare the two: fewer epochs and prototypes, and the release's weight decay."""
    demo, lab = (vars(parse_settings(["--preset", name])) for name in ("demo", "lab"))
    differ = {name for name in demo if demo[name] != lab[name]}
    named = {"epochs", "warmup_epochs", "out_dim", "weight_decay", "weight_decay_end"}
    assert differ == named | {"preset", "output_dir", "knn_every"}


@pytest.mark.parametrize(("optimizer", "clip"), [("adamw", 0.0), ("sgd", 0.3)])
def test_a_step_is_algorithm_1(optimizer, clip):
    """And so is the one after it. A clipping is to be seen in SGD: AdamW's steps hardly know a
    gradient's length.

    Not the keys' biases: softmax is blind to them, and AdamW makes whole steps of the rounding of
    their gradient 0.
    """
    p, by_hand = parts(), parts()
    for one in (p, by_hand):
        one.optimizer = make_optimizer(optimizer, one.student)
    for number, mend in ((1, "clipped to clip_grad"), (2, "nothing left of the last step's")):
        metrics, wanted = step(p, clip=clip), step_by_hand(by_hand, clip)
        torch.testing.assert_close(
            metrics,
            wanted,
            msg="loss, entropy and KL are those of the old center, which moves "
            "after the loss; behind them stands the largest gradient's norm, unclipped",
        )
        for which, said in (
            ("student", f"a step with the values given, by this loss's gradient, {mend}"),
            ("teacher", "it averages the student that has made its step, once"),
        ):
            wanted = dict(getattr(by_hand, which).named_parameters())
            for name, ours in getattr(p, which).named_parameters():
                parts_but_keys = slice(None, None, 2) if name.endswith("qkv.bias") else slice(None)
                for a, b in zip(
                    ours.chunk(3)[parts_but_keys],
                    wanted[name].chunk(3)[parts_but_keys],
                    strict=True,
                ):
                    torch.testing.assert_close(
                        a,
                        b,
                        msg=f"after step {number} {name} of the {which} is not Algorithm "
                        f"1's: {said}",
                    )
        torch.testing.assert_close(
            p.dino_loss.center,
            by_hand.dino_loss.center,
            msg="the center must average the logits of the teacher that made this loss",
        )


def losses_of_the_release_written_out(p: SimpleNamespace, steps: int, epoch: int) -> list[float]:
    """Train as main_dino.py does, in its order, from its formulas: AdamW, two groups, one process.

    An epoch has `epoch` steps; the last layer is frozen during the first.
    """
    decaying, others = [], []
    for name, param in p.student.named_parameters():
        if param.requires_grad:
            few = name.endswith(".bias") or param.ndim == 1
            (others if few else decaying).append(param)
    optimizer = torch.optim.AdamW([{"params": decaying}, {"params": others, "weight_decay": 0.0}])
    warmup, losses = epoch, []
    for i in range(steps):
        lr = 0.3 * B / 256 * i / (warmup - 1)
        if i >= warmup:
            half = 0.5 * (1 + math.cos(math.pi * (i - warmup) / (steps - warmup)))
            lr = 1e-5 + (0.3 * B / 256 - 1e-5) * half
        half = 0.5 * (1 + math.cos(math.pi * i / steps))
        optimizer.param_groups[0]["weight_decay"] = 0.4 + (0.04 - 0.4) * half
        momentum = 1 + (0.9 - 1) * half
        for group in optimizer.param_groups:
            group["lr"] = lr

        teacher_logits = p.teacher(p.crops[:2]).detach()
        student_views = (p.student(p.crops) / 0.1).chunk(5)
        targets = ((teacher_logits - p.dino_loss.center) / 0.04).softmax(dim=-1).chunk(2)
        total, terms = 0, 0
        for teacher_view, target in enumerate(targets):
            for student_view, logits in enumerate(student_views):
                if student_view == teacher_view:
                    continue
                total = total + (-target * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
                terms += 1
        loss = total / terms
        center = teacher_logits.sum(dim=0, keepdim=True) / len(teacher_logits)
        p.dino_loss.center = 0.9 * p.dino_loss.center + 0.1 * center

        optimizer.zero_grad()
        loss.backward()
        for name, param in p.student.named_parameters():
            if param.grad is None:
                continue
            scale = 3.0 / (param.grad.norm() + 1e-6)
            if scale < 1:
                param.grad.mul_(scale)
            if i < epoch and "last_layer" in name:
                param.grad = None
        optimizer.step()
        with torch.no_grad():
            pairs = zip(p.student.parameters(), p.teacher.parameters(), strict=True)
            for student_param, teacher_param in pairs:
                teacher_param.mul_(momentum).add_((1 - momentum) * student_param)
        losses.append(loss.item())
    return losses


def test_twenty_steps_are_those_of_the_release_written_out():
    """Schedules, loss, center, clipping, frozen last layer, AdamW and EMA, in a row."""
    steps, epoch = 20, 5
    ours, theirs = parts(), parts()
    settings = Settings(
        epochs=4, lr=0.3, warmup_epochs=1, min_lr=1e-5, momentum_teacher=0.9, clip_grad=3.0
    )
    losses = []
    for i in range(steps):
        now = schedules(settings, i, epoch, B)
        set_schedules(ours.optimizer, now)
        metrics = train_step(
            ours.student, ours.teacher, ours.dino_loss, ours.optimizer, [ours.crops], now,
            settings, HERE,
        )
        losses.append(metrics[0].item())
    wanted = losses_of_the_release_written_out(theirs, steps, epoch)
    assert losses == pytest.approx(wanted, rel=1e-4)
    assert abs(losses[-1] - losses[0]) > 0.05, "something must have been trained"
    torch.testing.assert_close(ours.dino_loss.center, theirs.dino_loss.center, atol=1e-4, rtol=1e-3)


def test_a_step_calls_the_student_that_knows_the_other_processes(monkeypatch):
    """And moves the teacher to the student inside it, whose parameters have the teacher's names."""

    class Wrapped(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, crops):
            calls.append(1)
            return self.module(crops)

    p, calls = parts(), []
    monkeypatch.setattr(hardware, "DistributedDataParallel", Wrapped)
    p.ddp_student = Wrapped(p.student)
    step(p)
    assert calls == [1], (
        "the crops go through the wrapped student, which averages the gradients: once"
    )


class WithAnother(World):
    """A second process whose values are larger by 2: the mean over both is larger by 1."""

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 1


def test_the_center_averages_the_logits_of_all_processes():
    alone, together = parts(), parts()
    step(alone)
    step(together, world=WithAnother(0, 1, torch.device("cpu"), torch.float32))
    torch.testing.assert_close(
        together.dino_loss.center,
        alone.dino_loss.center + 0.1,
        msg="Eq. 4 sums over the whole "
        "batch, of which each process has a part: world.mean(the teacher's logits)",
    )


def test_the_teacher_sees_the_two_global_views_only():
    p, other = parts(), parts()
    other.crops[2:] = [torch.randn_like(crop) for crop in other.crops[2:]]
    step(p), step(other)
    torch.testing.assert_close(
        p.dino_loss.center,
        other.dino_loss.center,
        msg="other local crops must not change what the teacher says",
    )


def test_accumulated_micro_batches_are_one_step_of_the_whole_batch():
    whole, pieces = parts(), parts()
    for p in (
        whole,
        pieces,
    ):  # AdamW would blow the rounding of gradients near zero up to whole steps
        p.optimizer = make_optimizer("sgd", p.student)
    metrics = step(whole)
    alone = [[crop[i : i + 1] for crop in pieces.crops] for i in range(B)]
    torch.testing.assert_close(
        step(pieces, alone),
        metrics,
        msg="the metrics are means over the micro-batches, whose "
        "losses all use the center from before the step",
    )
    for name in ("student", "teacher"):
        for a, b in zip(
            getattr(whole, name).parameters(), getattr(pieces, name).parameters(), strict=True
        ):
            torch.testing.assert_close(
                a,
                b,
                atol=1e-5,
                rtol=1e-4,
                msg=f"the {name} must move once a step, by the mean "
                "of the micro-batches' gradients",
            )
    torch.testing.assert_close(
        whole.dino_loss.center,
        pieces.dino_loss.center,
        msg="the center moves once a step, by the mean over all micro-batches",
    )


def test_a_frozen_last_layer_does_not_move_and_the_rest_does():
    p = parts()
    before = copy.deepcopy(p.student.state_dict())
    step(p, freeze=True)
    moved = {
        name
        for name, value in p.student.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert not any("last_layer" in name for name in moved), (
        "a frozen last layer must get no gradient"
    )
    assert "head.mlp.4.weight" in moved, "the layers before the last one must train"
    norms = []
    for freeze in (False, True):
        p = parts()
        p.student.head.last_layer.weight_v.data *= 1e-3  # whose gradient is the largest then
        norms.append(step(p, freeze=freeze)[3].item())
    assert norms[0] == norms[1], (
        "the norm is of all gradients, a frozen layer's too: clip first, then drop them"
    )


def test_clipping_is_per_tensor_and_not_global():
    p = parts()
    for i, param in enumerate(p.student.parameters()):
        param.grad = torch.full_like(param, 10.0 if i % 2 else 1e-4)
    clip_gradients(p.student, 3.0)
    for i, param in enumerate(p.student.parameters()):
        size = param.numel() ** 0.5 * (10.0 if i % 2 else 1e-4)
        assert param.grad.norm().item() == pytest.approx(min(3.0, size), rel=1e-4)


def test_no_clipping_at_zero():
    p = parts()
    for param in p.student.parameters():
        param.grad = torch.full_like(param, 100.0)
    clip_gradients(p.student, 0.0)
    assert all(param.grad.eq(100).all() for param in p.student.parameters())


def test_biases_and_norms_do_not_decay_but_positions_and_cls_do():
    student = parts().student
    names = {id(param): name for name, param in student.named_parameters()}
    groups = parameter_groups(student)
    decaying, rest = ({names[id(param)] for param in group["params"]} for group in groups)
    assert [(group["decays"], group.get("weight_decay")) for group in groups] == [
        (True, None),
        (False, 0.0),
    ], "the second group has a weight_decay of 0.0, since AdamW's own is 0.01"
    assert all(name.endswith("bias") or "norm" in name for name in rest), (
        f"these must decay: {sorted(rest)}"
    )
    assert not any(name.endswith("bias") or "norm" in name for name in decaying), (
        "biases and the scales of normalisations, which have one axis, must not decay"
    )
    assert {
        "backbone.pos_embed",
        "backbone.cls_token",
        "head.mlp.0.weight",
        "head.last_layer.weight_v",
    } <= decaying, "positions, [CLS], matrices and prototypes have more than one axis, and decay"
    assert "head.last_layer.weight_g" not in decaying | rest, "the frozen gain is not optimised"


def test_the_schedules_scale_lr_with_the_batch_and_end_where_the_paper_says():
    settings = Settings(
        epochs=20, warmup_epochs=10, warmup_teacher_temp_epochs=5, teacher_temp=0.07
    )
    first, peak, last = (schedules(settings, step, 7, 512) for step in (0, 70, 139))
    assert (
        first.lr == 0
        and peak.lr == pytest.approx(0.001)
        and last.lr == pytest.approx(1e-6, abs=2e-6)
    )
    assert first.teacher_temp == 0.04 and last.teacher_temp == 0.07
    assert first.weight_decay == pytest.approx(0.04) and last.weight_decay == pytest.approx(
        0.4, abs=1e-3
    )
    assert peak.teacher_momentum == pytest.approx(cosine(70, 140, 0.996, 1.0))
    assert [schedules(settings, step, 7, 512).last_layer_frozen for step in (0, 6, 7)] == [
        True,
        True,
        False,
    ]


def test_the_teachers_momentum_goes_to_its_own_end():
    settings = Settings(epochs=20, momentum_teacher=0.99, momentum_teacher_end=0.998)
    first, middle, last = (schedules(settings, step, 7, 512) for step in (0, 70, 140))
    assert first.teacher_momentum == pytest.approx(0.99)
    assert middle.teacher_momentum == pytest.approx(0.994)
    assert last.teacher_momentum == pytest.approx(0.998)


@pytest.mark.parametrize("epochs, last", [(0.5, 3), (1.3, 8), (0.07, 0), (2.0, 13)])
def test_a_warm_up_of_a_fraction_of_an_epoch_rises_to_the_peak_and_never_above(epochs, last):
    """Of 7 steps an epoch: its last step, the nearest whole number of steps less 1, is the peak."""
    settings = Settings(epochs=3, warmup_epochs=epochs, lr=1.0, min_lr=0.0)
    rates = [schedules(settings, step, 7, 256).lr for step in range(21)]
    assert max(rates) == rates[last] == 1.0
    assert rates[: last + 1] == sorted(rates[: last + 1]), "rising"
    assert rates[last:] == sorted(rates[last:], reverse=True), "falling"


def test_the_teacher_temperatures_warm_up_may_be_fractional_too():
    settings = Settings(epochs=3, warmup_teacher_temp_epochs=0.5, teacher_temp=0.07)
    temps = [schedules(settings, step, 7, 256).teacher_temp for step in range(6)]
    assert temps == pytest.approx([0.04, 0.0475, 0.055, 0.0625, 0.07, 0.07])


def test_lars_scales_matrices_to_a_share_of_their_norm_and_leaves_vectors_alone():
    matrix, vector = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(7))
    old_matrix, old_vector = matrix.detach().clone(), vector.detach().clone()
    optimizer = LARS([matrix, vector], lr=0.5, weight_decay=0.0)
    matrix.grad, vector.grad = torch.randn(5, 3), torch.randn(7)
    optimizer.step()
    assert (matrix - old_matrix).norm().item() == pytest.approx(
        0.5 * 0.001 * old_matrix.norm().item(), rel=1e-4
    )
    torch.testing.assert_close(vector.detach(), old_vector - 0.5 * vector.grad)


def test_a_step_in_bf16_is_near_the_step_in_fp32():
    full, half = parts(), parts()
    types = []
    half.dino_loss.register_forward_pre_hook(
        lambda _, logits: types.extend(one.dtype for one in logits[:2])
    )
    close = step(half, world=World(0, 1, torch.device("cpu"), torch.bfloat16))
    assert types == [torch.bfloat16] * 2, (
        "both networks run under world.autocast(), which makes their logits bf16"
    )
    torch.testing.assert_close(
        close, step(full), atol=0.05, rtol=0.05, msg="bf16 has another loss than fp32"
    )
    assert all(param.dtype == torch.float32 for param in half.student.parameters()), (
        "the weights themselves stay fp32"
    )


def scaled_run(init_scale: float) -> tuple[SimpleNamespace, RunState, Callable]:
    """Parts that train in fp16, from this scale of the loss on."""
    p = parts()
    p.optimizer = make_optimizer("sgd", p.student)
    set_schedules(p.optimizer, VALUES)
    run = RunState(p.student, p.teacher, p.dino_loss, p.optimizer)
    world = World(0, 1, torch.device("cpu"), torch.float16)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    scaled = scaled_step(train_step, run.scaler)

    def step() -> torch.Tensor:
        return scaled(
            p.student,
            p.teacher,
            p.dino_loss,
            p.optimizer,
            [p.crops, p.crops],
            VALUES,
            Settings(clip_grad=0.3),
            world,
            update_teacher,
        )

    return p, run, step


def test_a_step_in_fp16_is_near_the_step_in_fp32_whatever_the_scale_of_its_loss():
    full = parts()
    full.optimizer = make_optimizer("sgd", full.student)
    before = copy.deepcopy(full.student)
    wanted = step(full, [full.crops, full.crops], clip=0.3)
    for scale in (1.0, 256.0, 1024.0):
        p, run, half_step = scaled_run(scale)
        torch.testing.assert_close(half_step()[:3], wanted[:3], atol=0.02, rtol=0.02)
        assert run.scaler.get_scale() == scale
        for old, a, b in zip(
            before.parameters(), full.student.parameters(), p.student.parameters(), strict=True
        ):
            moved = (a - old).norm()
            assert (a - b).norm() <= 0.1 * moved + 1e-6, (
                f"at a scale of {scale} the weights must move as in fp32: unscale, then clip"
            )


def test_a_step_in_fp16_whose_gradients_overflow_leaves_the_student_and_halves_the_scale():
    p, run, half_step = scaled_run(2.0**24)
    before = copy.deepcopy(p.student.state_dict())
    metrics = half_step()
    assert metrics.isfinite().all(), "an overflow is no fault: the loss itself is finite"
    for name, value in p.student.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} moved by a gradient that overflowed"
    assert run.scaler.get_scale() == 2.0**23


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_every_optimiser_lowers_the_loss(name):
    p = parts()
    p.optimizer = make_optimizer(name, p.student)
    values = VALUES._replace(
        lr={"adamw": 0.003, "sgd": 0.1, "lars": 5.0}[name], weight_decay=0.0, teacher_momentum=1.0
    )
    losses = [step(p, values=values)[0].item() for _ in range(15)]
    assert losses[-1] < losses[0]


def test_collapses_are_called_by_their_names_and_health_is_not():
    verdict = lambda entropy, kl, out_dim: report.collapse(
        {"train_entropy": entropy, "train_kl": kl}, out_dim
    )
    assert "uniform" in verdict(F.softmax(torch.zeros(5), 0).log().neg().mean().item(), 0.001, 5)
    assert "uniform" in verdict(0.97 * math.log(61), 0.001, 61), (
        "almost uniform, and the same for every image"
    )
    assert not verdict(0.97 * math.log(61), 0.5, 61), (
        "almost uniform, as at a start, and different for each image"
    )
    assert "one-hot" in verdict(0.01, 0.01, 4096)
    assert not verdict(0.1, 1.5, 4096) and not verdict(5.0, 0.5, 4096)
    assert not report.collapse({"train_loss": 0.001}, 4096), (
        "a loss without these parts has no verdict"
    )


def test_presets_are_overridden_by_single_flags_and_the_data_picks_the_default():
    assert parse_settings([]).preset == "demo" and parse_settings([]).arch == "vit_nano"
    changed = parse_settings(
        ["--preset", "vits8", "--out_dim", "4096", "--global_crops_scale", "0.3", "1"]
    )
    assert (changed.patch_size, changed.out_dim, changed.global_crops_scale) == (
        8,
        4096,
        (0.3, 1.0),
    )


@pytest.mark.parametrize(("number", "preset"), [(12, "photos"), (13, "vits16"), (0, "photos")])
def test_few_images_have_another_default_recipe_than_many(tmp_path, monkeypatch, number, preset):
    """What counts are images, in class folders too, and no other files."""
    monkeypatch.setattr(settings, "MANY_IMAGES", 13)
    (tmp_path / "dogs").mkdir()
    (tmp_path / "notes.txt").touch()
    for i in range(number):
        Path(tmp_path, "dogs" if i % 2 else "", f"{i}.jpg").touch()
    assert parse_settings(["--data_path", str(tmp_path)]).preset == preset
    assert parse_settings(["--data_path", str(tmp_path), "--preset", "small"]).preset == "small"


def test_of_torchvisions_datasets_imagenet_alone_has_the_papers_recipe():
    assert parse_settings(["--dataset", "imagenet"]).preset == "vits16"
    assert parse_settings(["--dataset", "cifar10"]).preset == "photos"


def test_a_momentum_above_a_presets_end_rises_to_one_as_in_the_release():
    assert parse_settings(["--momentum_teacher", "0.9995"]).momentum_teacher_end == 1.0
    assert parse_settings(["--momentum_teacher", "0.98"]).momentum_teacher_end == 0.99


def test_the_authors_weights_come_with_their_recipe():
    given = ["--dataset", "cifar10", "--init_from", "dino_vits16"]
    assert parse_settings(given).preset == "vits16"


def test_the_defaults_are_the_releases():
    defaults = Settings()
    assert (
        defaults.out_dim,
        defaults.momentum_teacher,
        defaults.teacher_temp,
        defaults.lr,
        defaults.min_lr,
        defaults.weight_decay,
        defaults.weight_decay_end,
        defaults.clip_grad,
        defaults.batch_size_per_gpu,
        defaults.epochs,
        defaults.local_crops_number,
        defaults.drop_path_rate,
        defaults.norm_last_layer,
    ) == (65536, 0.996, 0.04, 0.0005, 1e-6, 0.04, 0.4, 3.0, 64, 100, 8, 0.1, True)


RELEASED = {  # each run's args.txt, as public copies have it: what differs from the defaults
    "vanilla": {},
    "vits16": {
        "clip_grad": 0,
        "min_lr": 1e-5,
        "epochs": 800,
        "batch_size_per_gpu": 64,
        "global_crops_scale": (0.25, 1.0),
        "local_crops_scale": (0.05, 0.25),
        "local_crops_number": 10,
        "warmup_teacher_temp": 0.04,
        "teacher_temp": 0.07,
        "warmup_teacher_temp_epochs": 30,
        "norm_last_layer": False,
        "precision": "fp32",
    },
    "vits8": {
        "patch_size": 8,
        "clip_grad": 3.0,
        "min_lr": 1e-6,
        "epochs": 800,
        "batch_size_per_gpu": 16,
        "global_crops_scale": (0.4, 1.0),
        "local_crops_scale": (0.05, 0.4),
        "local_crops_number": 10,
        "warmup_teacher_temp": 0.04,
        "teacher_temp": 0.07,
        "warmup_teacher_temp_epochs": 30,
        "norm_last_layer": False,
        "precision": "fp32",
    },
    "vitb16": {
        "arch": "vit_base",
        "lr": 7.5e-4,
        "min_lr": 2e-6,
        "clip_grad": 0.3,
        "freeze_last_layer": 3,
        "epochs": 400,
        "batch_size_per_gpu": 32,
        "global_crops_scale": (0.25, 1.0),
        "local_crops_scale": (0.05, 0.25),
        "local_crops_number": 10,
        "warmup_teacher_temp": 0.04,
        "teacher_temp": 0.07,
        "warmup_teacher_temp_epochs": 50,
        "norm_last_layer": True,
        "precision": "fp32",
    },
    "vitb8": {
        "arch": "vit_base",
        "patch_size": 8,
        "lr": 5e-4,
        "min_lr": 2e-6,
        "clip_grad": 3.0,
        "freeze_last_layer": 3,
        "epochs": 300,
        "batch_size_per_gpu": 6,
        "global_crops_scale": (0.25, 1.0),
        "local_crops_scale": (0.05, 0.25),
        "local_crops_number": 10,
        "warmup_teacher_temp": 0.03,
        "teacher_temp": 0.07,
        "warmup_teacher_temp_epochs": 50,
        "norm_last_layer": True,
        "precision": "fp32",
    },
    "resnet50": {
        "arch": "resnet50",
        "optimizer": "lars",
        "lr": 0.3,
        "min_lr": 4.8e-3,
        "weight_decay": 1e-6,
        "weight_decay_end": 1e-6,
        "clip_grad": 0,
        "out_dim": 60000,
        "use_bn_in_head": True,
        "epochs": 800,
        "batch_size_per_gpu": 51,
        "global_crops_scale": (0.14, 1.0),
        "local_crops_scale": (0.05, 0.14),
        "local_crops_number": 6,
        "warmup_teacher_temp": 0.04,
        "teacher_temp": 0.07,
        "warmup_teacher_temp_epochs": 50,
        "norm_last_layer": True,
        "precision": "fp32",
    },
}


def test_the_preset_of_imagenette_is_the_published_recipe():
    """ViT-S/16, 200 epochs of 128 images a step, 2 x 224 + 6 x 96, K 65536, rate 5e-4, teacher
    temperature 0.04 -> 0.07, momentum 0.996 -> 1.
    """
    settings = parse_settings(["--preset", "imagenette"])
    assert (settings.arch, settings.patch_size, settings.out_dim) == ("vit_small", 16, 65536)
    assert (settings.epochs, settings.batch_size_per_gpu) == (200, 128)
    sizes = (settings.global_crops_size, settings.local_crops_size, settings.local_crops_number)
    assert sizes == (224, 96, 6)
    values = schedules(settings, 10 * 73, epoch_steps=73, images_per_step=128)
    assert values.lr == pytest.approx(5e-4) and values.teacher_momentum > 0.996
    assert schedules(settings, 0, 73, 128).teacher_momentum == pytest.approx(0.996)
    assert schedules(settings, 0, 73, 128).teacher_temp == pytest.approx(0.04)
    assert schedules(settings, 30 * 73, 73, 128).teacher_temp == pytest.approx(0.07)


@pytest.mark.parametrize("preset", RELEASED)
def test_a_preset_is_the_run_whose_numbers_stand_beside_it(preset):
    """Every setting: what the run's arguments do not name has the release's default."""
    settings = parse_settings(["--preset", preset])
    assert settings == replace(Settings(), preset=preset, **RELEASED[preset])
