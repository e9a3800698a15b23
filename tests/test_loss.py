"""Eq. 1 to 5: the loss over pairs of different views, centering, sharpening, the two collapses."""

import math

import pytest
import torch

from loss import DINOLoss

B, V, K, T = 3, 5, 7, 0.07


def random_logits(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(V * B, K, generator=generator).requires_grad_()
    return student, torch.randn(2 * B, K, generator=generator) / 10


def naive_loss(student, teacher, center, student_temp, teacher_temp) -> float:
    """Eq. 3 by plain loops in double precision: images, teacher and student views, prototypes."""
    total, pairs = 0.0, 0
    for t in range(2):
        for v in range(V):
            if t == v:
                continue
            pairs += 1
            for b in range(B):
                p_t = [
                    math.exp((teacher[t * B + b, k].item() - center[k].item()) / teacher_temp)
                    for k in range(K)
                ]
                p_s = [math.exp(student[v * B + b, k].item() / student_temp) for k in range(K)]
                total -= sum(p_t[k] / sum(p_t) * math.log(p_s[k] / sum(p_s)) for k in range(K)) / B
    return total / pairs


def test_eq_3_the_loss_is_the_cross_entropy_averaged_over_pairs_of_different_views():
    student, teacher = random_logits()
    for student_temp in (0.1, 0.17):
        loss_fn = DINOLoss(K, student_temp=student_temp)
        loss_fn.center.copy_(torch.linspace(-0.2, 0.3, K))
        before = loss_fn.center.clone()
        expected = naive_loss(student, teacher, loss_fn.center[0], student_temp, T)
        loss = loss_fn(student, teacher, T).item()
        assert loss == pytest.approx(expected, rel=1e-5), (
            f"{loss:.4f} instead of {expected:.4f}. "
            "Eq. 3: the mean, over pairs of different views, of -sum_k p_t log p_s, "
            "softmaxes over the K prototypes"
        )
        unmoved = torch.equal(loss_fn.center, before)
        assert unmoved, "the loss uses the center and leaves it as it is"


def closed_form(student, teacher, center, student_temp, teacher_temp) -> torch.Tensor:
    """Eq. 3 without its pairs: sum over views of n logsumexp(s / tau) - <p, s / tau>.

    p is the sum of what the view is to predict, and n how many these are: 1 for a global view, 2
    for a local one.
    """
    p1, p2 = ((teacher.double() - center) / teacher_temp).softmax(dim=-1).split(B)
    total = 0.0
    for v, view in enumerate((student.double() / student_temp).split(B)):
        p, n = [(p2, 1), (p1, 1), (p1 + p2, 2)][min(v, 2)]
        total = total + (n * view.logsumexp(dim=-1) - (p * view).sum(dim=-1)).mean()
    return total / (2 * V - 2)


def test_the_double_loop_and_its_gradient_equal_the_closed_form():
    """The gradient of n logsumexp(s / tau) - <p, s / tau> is (n softmax(s / tau) - p) / tau."""
    (student, teacher), loss_fn = random_logits(), DINOLoss(K, student_temp=0.13)
    loss_fn.center.copy_(torch.linspace(-0.2, 0.3, K))
    loss = loss_fn(student, teacher, T)
    expected = closed_form(student, teacher, loss_fn.center, 0.13, T)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        *(torch.autograd.grad(one, student)[0] for one in (loss, expected)), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_compiled_graph_gives_the_loss_its_gradient_entropy_and_kl(dtype):
    """The form that is read is the form that is compiled; aot_eager traces forward and backward
    without a toolchain.
    """
    (student, teacher), results = random_logits(), []
    loss_fn = DINOLoss(K)
    loss_fn.center.copy_(torch.linspace(-0.2, 0.3, K))
    for forward in (loss_fn, torch.compile(loss_fn, backend="aot_eager", fullgraph=True)):
        logits = student.detach().to(dtype).requires_grad_()
        loss = forward(logits, teacher.to(dtype), T)
        (3 * loss).backward()
        results.append([loss.detach(), logits.grad.float(), loss_fn.teacher_entropy, loss_fn.kl])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_half_precision_logits_are_computed_in_fp32():
    student, teacher = (logits.detach().bfloat16() for logits in random_logits())
    loss = DINOLoss(K)(student, teacher, T)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss,
        DINOLoss(K)(student.float(), teacher.float(), T),
        msg="softmaxes of bf16 logits want fp32: call .float() before them",
    )


def test_the_gradient_comes_from_pairs_of_different_views():
    student, teacher = random_logits()
    teacher[B:] = 0  # the second teacher view says nothing: uniform
    loss_fn = DINOLoss(K)
    loss_fn(student, teacher, 1e-4).backward()
    per_view = student.grad.view(V, B, K)
    against_uniform = (student.detach().view(V, B, K)[0] / 0.1).softmax(
        -1
    ) - 1 / K  # teacher view 1 alone
    expected = against_uniform / 0.1 / B / (2 * V - 2)
    torch.testing.assert_close(
        per_view[0],
        expected,
        msg="student view 0 must learn from teacher view 1 only, and its "
        "gradient is (P_s - P_t) / tau_s, over images and pairs",
    )


