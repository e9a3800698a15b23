"""The teacher (Sec. 3.1, "Teacher network"): same architecture as the student, and the average of its past.

The teacher is built from the student's weights and then follows them as an exponential moving average (EMA); no
gradient ever reaches it. Parameters only: buffers, such as a batch normalisation's running statistics, are its own.
Three worse teachers (Sec. 5.2, Fig. 6) are there to be tried: the student of the previous epoch, of the previous
iteration, and the student itself.
"""
import copy

import torch
from torch import nn
from torchvision.ops import StochasticDepth


def make_teacher(student: nn.Module) -> nn.Module:
    """A copy of the student that shares no memory with it, takes no gradient, drops no path and predicts nothing."""
    teacher = copy.deepcopy(student).requires_grad_(False)
    for module in list(teacher.modules()):
        if hasattr(module, "drop_path"):
            module.drop_path = None  # drop path is the student's alone
        if hasattr(module, "predictor"):
            module.predictor = None  # and so is a predictor
        if isinstance(module, (nn.Dropout, StochasticDepth)):
            module.p = 0.0  # and so is what torchvision's convnets drop
    return teacher


@torch.no_grad()
def update_teacher(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """theta_t <- lambda theta_t + (1 - lambda) theta_s, with lambda = teacher momentum, for each parameter."""
    student_params = dict(student.named_parameters())
    for name, teacher_param in teacher.named_parameters():
        teacher_param.lerp_(student_params[name], 1 - momentum)


def momentum_of(kind: str, scheduled: float) -> float:
    """Fig. 6's teachers as values of lambda after a step: 1 leaves the teacher as it is, 0 makes it the student.

    The one of the previous epoch is made before an epoch's first step (see train_epoch), that of the previous iteration
    before each step of the student's weights (see train_step); after the step both stay as they are.
    """
    return {"momentum": scheduled, "previous_epoch": 1.0, "previous_iteration": 1.0, "student": 0.0}[kind]
