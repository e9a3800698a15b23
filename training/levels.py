"""Images of more than 8 bits a pixel: which of their values become black and white.

X-rays, microscopes and heat cameras write 10 to 16 bits, or floats. One pair (black, white) holds
for a whole data set, so that what is darker in the files stays darker. A file that is read by
itself is a data set of one.
"""

import io
import math
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from runtime.commandline import InputError

SAMPLE = 1000  # as many files are looked at, evenly spaced: all would take too long
OTHER_BYTES = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
GREY_ALPHA = "LA;16B"  # Pillow's name of a PNG's pixels
Levels = tuple[float, float]  # the values that become black and white


class Found(NamedTuple):
    """What one file holds: "integers" or "floats", and their range."""

    file: Path
    kind: str
    lowest: float
    highest: float


def has_deep_colours(image: Image.Image) -> bool:
    """Return whether a file just opened has colours of 16 bits, of which Pillow reads the upper 8.

    Grey with alpha counts too: Pillow makes RGBA of it.
    """
    raw = str(image.tile)
    deep = GREY_ALPHA in raw or ("RGB" in raw and ";16" in raw)  # BGR;16 has 16 for all three
    return "RGB" in image.mode and deep


def read_colours(image: Image.Image) -> np.ndarray:
    """Return all 16 bits of an image just opened that has_deep_colours: (H, W, 3 or 4)."""
    image.fp.seek(0)
    second = Image.open(io.BytesIO(image.fp.read()))
    if GREY_ALPHA in str(second.tile):
        # a pixel's four bytes, upper and lower of grey and of alpha, taken for RGBA of 8 bits
        second.tile = [tile._replace(args="RGBA") for tile in second.tile]
        pairs = np.array(second, dtype=np.float64)
        grey_alpha = 256 * pairs[..., 0::2] + pairs[..., 1::2]
        return grey_alpha[..., [0, 0, 0, 1]]
    tiles = []
    for tile in second.tile:
        # bytes in the other order: Pillow then keeps the lower 8 bits, taking them for the upper
        args = [tile.args] if isinstance(tile.args, str) else list(tile.args)
        args[0] = args[0][:-1] + OTHER_BYTES[args[0][-1]]
        tiles.append(tile._replace(args=args[0] if len(args) == 1 else tuple(args)))
    second.tile = tiles
    return 256.0 * np.array(image) + np.array(second)


def choose_levels(kind: str, lowest: float, highest: float) -> Levels:
    """Return the values that become black and white, for values from lowest to highest.

    Integers: 0, and the largest number of as many bits as the highest value has, such as 4095.
    Floats, negative integers, and integers that fill less than half of that range: the lowest and
    the highest value. So at least half of the 256 levels are used.
    """
    if kind == "integers" and lowest >= 0:
        bits = max(8, int(highest).bit_length())
        white = 2.0**bits - 1
        spread = highest - lowest
        if bits == 8 or spread == 0 or spread >= white / 2:
            return 0.0, white
    if lowest == highest:  # one value says nothing about the range
        return min(lowest, 0.0), max(highest, 1.0)
    return lowest, highest


def values_of(image: Image.Image) -> np.ndarray | None:
    """Return the values of an image just opened that has more than 8 bits, None for others.

    Grey (H, W), in Pillow's modes I, I;16 and F, or colours (H, W, 3 or 4). Of an ordinary image
    only the header is read.
    """
    if has_deep_colours(image):
        return read_colours(image)
    if image.mode.startswith("I") or image.mode == "F":
        return np.array(image, dtype=np.float64)
    return None


def look_at(values: np.ndarray, mode: str, file: Path = Path()) -> Found | None:
    """Return what these values of an image of this mode hold, or None if none is finite."""
    kind = "floats" if mode == "F" else "integers"
    if mode == "RGBA":
        values = values[..., :3]
    values = values[np.isfinite(values)]  # NaN often means: nothing was measured here
    if values.size == 0:
        return None
    return Found(file, kind, float(values.min()), float(values.max()))  # no NumPy scalars


def look_at_file(file: Path) -> Found | None:
    """Return what a file holds, or None for an ordinary image and for one that cannot be read."""
    if not os.path.isfile(file):  # reading a pipe would wait for ever
        return None
    try:
        with Image.open(file) as image:
            values = values_of(image)
            return None if values is None else look_at(values, image.mode, file)
    except Exception:  # whoever reads the image says what is wrong with it
        return None


def to_8_bits(image: Image.Image, levels: Levels | None) -> Image.Image:
    """Return an image of more than 8 bits in 256 levels; its own black and white without levels.

    The image is one just opened. Others are returned as they are.
    """
    values = values_of(image)
    if values is None:
        return image
    if levels is None:
        found = look_at(values, image.mode)
        levels = choose_levels(*found[1:]) if found else (0.0, 1.0)
    black, white = levels
    scaled = 255 * (values - black) / (white - black)
    scaled = np.nan_to_num(scaled, nan=0.0).clip(0, 255).round().astype(np.uint8)
    if image.mode == "RGBA":
        scaled[..., 3] = values[..., 3] // 256
    result = Image.fromarray(scaled)
    result.getexif().update(image.getexif())  # says how the camera was held
    return result


def find_levels(files: Sequence[Path], wanted: Levels) -> tuple[Levels | None, list[str]]:
    """Return the levels of a data set's high-range images, and lines that say so.

    files: those that may have more than 8 bits. wanted: --levels; 0 and 0: find them.
    None, and no lines, where all images are ordinary. Raises InputError if some are integers and
    others floats, since no pair of levels fits both.
    """
    given = any(wanted)
    distance = abs(wanted[1] - wanted[0])
    if given and not 0 < distance < math.inf:  # NaN too
        raise InputError(f"--levels {wanted[0]:g} {wanted[1]:g} must be two values, both finite")
    step = max(1, math.ceil(len(files) / SAMPLE))
    with ThreadPoolExecutor() as pool:
        looks = list(pool.map(look_at_file, files[::step]))
    by_kind: dict[str, list[Found]] = {"integers": [], "floats": []}
    for found in looks:
        if found:
            by_kind[found.kind].append(found)
    kinds = [kind for kind in by_kind if by_kind[kind]]
    if not kinds:
        return None, []
    if len(kinds) == 2 and not given:
        examples = " and ".join(repr(str(by_kind[kind][0].file)) for kind in kinds)
        raise InputError(
            f"integers of more than 8 bits and floats, as in {examples}, have no white in common: "
            "save the ones as the others, or give --levels BLACK WHITE"
        )
    deep = by_kind[kinds[0]]
    lowest = min(found.lowest for found in deep)
    highest = max(found.highest for found in deep)
    levels = choose_levels(kinds[0], lowest, highest)
    if given:
        levels = (wanted[0], wanted[1])
        used = 255 * (highest - lowest) / abs(levels[1] - levels[0])
        if 0 < used < 4:  # as of floats from 0 to 1, after a training on 12 bits
            raise InputError(
                f"values {lowest:.9g} to {highest:.9g} fill {used:.2g} of 255 levels between "
                f"--levels {levels[0]:.9g} {levels[1]:.9g}: give the black and white of these "
                "images"
            )
    line = (
        f"more than 8 bits in {len(deep)} of {len(looks)} files looked at, values {lowest:.9g} to "
        f"{highest:.9g}: --levels {levels[0]:.9g} {levels[1]:.9g} are black and white"
    )
    return levels, [line]
