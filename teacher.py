"""The teacher (Sec. 3.1, "Teacher network"): same architecture as the student, and the average of its past.

The teacher is built from the student's weights and then follows them as an exponential moving average (EMA); no
gradient ever reaches it. Parameters only: buffers, such as a batch normalisation's running statistics, are its own.
"""
import copy

import torch
from torch import nn
from torchvision.ops import StochasticDepth


def make_teacher(student: nn.Module) -> nn.Module:
    """A copy of the student that shares no memory with it, takes no gradient, and drops no path."""
    teacher = copy.deepcopy(student).requires_grad_(False)
    for module in list(teacher.modules()):
        if hasattr(module, "drop_path"):
            module.drop_path = None  # drop path is the student's alone
        if isinstance(module, (nn.Dropout, StochasticDepth)):
            module.p = 0.0  # and so is what torchvision's convnets drop
    return teacher


@torch.no_grad()
def update_teacher(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """theta_t <- lambda theta_t + (1 - lambda) theta_s, with lambda = teacher momentum, for each parameter."""
    for student_param, teacher_param in zip(student.parameters(), teacher.parameters(), strict=True):
        teacher_param.lerp_(student_param, 1 - momentum)
