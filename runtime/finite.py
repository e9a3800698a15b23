"""Numbers that are not finite: a run stops at the step that makes one, says where it came from, and saves none of it.

The step itself only returns its loss and its largest gradient's norm, which are read anyway; the search begins when
one of them is NaN or infinite, so it costs nothing before.
"""
import math
from collections.abc import Iterable

from torch import Tensor, nn

from runtime.commandline import InputError

MEND = "the last checkpoint is untouched; go on from it with a lower --lr, or with --precision fp32"


def first_bad(named: Iterable[tuple[str, Tensor]]) -> str:
    """The name of the first tensor that holds NaN or infinity; "" if all are finite."""
    return next((name for name, tensor in named if not tensor.isfinite().all()), "")


def origin(metrics: list[float], micro_batches: list[list[Tensor]], student: nn.Module) -> str:
    """The first bad tensor in a step's order: its crops, the teacher's logits, the student's, the gradients.

    metrics: the step's loss, entropy, KL and largest norm of a gradient; only losses that have no entropy give 0.
    """
    crops = ((f"view {view + 1} of the batch", crop) for crops in micro_batches for view, crop in enumerate(crops))
    loss, entropy, kl, _ = metrics
    if not math.isfinite(loss):
        return first_bad(crops) or ("the teacher's logits" if not math.isfinite(entropy) else
                                    "the student's logits" if not math.isfinite(kl) else "the logits")
    gradients = ((name, param.grad) for name, param in student.named_parameters() if param.grad is not None)
    return f"the gradient of {first_bad(gradients) or 'one that is frozen, or whose square is too large'}"


def check_steps(metrics: Tensor, own: Tensor, epoch: int, last_step: int, micro_batches: list[list[Tensor]],
                student: nn.Module) -> None:
    """Raise InputError at the first of these steps that is not finite: (steps, 4), as train_step returns them.

    metrics: means over the processes; own: this one's. micro_batches: what the last of the steps saw, of which alone
    the tensors are still there. epoch and last_step count from 1.
    """
    for step, (one, mine) in enumerate(zip(metrics.tolist(), own.tolist()), start=last_step + 1 - len(metrics)):
        if all(map(math.isfinite, one)):
            continue
        found = ("in another process, whose line tells" if all(map(math.isfinite, mine)) else
                 origin(mine, micro_batches, student) if step == last_step else
                 "not known, since its tensors made room for later steps'")
        what = f"the loss is {one[0]}" if not math.isfinite(one[0]) else f"a gradient's norm is {one[3]}"
        raise InputError(f"{what} at epoch {epoch}, step {step}, first bad: {found}: {MEND}")
