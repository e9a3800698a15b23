"""Errors about full memory. Read only after an error."""

import re
import sys

from runtime.commandline import brief

# the words of PyTorch's allocators, of numpy's, and of tensors too large for any memory
FULL = r"allocate|out of memory|Storage size calculation overflowed|integer multiplication overflow"


def exit_if_full(error: Exception) -> None:
    """Print an error about full memory as one line and exit with status 2; return after others."""
    said = re.search(rf"[^.:]*({FULL}).*", str(error))
    if not said and not isinstance(error, MemoryError):
        return
    words = brief(said[0]) if said else "no more is free"
    print(
        f"error: the memory does not suffice ({words}): lower the images of a batch, the pixels, "
        "or the network's widths",
        file=sys.stderr,
    )
    sys.exit(2)
