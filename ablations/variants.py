"""What the paper's ablations put in place of DINO's parts: targets, heads and teachers.

Targets: Sinkhorn-Knopp and a softmax over the batch instead of centering (Tables 7 and 15).
Heads: activation, l2 bottleneck (appendix C) and a predictor (Tables 7 and 14).
Teachers: the student itself, and that of the previous iteration or epoch (Fig. 6).
BYOL's and MoCo's losses are in byol.py and moco.py.

Shapes: B images, V views, n rows, K prototypes or outputs.
"""
from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from head import DINOHead, hidden_layers, init_linear
from loss import DINOLoss
from teacher import update_teacher

Follow = Callable[[nn.Module, nn.Module, float], None]


# -- targets


class SinkhornLoss(DINOLoss):
    """Instead of centering, give each prototype the same weight over the batch (SwAV).

    teacher_temp is SwAV's epsilon. iterations: 3 is Sinkhorn-Knopp, 1 the softmax over the batch.
    world, as runtime.hardware.World: the batch is that of all processes; None: there is one.
    With --accumulate each micro-batch is normalised by itself.
    """

    compiles = False  # the sums are over all processes

    def __init__(
        self,
        out_dim: int,
        student_temp: float = 0.1,
        center_momentum: float = 0.9,
        iterations: int = 3,
        world=None,
    ):
        super().__init__(out_dim, student_temp, center_momentum)
        self.iterations = iterations
        self.world = world

    def teacher_probs(self, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """Return the assignments q, SwAV's codes: rows sum to 1, no center, no softmax."""
        logits = teacher_logits / teacher_temp
        return sinkhorn_knopp(logits, self.iterations, self.world).exp()


def sinkhorn_knopp(logits: Tensor, iterations: int, world=None) -> Tensor:
    """Return log q: q = exp(logits), whose columns, then rows, are made to sum to 1, in turn.

    (n, K) -> (n, K). SwAV, Sec. 3 (Cuturi 2013). world: the rows of all processes are one batch.
    """
    log_q = logits.float()  # logarithms, since exp(1 / 0.01) is out of range
    for _ in range(iterations):
        # prototypes: divide each column by its sum, over the rows of all processes
        top = log_q.amax(dim=0)
        if world is not None:
            top = world.largest(top)
        sums = (log_q - top).exp().sum(dim=0)
        if world is not None:
            sums = world.total(sums)
        log_q = log_q - top - sums.log()
        # samples: divide each row by its sum
        log_q = log_q.log_softmax(dim=1)
    return log_q


# -- heads


class VariantHead(nn.Module):
    """A DINOHead with another activation, without the l2 bottleneck, or with a predictor.

    activation: gelu or relu.
    l2_bottleneck=False: nlayers hidden layers, then a linear layer with bias, nothing normalised.
    predictor: a second MLP, on the bottleneck, or on the last layer where there is no bottleneck.
    Parameters have DINOHead's names.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int = 65536,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        init_std: float = 0.02,
        activation: str = "gelu",
        l2_bottleneck: bool = True,
    ):
        super().__init__()
        self.hidden_dim = hidden_dim
        self.use_bn = use_bn
        self.init_std = init_std
        self.activation = activation
        self.l2_bottleneck = l2_bottleneck

        if l2_bottleneck:
            dino = DINOHead(
                in_dim,
                out_dim,
                nlayers,
                hidden_dim,
                bottleneck_dim,
                use_bn,
                norm_last_layer,
                init_std,
            )
            self.mlp = dino.mlp
            self.last_layer = dino.last_layer
            self.projection_dim = bottleneck_dim
        else:
            layers = hidden_layers(in_dim, hidden_dim, nlayers, use_bn)
            width = hidden_dim if nlayers else in_dim
            layers.append(nn.Linear(width, out_dim))
            init_linear(layers, init_std)
            self.mlp = nn.Sequential(*layers[:-1])
            self.last_layer = layers[-1]
            self.projection_dim = out_dim

        set_activation(self.mlp, activation)
        self.predictor = None

    def add_predictor(self) -> None:
        """Put a fresh predictor on the projection: one hidden layer, back to the same width."""
        layers = hidden_layers(self.projection_dim, self.hidden_dim, 1, self.use_bn)
        layers.append(nn.Linear(self.hidden_dim, self.projection_dim))
        init_linear(layers, self.init_std)
        self.predictor = nn.Sequential(*layers)
        set_activation(self.predictor, self.activation)

    def forward(self, features: Tensor) -> Tensor:
        x = self.mlp(features)
        if not self.l2_bottleneck:
            x = self.last_layer(x)
        if self.predictor is not None:
            x = self.predictor(x)
        if self.l2_bottleneck:
            x = self.last_layer(F.normalize(x, dim=-1))
        return x


def set_activation(mlp: nn.Module, activation: str) -> None:
    """Put gelu or relu after the MLP's hidden layers, in place of the GELUs there."""
    if activation == "relu":
        for name, layer in mlp.named_children():
            if isinstance(layer, nn.GELU):
                setattr(mlp, name, nn.ReLU())


def remove_predictor(teacher: nn.Module) -> None:
    """Take the predictor off a teacher: it is the student's alone."""
    for module in teacher.modules():
        if isinstance(module, VariantHead):
            module.predictor = None


# -- teachers (Fig. 6): each is called as update_teacher is, after the student's step


def student_itself(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """Make the teacher a copy of the student."""
    update_teacher(student, teacher, 0.0)


class PreviousIteration:
    """Keep the teacher one step behind: it becomes the student just before each student's step."""

    def __init__(self, student: nn.Module, teacher: nn.Module, optimizer: Optimizer):
        self.student = student
        self.teacher = teacher
        optimizer.register_step_pre_hook(self.before_step)

    def before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        update_teacher(self.student, self.teacher, 0.0)

    def __call__(self, student: nn.Module, teacher: nn.Module, momentum: float) -> None:
        """Leave the teacher as it is until the next step."""


class PreviousEpoch:
    """Keep the teacher one epoch behind: it becomes the student before an epoch's first step.

    steps_done: of the unfinished epoch, where a stopped run continues.
    So an evaluation between two epochs sees the teacher that the last epoch had.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, steps_per_epoch: int, steps_done: int = 0
    ):
        self.student = student
        self.steps_per_epoch = steps_per_epoch
        self.steps_done = steps_done
        teacher.register_forward_pre_hook(self.before_forward)  # evaluations call teacher.backbone

    def before_forward(self, teacher: nn.Module, inputs: tuple) -> None:
        if self.steps_done % self.steps_per_epoch == 0:
            update_teacher(self.student, teacher, 0.0)

    def __call__(self, student: nn.Module, teacher: nn.Module, momentum: float) -> None:
        self.steps_done += 1


def make_follow(
    kind: str,
    student: nn.Module,
    teacher: nn.Module,
    optimizer: Optimizer,
    steps_per_epoch: int,
    steps_done: int = 0,
) -> Follow:
    """Return what moves the teacher after a step: momentum (DINO's), or one of Fig. 6's others."""
    if kind == "student":
        return student_itself
    if kind == "previous_iteration":
        return PreviousIteration(student, teacher, optimizer)
    if kind == "previous_epoch":
        return PreviousEpoch(student, teacher, steps_per_epoch, steps_done)
    return update_teacher
