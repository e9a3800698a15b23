"""Train with other parts than DINO's: the settings that its ablations need beside train.py's.

    python -m ablations.train --loss infonce --local_crops_number 0
    torchrun --nproc_per_node=8 -m ablations.train --data_path imagenet/train --centering sinkhorn

Networks, loss and the teacher's update are handed to train.py's loop; nothing else differs.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

import train
from ablations.byol import SquaredDistance
from ablations.moco import InfoNCE, shuffle_batches
from ablations.variants import SinkhornLoss, VariantHead, make_follow, remove_predictor
from multicrop import MultiCropNetwork
from optimizer import make_optimizer
from runtime import batch_norm
from runtime.commandline import errors_in_one_line
from runtime.hardware import World
from settings import Settings, parse_settings, refuse, setting
from teacher import make_teacher
from training import run_state
from training.hooks import Hooks
from training.run_state import RunState, build_student


@dataclass
class AblationSettings(Settings):
    """The settings of train.py, and what the ablations change."""

    loss: str = setting(
        "cross_entropy",
        "cross_entropy, mse (BYOL's) or infonce (MoCo's, at --student_temp)",
        choices=("cross_entropy", "mse", "infonce"),
        fixed=True,
    )
    centering: str = setting(
        "center",
        "what keeps the teacher from collapse: center, or equal use of the prototypes in a batch "
        "by sinkhorn or batch_softmax",
        choices=("center", "sinkhorn", "batch_softmax"),
    )
    predictor: bool = setting(
        False, "two more layers on the student's projection, as BYOL has", fixed=True
    )
    queue_length: int = setting(
        65536,
        "keys that infonce compares with; small data wants fewer than it has images",
        at_least=1,
        fixed=True,
    )
    teacher: str = setting(
        "momentum",
        "momentum (the average), or a copy: previous_epoch, previous_iteration, student (Fig. 6)",
        choices=("momentum", "previous_epoch", "previous_iteration", "student"),
    )
    head_activation: str = setting(
        "gelu", "gelu or relu", choices=("gelu", "relu"), fixed=True
    )
    head_l2_bottleneck: bool = setting(
        True,
        "false: hidden layers and a linear one, neither bottleneck nor l2 norm",
        fixed=True,
    )
    head_nlayers: int = setting(
        3,
        "layers of the head before the prototypes (appendix C counts these too: 4)",
        at_least=0,
        at_most=100,
        fixed=True,
    )


# Fig. 6's teachers as momentum after a step: 0 makes the teacher the student, 1 leaves it.
MOMENTUM_OF_COPIES = {"student": 0.0, "previous_iteration": 1.0, "previous_epoch": 1.0}


def parse(argv: list[str] | None = None) -> AblationSettings:
    """Return checked settings, as settings.parse_settings does."""
    settings = parse_settings(argv, AblationSettings)
    if settings.head_l2_bottleneck and settings.head_nlayers < 1:
        refuse(settings, "head_nlayers", "must be at least 1 (0 without the l2 bottleneck)")
    if settings.cuda_graph:
        refuse(settings, "cuda_graph", "is for train.py: leave it out")
    if settings.centering != "center" and settings.loss != "cross_entropy":
        refuse(settings, "centering", "is for --loss cross_entropy: leave it out")
    return settings


def make_head(settings: AblationSettings, embed_dim: int) -> nn.Module:
    """Return a head without a predictor: features (B, D) -> logits (B, K)."""
    return VariantHead(
        embed_dim,
        settings.out_dim,
        nlayers=settings.head_nlayers,
        hidden_dim=settings.head_hidden_dim,
        bottleneck_dim=settings.head_bottleneck_dim,
        use_bn=settings.use_bn_in_head,
        norm_last_layer=settings.norm_last_layer,
        init_std=settings.init_std,
        activation=settings.head_activation,
        l2_bottleneck=settings.head_l2_bottleneck,
    )


def make_student(settings: AblationSettings, world: World) -> MultiCropNetwork:
    """Return the student on its device; its predictor starts fresh, also with --init_from."""
    student = build_student(settings, make_head)
    if settings.predictor:
        student.head.add_predictor()
    if settings.loss != "infonce":  # MoCo shuffles the batches instead
        student = batch_norm.synchronise_batch_norms(student, world)
    return student.to(world.device)


def make_loss(settings: AblationSettings, world: World) -> nn.Module:
    """Return the loss of Eq. 3, or what Tables 7, 14 and 15 put in its place."""
    if settings.loss == "mse":
        return SquaredDistance(settings.out_dim, center_momentum=settings.center_momentum)
    if settings.loss == "infonce":
        return InfoNCE(settings.out_dim, settings.student_temp, settings.queue_length, world)
    if settings.centering == "center":
        return run_state.make_loss(settings)
    return SinkhornLoss(
        settings.out_dim,
        settings.student_temp,
        settings.center_momentum,
        iterations={"batch_softmax": 1, "sinkhorn": 3}[settings.centering],
        world=world,
    )


def start_run(settings: AblationSettings, world: World) -> RunState:
    """Return a fresh run, as training.run_state.start_run does."""
    student = make_student(settings, world)
    teacher = make_teacher(student)
    remove_predictor(teacher)
    if settings.loss == "infonce":
        shuffle_batches(teacher, world)
    dino_loss = make_loss(settings, world).to(world.device)
    return RunState(student, teacher, dino_loss, make_optimizer(settings.optimizer, student))


def hooks(settings: AblationSettings) -> Hooks:
    """Return what train.train calls in place of DINO's parts."""

    def follow(run: RunState, steps_per_epoch: int, steps_done: int) -> Callable:
        return make_follow(
            settings.teacher,
            run.student,
            run.teacher,
            run.optimizer,
            steps_per_epoch,
            steps_done,
        )

    def before_save(run: RunState, world: World) -> None:
        if settings.loss == "infonce":  # whose batch norms are each process's own
            average_batch_norms(run, world)
        if settings.teacher != "momentum" and run.epoch > 0:
            # the log names the momentum in force, not the schedule that nobody follows
            run.history[-1]["teacher_momentum"] = MOMENTUM_OF_COPIES[settings.teacher]

    return Hooks(start_run=start_run, make_follow=follow, before_save=before_save)


def average_batch_norms(run: RunState, world: World) -> None:
    """Give all processes the mean of their batch norms' running statistics."""
    for network in (run.student, run.teacher):
        for buffer in network.buffers():
            if buffer.is_floating_point():  # the count of batches is the same in all
                buffer.copy_(world.mean(buffer))


def main(argv: list[str] | None = None) -> None:
    with errors_in_one_line():
        settings = parse(argv)
        train.launch(settings, hooks(settings))


if __name__ == "__main__":
    main()
