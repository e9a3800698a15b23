"""The plain versions compute what ours compute, else the ratios would compare different work.

And the bench counts, times and refuses as it says.
"""

import copy
import json
import os
import time

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from bench import __main__ as bench
from bench import measure, plain
from bench import step as bench_step
from features import knn_votes, nearest_neighbours
from runtime.commandline import InputError
from runtime.flops import flops
from runtime.hardware import World
from settings import Settings
from teacher import make_teacher, update_teacher
from vit import VisionTransformer

HERE = World(0, 1, torch.device("cpu"), torch.float32)
TINY = Settings(
    arch="vit_nano",
    patch_size=8,
    global_crops_size=24,
    local_crops_size=16,
    local_crops_number=3,
    out_dim=13,
    batch_size_per_gpu=2,
    drop_path_rate=0.0,
)
FLAGS = (
    "--arch vit_nano --patch_size 8 --global_crops_size 16 --local_crops_size 8 "
    "--local_crops_number 1 --out_dim 13 --batch_size 2 --turns 1 --device cpu"
).split()


def same(one: nn.Module, other: nn.Module, what: str) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5, msg=f"{what} differs in {name}")


@pytest.mark.parametrize("side", [21, 35])
def test_the_plain_vit_has_our_features_and_gradients(side):
    """Every token through every block gives the same [CLS], also at an interpolated grid."""
    ours = VisionTransformer(7, 21, embed_dim=22, depth=3, num_heads=2)
    other = plain.PlainViT(copy.deepcopy(ours))
    images = torch.randn(5, 3, side, side)
    direction = torch.randn(5, 22)
    features = [network(images) for network in (ours, other)]
    torch.testing.assert_close(*features, msg="the plain ViT has other features")
    for one in features:
        (one * direction).sum().backward()
    for (name, a), b in zip(ours.named_parameters(), other.parameters(), strict=True):
        assert (a.grad - b.grad).norm() < 1e-5 * b.grad.norm(), f"the gradient of {name} differs"


def test_the_plain_teacher_is_ours():
    """theta_t <- lambda theta_t + (1 - lambda) theta_s."""
    student = nn.Linear(3, 5)
    ours = make_teacher(nn.Linear(3, 5))
    other = make_teacher(ours)
    update_teacher(student, ours, 0.7)
    plain.plain_update_teacher(student, other, 0.7)
    same(ours, other, "the teacher")


def test_the_plain_k_nn_votes_are_ours():
    """Up to a common factor."""
    train = torch.randn(101, 7)
    test = torch.randn(211, 7)
    labels = torch.randint(5, (101,))
    cosines, nearest = nearest_neighbours(train, test, 20)
    ours = knn_votes(cosines, labels[nearest], 5)
    other = plain.plain_knn(train, labels, test, 5)
    ours = ours / ours.sum(dim=1, keepdim=True)
    other = other / other.sum(dim=1, keepdim=True)
    torch.testing.assert_close(ours, other)


def test_the_plain_crops_have_our_shapes_and_scale(tmp_path):
    """The same number and sizes, normalised alike; their pixels are drawn otherwise."""
    image = Image.effect_mandelbrot((97, 71), (-2, -1, 1, 1), 30).convert("RGB")
    image.save(tmp_path / "one.png")
    ours, other = bench.make_crops(TINY)
    our_views = ours(image)
    plain_views = plain.PlainImages([tmp_path / "one.png"], other)[0]
    assert [view.shape for view in our_views] == [view.shape for view in plain_views]
    our_mean = torch.stack([ours(image)[0] for _ in range(60)]).mean()
    plain_mean = torch.stack([other(image)[0] for _ in range(60)]).mean()
    assert our_mean == pytest.approx(plain_mean, abs=0.25), "the views are normalised differently"


