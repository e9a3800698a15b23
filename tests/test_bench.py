"""The plain versions compute what ours compute, else the ratios would compare different work; and the bench counts,
times and refuses as it says."""
import json
import os
import time
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from bench import __main__ as bench
from bench import measure, plain
from bench import step as bench_step
from eval_knn import knn_votes, nearest_neighbours
from loss import DINOLoss
from optimizer import clip_gradients
from runtime.commandline import InputError
from runtime.hardware import World
from settings import Settings
from teacher import make_teacher, update_teacher
from training.run_state import build_student
from vit import VisionTransformer

HERE = World(0, 1, torch.device("cpu"), torch.float32)
TINY = Settings(arch="vit_nano", patch_size=8, global_crops_size=24, local_crops_size=16, local_crops_number=3,
                out_dim=13, batch_size_per_gpu=2, drop_path_rate=0.0)
FLAGS = ["--arch", "vit_nano", "--patch_size", "8", "--global_crops_size", "16", "--local_crops_size", "8",
         "--local_crops_number", "1", "--out_dim", "13", "--batch_size", "2", "--turns", "1", "--device", "cpu"]


def same(one: nn.Module, other: nn.Module, what: str, tolerance: float = 1e-5) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance, msg=f"{what} differs in {name}")


def test_the_plain_loss_and_its_gradient_are_ours():
    """Eq. 3 and its derivative, one pair of views after the other."""
    student, teacher = torch.randn(35, 11, requires_grad=True), torch.randn(14, 11)
    gradients = []
    for kind in (DINOLoss, plain.PlainLoss):
        loss = kind(11)(student, teacher, 0.07)
        gradients.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("side", [21, 35])
