"""The teacher: an average of the student's past, without gradient, without drop path, never an
alias.
"""

import pytest
import torch
from torch import nn

import vit
from teacher import make_teacher, update_teacher


def test_the_teacher_starts_equal_but_shares_no_memory():
    student = nn.Linear(5, 3)
    teacher = make_teacher(student)
    assert torch.equal(student.weight, teacher.weight)
    student.weight.data.add_(1)
    assert not torch.equal(student.weight, teacher.weight), (
        "the teacher must be a copy, not an alias of the student"
    )


def test_the_teacher_takes_no_gradient_and_the_student_still_does():
    student = nn.Linear(5, 3)
    assert not any(param.requires_grad for param in make_teacher(student).parameters())
    assert all(param.requires_grad for param in student.parameters())


def test_the_teacher_drops_no_path_even_in_training_mode():
    student = vit.VisionTransformer(
        7, 14, embed_dim=22, depth=3, num_heads=2, drop_path_rate=0.9
    ).train()
    teacher, images = make_teacher(student).train(), torch.randn(5, 3, 14, 14)
    assert torch.equal(teacher(images), teacher(images))
    assert student.blocks[-1].drop_path.keep.item() == pytest.approx(0.1), (
        "the student keeps its drop path"
    )


def test_after_n_steps_the_teacher_is_the_weighted_sum_of_all_students():
    student, momentum = nn.Linear(5, 3), 0.9
    teacher = make_teacher(student)
    expected, weight = momentum**4 * student.weight.detach(), 1 - momentum
    for n in range(4):
        nn.init.normal_(student.weight)
        update_teacher(student, teacher, momentum)
        expected = expected + momentum ** (3 - n) * weight * student.weight.detach()
    torch.testing.assert_close(
        teacher.weight.detach(),
        expected,
        msg="in place, the teacher keeps lambda = 0.9 of itself and takes 0.1 of the student",
    )


def test_parameters_meet_by_their_names():
    """In whatever order the two list them."""
    student, teacher = nn.Module(), nn.Module()
    for network, names in ((student, "ab"), (teacher, "ba")):
        for name in names:
            network.register_parameter(name, nn.Parameter(torch.full((3,), float(name == "a"))))
    update_teacher(student, teacher, 0.5)
    unchanged = bool(teacher.a.eq(1).all())
    assert unchanged, (
        "each parameter of the teacher follows the one of its own name: here student and teacher "
        "list theirs in another order, so pair them by named_parameters()"
    )


def test_buffers_are_the_teachers_own():
    student = nn.BatchNorm1d(3)
    teacher = make_teacher(student)
    student(torch.randn(7, 3) + 5)
    update_teacher(student, teacher, 0.5)
    torch.testing.assert_close(
        teacher.running_mean,
        torch.zeros(3),
        msg="the EMA is of parameters only: buffers are none, though state_dict has them too",
    )
