"""The bench's plain versions compute what ours compute: else its ratios would compare different work."""
import json

import pytest
import torch

import bench
from eval_knn import knn_votes, nearest_neighbours
from hardware import Hardware
from loss import DINOLoss
from optimizer import make_optimizer
from teacher import make_teacher, update_teacher
from train import train_step

HERE = Hardware(0, 1, torch.device("cpu"), torch.float32)
SMALL = ["--arch", "vit_nano", "--patch_size", "8", "--global_crops_size", "16", "--local_crops_size", "8",
         "--local_crops_number", "1", "--out_dim", "13", "--batch_size", "2", "--turns", "1", "--device", "cpu"]


def test_the_plain_loss_and_its_gradient_are_ours():
    student, teacher = torch.randn(35, 11, requires_grad=True), torch.randn(14, 11)
    gradients = []
    for kind in (DINOLoss, bench.PlainLoss):
        loss = kind(11)(student, teacher, 0.07)
        gradients.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
    torch.testing.assert_close(*gradients)


def test_the_plain_teacher_is_ours():
    student = torch.nn.Linear(3, 5)
    ours = make_teacher(torch.nn.Linear(3, 5))
    plain = make_teacher(ours)
    update_teacher(student, ours, 0.7)
    bench.plain_update_teacher(student, plain, 0.7)
    torch.testing.assert_close(ours.weight, plain.weight)


def test_the_plain_k_nn_votes_are_ours():
    train, test, labels = torch.randn(101, 7), torch.randn(211, 7), torch.randint(5, (101,))
    cosines, nearest = nearest_neighbours(train, test, 20)
    ours = knn_votes(cosines, labels[nearest], 5)
    plain = bench.plain_knn(train, labels, test, 5)
    torch.testing.assert_close(ours / ours.sum(1, keepdim=True), plain / plain.sum(1, keepdim=True))


def test_the_plain_step_is_ours():
    """Both students start alike, see the same crops, and get the same gradients (a tenth of them is Adam's average)."""
    flags = bench.parse_flags(SMALL)
    crops = [torch.randn(2, 3, size, size) for size in (16, 16, 8)]
    student, plain = bench.make_network(flags), bench.make_network(flags)
    adamw, plain_adamw = make_optimizer("adamw", student), bench.plain_optimizer(plain)
    train_step(student, student, make_teacher(student), DINOLoss(13), adamw, [crops], bench.VALUES, 3.0, False, HERE)
    bench.plain_step(plain, make_teacher(plain), bench.PlainLoss(13), plain_adamw, crops, HERE)
    for (name, one), other in zip(student.named_parameters(), plain.parameters(), strict=True):
        if one.requires_grad:
            gradients = [of.state[weight]["exp_avg"] * 10 for of, weight in ((adamw, one), (plain_adamw, other))]
            torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-3, msg=f"the gradient of {name} differs")


@pytest.mark.slow
def test_the_bench_prints_a_ratio_for_each_part(capsys):
    bench.main([*SMALL, "--json", "--parts", "crops", "loss", "ema", "step"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["part"] for line in lines] == ["crops", "loss", "ema", "step"]
    assert all(line["ratio"] > 0 for line in lines)