def test_the_plain_vit_has_our_features_and_gradients(side):
    """Every token through every block gives the same [CLS], at the learnt grid and at an interpolated one."""
    ours = VisionTransformer(7, 21, embed_dim=22, depth=3, num_heads=2)
    other = plain.plain_copy(ours)
    images, direction = torch.randn(5, 3, side, side), torch.randn(5, 22)
    features = [network(images) for network in (ours, other)]
    torch.testing.assert_close(*features, msg="the plain ViT has other features")
    for one in features:
        (one * direction).sum().backward()
    for (name, a), b in zip(ours.named_parameters(), other.parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 1e-5 * b.grad.norm(), f"the gradient of {name} differs"


def test_nothing_of_ours_is_left_in_the_plain_network():
    """A plain version that shares a fast part hides what the part gains."""
    network = plain.plain_copy(build_student(TINY))
    left = {type(module).__name__ for module in network.modules() if type(module) in plain.PLAIN}
    assert not left, f"{left} compute as ours do"
    assert type(network.backbone.blocks[0].attn) is plain.PlainAttention


def test_the_plain_clipping_is_ours():
    """Each tensor by itself: one gradient above the limit, one below it."""
    ours, other = nn.Linear(3, 5), nn.Linear(3, 5)
    for layer in (ours, other):
        layer.weight.grad, layer.bias.grad = torch.full((5, 3), 2.0), torch.full((5,), 0.1)
    clip_gradients(ours, 3.0)
    plain.plain_clip_gradients(other, 3.0)
    assert ours.weight.grad.norm() == pytest.approx(3, abs=1e-4)
    for one, two in zip(ours.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_the_plain_teacher_is_ours():
    """theta_t <- lambda theta_t + (1 - lambda) theta_s."""
    student, ours = nn.Linear(3, 5), make_teacher(nn.Linear(3, 5))
    other = make_teacher(ours)
    update_teacher(student, ours, 0.7)
    plain.plain_update_teacher(student, other, 0.7)
    same(ours, other, "the teacher")


def test_the_plain_k_nn_votes_are_ours():
    """Up to a common factor."""
    train, test, labels = torch.randn(101, 7), torch.randn(211, 7), torch.randint(5, (101,))
    cosines, nearest = nearest_neighbours(train, test, 20)
    ours = knn_votes(cosines, labels[nearest], 5)
    other = plain.plain_knn(train, labels, test, 5)
    torch.testing.assert_close(ours / ours.sum(1, keepdim=True), other / other.sum(1, keepdim=True))


def test_the_plain_crops_have_our_shapes_and_scale(tmp_path):
    """The same number and sizes, normalised alike; their pixels are drawn otherwise."""
    image = Image.effect_mandelbrot((97, 71), (-2, -1, 1, 1), 30).convert("RGB")
    image.save(tmp_path / "one.png")
    ours, other = bench.make_crops(TINY)
    views = [ours(image), plain.PlainImages([tmp_path / "one.png"], other)[0]]
    assert [view.shape for view in views[0]] == [view.shape for view in views[1]]
    means = [torch.stack([crops(image)[0].mean() for _ in range(60)]).mean() for crops in (ours, other)]
    torch.testing.assert_close(*means, atol=0.25, rtol=0, msg="the views are normalised differently")


def test_the_plain_step_is_ours():
    """Algorithm 1: the same loss and the same clipped gradients (a tenth of each is Adam's average)."""
    torch.manual_seed(0)
    crops = bench_step.random_crops(TINY, HERE)
    ours, other = bench_step.make_ours(TINY, HERE), bench_step.make_plain(TINY, HERE)
    assert ours.step(crops)[0].item() == pytest.approx(other.step(crops), abs=1e-5), "the losses differ"
    torch.testing.assert_close(ours.dino_loss.center, other.dino_loss.center)
    same(ours.teacher, other.teacher, "the teacher")
    for (name, one), two in zip(ours.student.named_parameters(), other.student.parameters(), strict=True):
        if one.requires_grad:
            gradients = [of.optimizer.state[weight]["exp_avg"] * 10 for of, weight in ((ours, one), (other, two))]
            torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3, msg=f"the gradient of {name} differs")


@pytest.mark.parametrize("make", [bench_step.make_ours, bench_step.make_plain])
def test_the_parts_together_are_the_step(make):
    """The breakdown would else be of another step: two of each leave the same student, teacher and center."""
    settings = replace(TINY, drop_path_rate=0.3)
    whole, parts = make(settings, HERE), make(settings, HERE)
    for step in range(2):
        crops = bench_step.random_crops(settings, HERE)
        torch.manual_seed(step)
        whole.step(crops)
        torch.manual_seed(step)
        laps = bench_step.step_in_parts(parts, crops, HERE)
    for name in ("student", "teacher"):
        same(getattr(whole, name), getattr(parts, name), f"the {name}", tolerance=1e-7)
    torch.testing.assert_close(whole.dino_loss.center, parts.dino_loss.center)
    assert list(laps) == ["teacher", "student", "head", "loss", "backward", "clip", "optimiser", "EMA, center"]


def test_the_work_is_counted_with_the_formulas():
    """A linear layer: 2 B D K; attention: 2 products of 2 B h N N d each, whichever kernel computes it."""
    assert measure.flops(lambda: nn.Linear(7, 11, bias=False)(torch.ones(5, 7))) == 2 * 5 * 7 * 11
    q = torch.randn(2, 3, 13, 8)
    assert measure.flops(lambda: scaled_dot_product_attention(q, q, q)) == 2 * 2 * 2 * 3 * 13 * 13 * 8
    work, flops = measure.square_matmul(HERE.device, torch.float32)
    assert measure.flops(work) == flops


def test_works_take_turns():
    """a b, b a, a b: a machine that drifts treats both alike; and two turns are made whatever they take."""
    calls = []
    times = measure.in_turn([lambda: calls.append("a"), lambda: calls.append("b")], 3, 60.0, HERE.device)
    assert "".join(calls) == "ab" + "abbaab", "a warm-up and three turns were wanted"
    assert len(times) == 3 and all(len(turn) == 2 for turn in times)
    slow, quick = zip(*measure.in_turn([lambda: time.sleep(0.02), lambda: None], 2, 0.0, HERE.device), strict=True)
    assert min(slow) > 0.02 > max(quick), "the times were told of the wrong work"
    assert list(measure.turns(7, 0.0)) == [0, 1] and list(measure.turns(1, 0.0)) == [0]


def test_the_ratio_is_the_turns_median():
    """plain / ours, so above 1 ours is faster."""
    row = bench.time_row("x", [[0.1, 0.3], [0.2, 0.4], [0.1, 0.1]], images=6)
    assert row["ratio"] == pytest.approx(2) and row["ours"] == pytest.approx(100)
    assert row["images_per_s"] == pytest.approx(60) and row["plain_images_per_s"] == pytest.approx(20)


def test_memory_that_does_not_suffice_is_named():
    """A killed process and a refused allocation are one kind of error, with the mend."""
    with pytest.raises(MemoryError):
        measure.in_fresh_process(os._exit, 1)
    with pytest.raises(InputError, match="lower --batch_size"), measure.full_memory_in_one_line():
        torch.empty(2 ** 55)


@pytest.mark.parametrize(("flags", "said"), [
    ("--parts step lunch", "invalid choice: 'lunch'"),
    ("--arch vit_giant", "--arch vit_giant is unknown"),
    ("--patch_size 7", "--global_crops_size 16 is no multiple of --patch_size 7"),
    ("--patch_size 0", "--patch_size 0 must be at least 1"),
    ("--batch_size 0", "--batch_size 0 must be at least 1"),
    ("--turns 0", "--turns 0 must be at least 1"),
    ("--seconds -1", "--seconds -1.0 must be at least 0"),
    ("--seconds nan", "--seconds nan must be at least 0"),
    ("--threads -2", "--threads -2 must be at least 0"),
    ("--num_workers -2", "--num_workers -2 must be"),
    ("--data_path nowhere", "'nowhere' is not there"),
    ("--drop_path_rate 1", "--drop_path_rate 1.0 must be below 1"),
])
def test_a_bad_flag_is_named_in_one_line(flags, said, capsys):
    """Exit status 2, before anything is measured."""
    with pytest.raises(SystemExit) as stopped:
        bench.main([*FLAGS, *flags.split()])
    written = capsys.readouterr()
    assert stopped.value.code == 2 and said in written.err and len(written.err.strip().splitlines()) == 1, written.err
    assert "images/s" not in written.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_asking_for_cuda_where_there_is_none(capsys):
    with pytest.raises(SystemExit):
        bench.main([*FLAGS, "--device", "cuda"])
    assert "--device cuda is not available here" in capsys.readouterr().err


@pytest.mark.slow
def test_the_bench_prints_a_row_for_each_part(capsys):
    """All but k-NN, whose size is fixed; a row says what it belongs to."""
    bench.main([*FLAGS, "--json", "--num_workers", "0", "--parts", *(set(bench.PARTS) - {"knn"})])
    rows = {row["part"].strip(): row for row in map(json.loads, capsys.readouterr().out.splitlines())}
    assert set(rows) > {"crops", "loader", "loss", "EMA", "step", "work", "backward", "memory", "end to end"}
    assert all(row["ratio"] > 0 and row["torch"] == torch.__version__ for row in rows.values() if row["ours"])
    assert rows["work"]["ratio"] > 1, "every token through the last block is more work"
    assert rows["step"]["batch_size"] == 2 and rows["step"]["device"] == "cpu"
