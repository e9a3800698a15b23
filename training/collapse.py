"""What a run prints when its teacher collapses (Fig. 7): what is seen, and what to try."""

from itertools import groupby


def verdict(kinds: list[str], entropies: list[float], kls: list[float], log_k: float) -> str:
    """Return the line for an epoch's parts, each uniform, one-hot or "" by report.kind_of_collapse.

    "" where the epoch began in a collapse and left it for good, or met one in a single part.
    entropies and kls: of the parts.
    """
    course = [kind for kind, _ in groupby(kinds)]  # as in ["", "one-hot", "", "one-hot"]
    collapsed = [kind for kind in kinds if kind]
    if course[1:] == [""] or (len(collapsed) == 1 and not kinds[-1]):
        return ""

    entropy, kl = entropies[-1], kls[-1]
    if course in (["uniform"], ["", "uniform"]):
        return (
            "COLLAPSE, uniform: the teacher's targets are as good as uniform, with an entropy of "
            f"{entropy:.3f}, where ln K = {log_k:.3f}, and a KL of {kl:.3f}: try a lower "
            "--teacher_temp and --warmup_teacher_temp, a lower --lr, a longer --freeze_last_layer"
        )
    if course in (["one-hot"], ["", "one-hot"]):
        return (
            f"COLLAPSE, one-hot: entropy near 0 ({entropy:.3f}) and KL too ({kl:.3f}), as when "
            "every image gets the same prototype: try --center_momentum 0.9, a higher "
            "--teacher_temp, a lower --lr"
        )
    return (
        f"COLLAPSE, swinging: of the epoch's {len(kinds)} parts {kinds.count('one-hot')} are "
        f"one-hot and {kinds.count('uniform')} uniform, with others between, and the entropy goes "
        f"from {min(entropies):.3f} to {max(entropies):.3f}, where ln K = {log_k:.3f}: try a "
        "lower --lr, --use_bn_in_head, and a teacher that is an average (--momentum_teacher)"
    )
