"""The teacher (Sec. 3.1, "Teacher network"): the average of the student's past.

It has the student's architecture, starts from the student's weights,
and follows them as an exponential moving average (EMA).
No gradient ever reaches it.
"""
import copy

import torch
from torch import nn
from torchvision.ops import StochasticDepth

from vit import DropPath


def make_teacher(student: nn.Module) -> nn.Module:
    """Return a copy of the student that takes no gradient and drops nothing."""
    teacher = copy.deepcopy(student)  # an alias would move with the student's every step
    teacher.requires_grad_(False)
    # not eval(): batch normalisation, where there is any, uses the batch's statistics here too
    for module in teacher.modules():
        # release: only the student drops paths, so that the teacher's targets are not random
        if isinstance(module, DropPath):
            module.keep.fill_(1.0)  # the probability of keeping a branch
        # the kinds that another backbone may have (docs/extending.md)
        if isinstance(module, (nn.Dropout, StochasticDepth)):
            module.p = 0.0
    return teacher


@torch.no_grad()
def update_teacher(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """Move each parameter: theta_t <- lambda theta_t + (1 - lambda) theta_s, lambda = momentum."""
    student_params = dict(student.named_parameters())
    # parameters only: a batch normalisation's running statistics (buffers) are the teacher's own
    for name, teacher_param in teacher.named_parameters():
        # by name, since a student may have more, such as BYOL's predictor (ablations/)
        teacher_param.lerp_(student_params[name], 1 - momentum)