def test_the_plain_step_is_ours():
    """Algorithm 1: the same loss, center, teacher and clipped gradients."""
    torch.manual_seed(0)
    crops = bench_step.random_crops(TINY, HERE)
    ours = bench_step.make_ours(TINY, HERE)
    other = bench_step.make_plain(TINY, HERE)
    our_loss = ours.step(crops).item()
    assert our_loss == pytest.approx(other.step(crops), abs=1e-5), "the losses differ"
    torch.testing.assert_close(ours.run.dino_loss.center, other.run.dino_loss.center)
    same(ours.run.teacher, other.run.teacher, "the teacher")

    pairs = zip(ours.run.student.named_parameters(), other.run.student.parameters(), strict=True)
    for (name, one), two in pairs:
        if one.requires_grad:
            # a tenth of the gradient is Adam's average after one step
            gradient = 10 * ours.run.optimizer.state[one]["exp_avg"]
            plain_gradient = 10 * other.run.optimizer.state[two]["exp_avg"]
            torch.testing.assert_close(
                gradient,
                plain_gradient,
                atol=1e-5,
                rtol=1e-3,
                msg=f"the gradient of {name} differs",
            )


def test_nothing_of_ours_is_left_in_the_plain_step():
    """A plain version that shares a fast part hides what the part gains."""
    run = bench_step.make_plain(TINY, HERE).run
    for network in (run.student, run.teacher):
        assert isinstance(network.backbone, plain.PlainViT)
        attentions = [block.attn for block in network.backbone.vit.blocks]
        assert all(isinstance(attn, plain.PlainAttention) for attn in attentions)
    assert isinstance(run.dino_loss, plain.PlainLoss)
    for group in run.optimizer.param_groups:
        assert not group["fused"] and not group["foreach"], "tensor by tensor was wanted"
    assert bench_step.make_ours(TINY, HERE).run.optimizer.param_groups[0]["fused"]


def test_the_work_is_counted_with_the_formulas():
    """A linear layer: 2 B D K; attention: 2 products of 2 B h N N d each, whatever the kernel."""
    layer = nn.Linear(7, 11, bias=False)
    assert flops(lambda: layer(torch.ones(5, 7))) == 2 * 5 * 7 * 11
    B, h, N, d = 2, 3, 13, 8
    q = torch.randn(B, h, N, d)
    assert flops(lambda: scaled_dot_product_attention(q, q, q)) == 2 * 2 * B * h * N * N * d
    work, formula = measure.square_matmul(HERE.device, torch.float32)
    assert flops(work) == formula


def test_works_take_turns():
    """a b, b a, a b: a machine that drifts treats both alike."""
    calls = []
    works = [lambda: calls.append("a"), lambda: calls.append("b")]
    times = measure.in_turn(works, 3, 60.0, HERE.device)
    assert "".join(calls) == "ab" + "abbaab", "a warm-up and three turns were wanted"
    assert len(times) == 3 and all(len(turn) == 2 for turn in times)

    works = [lambda: time.sleep(0.02), lambda: None]
    for slow, quick in measure.in_turn(works, 2, 60.0, HERE.device):
        assert slow > 0.02 > quick, "the times belong to the other work"


@pytest.mark.parametrize(("most", "made"), [(7, 2), (2, 2), (1, 1)])
def test_two_turns_are_made_whatever_they_take(most, made):
    assert len(measure.in_turn([lambda: None], most, 0.0, HERE.device)) == made


def test_the_ratio_is_the_turns_median():
    """plain / ours, so above 1 ours is faster."""
    row = bench.time_row("x", [[0.1, 0.3], [0.2, 0.4], [0.1, 0.1]], images=6)
    assert row["ratio"] == pytest.approx(2) and row["ours"] == pytest.approx(100)
    assert row["images_per_s"] == pytest.approx(60)
    assert row["plain_images_per_s"] == pytest.approx(20)


