"""The search for the first tensor of a step that holds NaN or infinity."""

import math

from torch import Tensor, nn

from training.run_state import first_bad


def first_bad_tensor(
    values: list[float], micro_batches: list[list[Tensor]], student: nn.Module
) -> str:
    """Return what is not finite first, in a step's order: crops, logits, gradients."""
    loss, entropy, kl, _ = values
    for crops in micro_batches:
        for view, crop in enumerate(crops, start=1):
            if not crop.isfinite().all():
                return f"view {view} of the batch"
    if not math.isfinite(entropy):
        return "the teacher's logits"
    if not math.isfinite(kl):
        return "the student's logits"
    if not math.isfinite(loss):
        return "the logits"
    gradients = []
    for name, param in student.named_parameters():
        if param.grad is not None:
            gradients.append((name, param.grad))
    name = first_bad(gradients) or "a frozen layer, or one whose square is too large"
    return f"the gradient of {name}"
