"""Too little memory for an image, as an error of one line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from runtime.commandline import InputError


@contextmanager
def enough_memory(image: Tensor) -> Iterator[None]:
    """Raise InputError where the memory is too short for an image (3, H, W)."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # PyTorch has no error of its own for a CPU's memory
        if isinstance(error, RuntimeError) and not re.search("memory|bad_alloc", str(error)):
            raise
        height, width = image.shape[-2:]
        raise InputError(
            f"too little memory for an image of {width} x {height} pixels: ask for a smaller "
            "--image_size, or cut the image"
        ) from None