def test_memory_that_does_not_suffice_is_named():
    """A killed process and a refused allocation are one kind of error, with the fix."""
    with pytest.raises(MemoryError):
        measure.in_fresh_process(os._exit, 1)
    with pytest.raises(InputError, match="lower --batch_size"), measure.full_memory_in_one_line():
        torch.empty(2**55)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--parts step lunch", "invalid choice: 'lunch'"),
        ("--arch vit_giant", "--arch vit_giant is unknown"),
        ("--patch_size 7", "--global_crops_size 16 is no multiple of --patch_size 7"),
        ("--patch_size 0", "--patch_size 0 must be at least 1"),
        ("--batch_size 0", "--batch_size 0 must be at least 1"),
        ("--batch_size -1", "--batch_size -1 must be at least 1"),
        (f"--batch_size {10**12}", f"--batch_size {10**12} must be at most 65536"),
        (f"--global_crops_size {10**12}", f"--global_crops_size {10**12} must be at most 4096"),
        (f"--local_crops_size {10**12}", f"--local_crops_size {10**12} must be at most 4096"),
        ("--turns 0", "--turns 0 must be at least 1"),
        ("--seconds -1", "--seconds -1.0 must be at least 0"),
        ("--seconds nan", "--seconds nan must be at least 0"),
        ("--threads -2", "--threads -2 must be at least 0"),
        ("--threads 1025", "--threads 1025 must be at most 1024"),
        ("--num_workers -2", "--num_workers -2 must be"),
        ("--data_path nowhere", "'nowhere' is not there"),
        ("--drop_path_rate 1", "--drop_path_rate 1.0 must be below 1"),
        ("--precision fp16", "--precision fp16 is for train.py"),
        ("--device tpu", "--device tpu is unknown"),
        ("--cuda_graph --parts step", "--cuda_graph true needs a GPU"),
        ("--profile --json", "--profile prints a table"),
    ],
)
def test_a_bad_flag_is_named_in_one_line(flags, said, capsys):
    """Exit status 2, before anything is measured."""
    with pytest.raises(SystemExit) as stopped:
        bench.main([*FLAGS, *flags.split()])
    written = capsys.readouterr()
    assert stopped.value.code == 2
    assert said in written.err
    assert len(written.err.strip().splitlines()) == 1, written.err
    assert "images/s" not in written.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_asking_for_cuda_where_there_is_none(capsys):
    with pytest.raises(SystemExit):
        bench.main([*FLAGS, "--device", "cuda"])
    assert "--device cuda is not available here" in capsys.readouterr().err


@pytest.mark.slow
def test_the_bench_prints_a_row_for_each_part(capsys):
    """All but k-NN, whose size is fixed; a row says what it belongs to."""
    parts = [part for part in bench.PARTS if part != "knn"]
    bench.main([*FLAGS, "--json", "--num_workers", "0", "--parts", *parts])
    rows = {}
    for text in capsys.readouterr().out.splitlines():
        row = json.loads(text)
        rows[row["part"]] = row
    assert set(rows) == {
        "crops", "crops, batch", "loader", "step", "work", "end to end", "EMA", "memory",
    }
    for row in rows.values():
        assert row["torch"] == torch.__version__
        assert row["ours"] is None or row["ratio"] > 0
    assert rows["work"]["ratio"] > 1, "every token through the last block is more work"
    assert rows["step"]["batch_size"] == 2
    assert rows["crops, batch"]["images_per_s"] > 0
    assert rows["end to end"]["step_percent"] > 0, "how much depends on what else the machine does"
    assert rows["step"]["device"] == "cpu"


def test_the_steps_part_of_a_training_is_that_of_the_middle_turn(monkeypatch, capsys):
    """Of turns (loading and training of ours, of plain, our steps alone), in seconds."""
    turns = [[4.0, 6.0, 1.0], [2.0, 5.0, 1.0], [8.0, 8.0, 6.0]]
    monkeypatch.setattr(bench.Bench, "compare", lambda self, *works: turns)
    bench.main([*FLAGS, "--json", "--num_workers", "0", "--parts", "end"])
    row = json.loads(capsys.readouterr().out)
    assert row["step_percent"] == 50
    assert row["ratio"] == 1.5


@pytest.mark.slow
def test_the_table_has_both_versions_and_the_profile_names_operations(capsys):
    bench.main([*FLAGS, "--parts", "step", "--profile"])
    printed = capsys.readouterr().out
    header = [text for text in printed.splitlines() if text.startswith("part")]
    assert header[0].split() == ["part", "ours", "plain", "plain", "/", "ours"]
    assert "% of the GEMM rate" in printed
    assert "aten::addmm" in printed, "a linear layer takes some of a step's time"
