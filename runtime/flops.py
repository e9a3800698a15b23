"""The work of a piece of code in floating-point operations, by PyTorch's own counter.

It counts matrix products and convolutions; a multiplication and an addition are two.
"""

from collections.abc import Callable

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def flops(work: Callable) -> int:
    """Return the operations of one call."""
    # by the formula: the counter does not know every fused attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()