def test_entropy_and_kl_are_non_negative_and_sum_to_the_loss():
    student, teacher = random_logits()
    loss_fn = DINOLoss(K)
    loss = loss_fn(student, teacher, T)
    p = (teacher / T).softmax(-1)
    torch.testing.assert_close(
        loss_fn.teacher_entropy,
        -(p * p.log()).sum(-1).mean(),
        msg="teacher_entropy is the mean over the rows of -sum_k p_t log p_t",
    )
    torch.testing.assert_close(
        loss_fn.teacher_entropy + loss_fn.kl,
        loss.detach(),
        msg="Eq. 5: teacher_entropy and kl must sum to the loss, and take no gradient",
    )
    for part in (loss_fn.teacher_entropy, loss_fn.kl):
        assert not part.requires_grad, "teacher_entropy and kl are for the curves: detach them"
    positive = loss_fn.kl.item() > 0
    assert positive, "a divergence is never negative"


def test_a_student_that_says_nothing_costs_ln_k():
    _, teacher = random_logits()
    assert DINOLoss(K)(torch.zeros(V * B, K), teacher, T).item() == pytest.approx(
        math.log(K), rel=1e-6
    )


def test_many_prototypes_lose_no_digits():
    """The two numbers that show the uniform collapse, at the paper's K and a GPU's batch."""
    loss_fn = DINOLoss(65536)
    loss = loss_fn(torch.zeros(2 * 64, 65536), torch.zeros(2 * 64, 65536), 0.04)
    for nats in (loss, loss_fn.teacher_entropy):
        assert nats.item() == pytest.approx(math.log(65536), abs=1e-4)
    assert abs(loss_fn.kl.item()) < 1e-4


def test_uniform_teacher_and_student_are_the_uniform_collapse():
    loss_fn = DINOLoss(K)
    loss_fn(torch.zeros(V * B, K), torch.zeros(2 * B, K), T)
    assert loss_fn.teacher_entropy.item() == pytest.approx(math.log(K), rel=1e-6)
    assert loss_fn.kl.item() == pytest.approx(0, abs=1e-6)


def test_no_gradient_reaches_the_teacher():
    student, teacher = random_logits()
    teacher.requires_grad_()
    DINOLoss(K)(student, teacher, T).backward()
    reached = teacher.grad is not None
    assert not reached, "detach the teacher: no gradient may flow into it"
    assert student.grad.abs().sum() > 0


def test_eq_4_the_center_is_an_average_of_the_teachers_logits():
    loss_fn, (_, teacher) = DINOLoss(K, center_momentum=0.9), random_logits()
    loss_fn.update_center(teacher)
    loss_fn.update_center(teacher + 1)
    assert loss_fn.center.dtype == torch.float32, "the center must stay in fp32, as it was"
    mean = teacher.mean(dim=0, keepdim=True)
    torch.testing.assert_close(
        loss_fn.center,
        0.9 * (0.1 * mean) + 0.1 * (mean + 1),
        msg="Eq. 4: with m = 0.9 the old center keeps 9 tenths, and each prototype's mean over "
        "the batch adds 1 tenth",
    )


def test_the_center_is_subtracted_so_that_a_common_favourite_is_forgotten():
    student, teacher = random_logits()
    loss_fn, centered = DINOLoss(K), DINOLoss(K)
    offset = torch.linspace(0, 1, K)
    centered.center.copy_(offset)
    torch.testing.assert_close(centered(student, teacher + offset, T), loss_fn(student, teacher, T))


def test_the_loss_uses_the_old_center_and_leaves_it_alone():
    loss_fn = DINOLoss(K)
    loss_fn(*random_logits(), T)
    assert loss_fn.center.eq(0).all(), "the center moves in update_center, after the loss"


def test_center_momentum_one_switches_centering_off():
    loss_fn, (_, teacher) = DINOLoss(K, center_momentum=1.0), random_logits()
    loss_fn.update_center(teacher + 5)
    torch.testing.assert_close(
        loss_fn.center,
        torch.zeros(1, K),
        msg="m = 1 must leave the center where it was: all weight is the old one's",
    )


def test_the_center_is_part_of_the_state():
    assert "center" in DINOLoss(K).state_dict()


def test_sharpening_lowers_the_entropy():
    loss_fn, logits = DINOLoss(K), random_logits()
    entropies = [
        (loss_fn(*logits, temp), loss_fn.teacher_entropy.item())[1]
        for temp in (0.01, 0.04, 0.1, 1.0)
    ]
    assert entropies == sorted(entropies)


def test_low_temperatures_and_half_precision_stay_finite():
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        student = torch.randn(V * B, 1009, generator=generator).to(dtype).requires_grad_()
        loss_fn = DINOLoss(1009, student_temp=0.01)
        loss_fn(student, torch.randn(2 * B, 1009, generator=generator).to(dtype), 0.01).backward()
        assert student.grad.isfinite().all() and loss_fn.kl.isfinite()


@pytest.mark.parametrize(("students", "teachers"), [(15, 5), (14, 6), (3, 6), (0, 0)])
def test_rows_that_are_no_views_of_one_batch_are_refused(students, teachers):
    with pytest.raises(ValueError, match="views"):
        DINOLoss(K)(torch.zeros(students, K), torch.zeros(teachers, K), T)
