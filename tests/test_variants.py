"""What the ablations put in place of DINO's parts: Sinkhorn-Knopp, other heads, a predictor, Fig.
6's teachers.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ablations.variants import (
    SinkhornLoss,
    VariantHead,
    make_follow,
    remove_predictor,
    sinkhorn_knopp,
)
from head import DINOHead
from multicrop import MultiCropNetwork
from optimizer import make_optimizer
from teacher import make_teacher, update_teacher
from vit import VisionTransformer

B, V, K, T = 3, 5, 7, 0.07


def random_logits(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(V * B, K, generator=generator).requires_grad_(), torch.randn(
        2 * B, K, generator=generator
    ) / 10


def naive_sinkhorn(scores: torch.Tensor, iterations: int) -> torch.Tensor:
    """SwAV's algorithm as its paper writes it, in float64: q = exp(scores) / sum, prototypes,
    samples, ...
    """
    q = scores.double().exp()
    for _ in range(iterations):
        for k in range(q.shape[1]):
            q[:, k] /= q[:, k].sum() * q.shape[1]
        for i in range(q.shape[0]):
            q[i] /= q[i].sum() * q.shape[0]
    return q * q.shape[0]


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_knopp_equals_the_algorithm_in_float64(iterations):
    scores = torch.randn(11, 5, generator=torch.Generator().manual_seed(0)) / 0.3
    error = (
        (sinkhorn_knopp(scores, iterations).exp() - naive_sinkhorn(scores, iterations))
        .abs()
        .max()
        .item()
    )
    assert error < 1e-6, (
        "in an iteration prototypes (columns) come first, the samples (rows) last; wanted is log q"
    )


def test_sinkhorns_rows_sum_to_one_and_its_columns_are_equal_in_the_end():
    """n / K: each prototype's share of n samples; the paper's 3 iterations get near, 200 arrive."""
    scores = torch.randn(22, 11, generator=torch.Generator().manual_seed(0)) / 0.2
    for iterations, tolerance in ((3, 1.5), (200, 1e-4)):
        q = sinkhorn_knopp(scores, iterations).exp()
        torch.testing.assert_close(
            q.sum(dim=1),
            torch.ones(22),
            check_dtype=False,
            msg="each sample must have weight 1: rows come last",
        )
        assert (q.sum(dim=0) - 2).abs().max() < tolerance, "each prototype must get an equal share"


def test_one_iteration_is_the_papers_softmax_over_the_batch():
    """Appendix: softmax(x / tau) over the batch, then each sample divided by its sum."""
    scores = torch.randn(11, 5, generator=torch.Generator().manual_seed(0))
    q = scores.softmax(dim=0)
    torch.testing.assert_close(sinkhorn_knopp(scores, 1).exp(), q / q.sum(dim=1, keepdim=True))


def test_sinkhorn_stays_finite_at_the_lowest_temperature():
    logits = F.normalize(torch.randn(11, 257, generator=torch.Generator().manual_seed(0)), dim=-1)
    finite = (
        sinkhorn_knopp(torch.cat([logits, torch.eye(257)[:3]]) / 0.001, 3).isfinite().all().item()
    )
    assert finite, (
        "exp(1 / 0.001) is out of range: take a column's largest off before the exponential"
    )


def test_sinkhorn_shares_the_prototypes_out_among_the_batch_of_all_processes():
    """Two halves that are told the sums and maxima over both get what the whole batch gets."""
    scores = torch.randn(22, 5, generator=torch.Generator().manual_seed(0)) / 0.1
    halves, whole = list(scores.split(11)), sinkhorn_knopp(scores, 3)
    for _ in range(
        3
    ):  # what each process computes, step by step, with the other's part of each reduction
        top = torch.stack([half.amax(dim=0) for half in halves]).amax(dim=0)
        sums = sum((half - top).exp().sum(dim=0) for half in halves)
        world = SimpleNamespace(total=lambda _, sums=sums: sums, largest=lambda _, top=top: top)
        halves = [sinkhorn_knopp(half, 1, world) for half in halves]
    torch.testing.assert_close(
        torch.cat(halves),
        whole,
        msg="a column's maximum and sum are over all processes: "
        "reduce them by world.largest and world.total",
    )


@pytest.mark.parametrize("iterations", [3, 1])
def test_the_loss_takes_the_assignments_as_targets_without_a_softmax_and_without_a_center(
    iterations,
):
    """Table 7, row 3: sum of -q log p over the pairs of different views."""
    (student, teacher), loss_fn = random_logits(), SinkhornLoss(K, iterations=iterations)
    loss_fn.center.normal_()
    q = naive_sinkhorn(teacher / T, iterations).view(2, B, K)
    log_p = (student.detach().double() / 0.1).log_softmax(dim=-1).view(V, B, K)
    expected = [-(q[x] * log_p[v]).sum() / B for x in range(2) for v in range(V) if v != x]
    assert loss_fn(student, teacher, T).item() == pytest.approx(
        sum(expected).item() / len(expected), rel=1e-5
    )
    assert loss_fn.teacher_entropy.item() == pytest.approx(
        -(q * q.log()).sum().item() / (2 * B), rel=1e-5
    )


def small(**head_options) -> MultiCropNetwork:
    torch.manual_seed(0)
    return MultiCropNetwork(
        VisionTransformer(7, 14, embed_dim=22, depth=2, num_heads=2, init_std=0.2),
        VariantHead(22, 13, hidden_dim=17, bottleneck_dim=5, init_std=0.2, **head_options),
    )


@pytest.mark.parametrize("nlayers", [1, 3])
@pytest.mark.parametrize("use_bn", [False, True])
def test_without_a_change_the_variant_is_dinos_head(nlayers, use_bn):
    sizes = {
        "in_dim": 11,
        "out_dim": 13,
        "nlayers": nlayers,
        "hidden_dim": 17,
        "bottleneck_dim": 5,
        "use_bn": use_bn,
    }
    torch.manual_seed(0)
    ours = DINOHead(**sizes)
    torch.manual_seed(0)
    variant = VariantHead(**sizes)
    variant.load_state_dict(ours.state_dict(), strict=True)
    features = torch.randn(19, 11)
    assert torch.equal(variant(features), ours(features))


def test_a_predictor_is_the_students_alone_and_sits_on_the_projection():
    student, features = small(), torch.randn(11, 22)
    student.head.add_predictor()
    teacher = make_teacher(student)
    remove_predictor(teacher)
    assert student.head.predictor is not None and not any(
        "predictor" in name for name in teacher.state_dict()
    )
    bottleneck = F.normalize(student.head.predictor(student.head.mlp(features)), dim=-1)
    torch.testing.assert_close(
        student.head(features),
        student.head.last_layer(bottleneck),
        msg="mlp, predictor, to length 1, last layer: the student's head in this order",
    )
    update_teacher(student, teacher, 0.0)
    bottleneck = F.normalize(student.head.mlp(features), dim=-1)
    torch.testing.assert_close(
        teacher.head(features),
        teacher.head.last_layer(bottleneck),
        msg="mlp, to length 1, last layer: a teacher predicts nothing",
    )


@pytest.mark.parametrize("nlayers", [0, 1, 3])
def test_without_the_bottleneck_the_head_is_hidden_layers_and_a_linear_one(nlayers):
    head, features = (
        small(nlayers=nlayers, l2_bottleneck=False, activation="relu").head,
        torch.randn(11, 22),
    )
    x = features
    for layer in [layer for layer in head.mlp if isinstance(layer, nn.Linear)]:
        x = F.linear(x, layer.weight, layer.bias).clamp(min=0)
    torch.testing.assert_close(
        head(features),
        F.linear(x, head.last_layer.weight, head.last_layer.bias),
        msg="without the bottleneck nothing is normalised: mlp, then the last layer",
    )
    assert (
        head(features).shape == (11, 13)
        and head.projection_dim == 13
        and len(head.mlp) == 2 * nlayers
    )
    without, head.predictor = head(features), nn.Linear(13, 13)
    torch.testing.assert_close(
        head(features),
        head.predictor(without),
        msg="without the bottleneck a predictor comes behind the last layer",
    )


def steps_of(kind: str, stops: tuple[int, ...] = ()) -> tuple[list[dict], list[dict]]:
    """Train 3 epochs of 2 steps -> the student's weights in each step, and the teacher's that
    served in it.

    After as many steps as `stops` says the run is built anew from its state, as a run that was
    stopped.
    """

    def begin(step: int):
        optimizer = torch.optim.SGD(student.parameters(), lr=9.0)
        return optimizer, make_follow(
            kind, student, teacher, optimizer, steps_per_epoch=2, steps_done=step % 2
        )

    copy = lambda network: {name: value.clone() for name, value in network.state_dict().items()}
    student = small()
    teacher, students, teachers = make_teacher(student), [], []
    teacher.register_forward_hook(lambda *_: teachers.append(copy(teacher)))
    optimizer, follow = begin(0)
    for step in range(6):
        if step in stops:
            stopped = student, teacher
            student = small()
            teacher = make_teacher(student)
            for new, old in zip((student, teacher), stopped):
                new.load_state_dict(old.state_dict())
            teacher.register_forward_hook(
                lambda *_, teacher=teacher: teachers.append(copy(teacher))
            )
            optimizer, follow = begin(step)
        crops = torch.randn(2, 3, 3, 14, 14, generator=torch.Generator().manual_seed(step))
        students.append(copy(student))
        teacher(crops)
        optimizer.zero_grad()
        student(crops).square().sum().backward()
        optimizer.step()
        follow(student, teacher, 0.9)
    return students, teachers


@pytest.mark.parametrize("stops", [(), (1,), (2,), (1, 3, 4)])
@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("student", [0, 1, 2, 3, 4, 5]),
        ("previous_iteration", [0, 0, 1, 2, 3, 4]),
        ("previous_epoch", [0, 0, 2, 2, 4, 4]),
    ],
)
def test_fig_6s_teachers_are_the_student_of_the_step_that_their_name_says(kind, source, stops):
    """Which step's student serves as the teacher in steps 0 ... 5, of two an epoch; also in a run
    that was stopped.
    """
    students, teachers = steps_of(kind, stops)
    assert not torch.equal(students[1]["backbone.cls_token"], students[2]["backbone.cls_token"]), (
        "nothing is trained"
    )
    for step, origin in enumerate(source):
        assert all(
            torch.equal(value, students[origin][name]) for name, value in teachers[step].items()
        ), f"in step {step} the teacher must be the student of step {origin}"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lars"])
def test_the_teacher_of_the_previous_iteration_knows_each_optimisers_step(optimizer):
    student = nn.Linear(5, 3)
    teacher = make_teacher(student)
    optimizer = make_optimizer(optimizer, student)
    follow = make_follow("previous_iteration", student, teacher, optimizer, steps_per_epoch=1)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for _ in range(3):
        before = student.weight.detach().clone()
        student(torch.ones(2, 5)).square().sum().backward()
        optimizer.step()
        follow(student, teacher, 0.9)
        assert torch.equal(teacher.weight, before) and not torch.equal(student.weight, before)


def test_dinos_own_teacher_is_one_of_the_kinds():
    assert make_follow("momentum", None, None, None, steps_per_epoch=2) is update_teacher


def test_between_two_epochs_the_previous_epochs_teacher_is_still_the_one_that_trained():
    """What evaluates then wants the teacher of the epoch that ended."""
    student = small()
    teacher = make_teacher(student)
    optimizer = torch.optim.SGD(student.parameters(), lr=9.0)
    follow = make_follow("previous_epoch", student, teacher, optimizer, steps_per_epoch=1)
    first, crops = student.backbone.cls_token.detach().clone(), torch.randn(2, 3, 3, 14, 14)
    teacher(crops)
    student(crops).square().sum().backward()
    optimizer.step()
    follow(student, teacher, 0.9)
    teacher.backbone(crops[0])
    assert torch.equal(teacher.backbone.cls_token, first)
    assert not torch.equal(student.backbone.cls_token, first)
