"""The schedules (Sec. 3.2, "Implementation details"): pure functions of the step, counted from 0."""
import math


def cosine(step: int, total_steps: int, start: float, end: float, warmup_steps: int = 0) -> float:
    """Linear from 0 to start over the warm-up, then start -> end on half a cosine.

    Used for the learning rate (with warm-up), the weight decay and the teacher momentum (Sec. 3.1). As in the release,
    the last warm-up step has the full value and the step after the last would have the end value.
    """
    if step < warmup_steps:
        return start * step / max(1, warmup_steps - 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return end + 0.5 * (start - end) * (1 + math.cos(math.pi * progress))


def linear(step: int, warmup_steps: int, start: float, end: float) -> float:
    """Linear from start to end over the warm-up, then end: the teacher temperature.

    Paper: over the first 30 epochs; release: the same in jumps, one an epoch; here: one a step.
    """
    return end if step >= warmup_steps else start + (end - start) * step / warmup_steps
