"""Images of more than 8 bits a pixel: which of their values become black and white.

X-rays, microscopes and heat cameras write 10 to 16 bits, or floats. One pair (black, white) holds
for a whole data set, so that what is darker in the files stays darker. A file that is read by
itself is a data set of one.
"""

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from runtime.commandline import InputError

SAMPLE = 1000  # as many files are looked at, evenly spaced: all would take too long
Levels = tuple[float, float]  # the values that become black and white


class Found(NamedTuple):
    """What one file holds: "integers" or "floats", their range; or "colours" of 16 bits."""

    file: Path
    kind: str
    lowest: float = math.nan
    highest: float = math.nan


def is_high_range(image: Image.Image) -> bool:
    """Return whether the image is grey with more than 8 bits: Pillow's modes I, I;16 and F."""
    return image.mode.startswith("I") or image.mode == "F"


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


def look_at(image: Image.Image, file: Path = Path()) -> Found | None:
    """Return what a high-range image holds, or None for an ordinary one, whose header is enough."""
    if not is_high_range(image):
        if ";16" in str(image.tile):  # Pillow itself keeps the upper 8 bits of each colour
            return Found(file, "colours")
        return None
    kind = "floats" if image.mode == "F" else "integers"
    values = np.array(image, dtype=np.float64)
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
            return look_at(image, file)
    except Exception:  # whoever reads the image says what is wrong with it
        return None


def to_8_bits(image: Image.Image, levels: Levels | None) -> Image.Image:
    """Return a high-range image in 256 levels of grey; its own levels where none are given."""
    values = np.array(image, dtype=np.float64)
    if levels is None:
        found = look_at(image)
        levels = choose_levels(*found[1:]) if found else (0.0, 1.0)
    black, white = levels
    scaled = 255 * (values - black) / (white - black)
    scaled = np.nan_to_num(scaled, nan=0.0).clip(0, 255).round()
    return Image.fromarray(scaled.astype(np.uint8))


def find_levels(files: Sequence[Path], wanted: Levels) -> tuple[Levels | None, list[str]]:
    """Return the levels of a data set's high-range images, and lines that say so.

    files: those that may have more than 8 bits. wanted: --levels; 0 and 0: find them.
    None, and no lines, where all images are ordinary. Raises InputError if some are integers and
    others floats, since no pair of levels fits both.
    """
    given = any(wanted)
    if given and wanted[0] == wanted[1]:
        raise InputError(f"--levels {wanted[0]:g} {wanted[1]:g} must be two values")
    step = max(1, math.ceil(len(files) / SAMPLE))
    with ThreadPoolExecutor() as pool:
        looks = list(pool.map(look_at_file, files[::step]))
    by_kind: dict[str, list[Found]] = {"integers": [], "floats": [], "colours": []}
    for found in looks:
        if found:
            by_kind[found.kind].append(found)

    lines = []
    colours = by_kind.pop("colours")
    if colours:
        lines.append(
            f"16 bits a colour in {len(colours)} of {len(looks)} files looked at, such as "
            f"{colours[0].file}: the upper 8 are read"
        )
    kinds = [kind for kind in by_kind if by_kind[kind]]
    if not kinds:
        return None, lines
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
    lines.append(
        f"more than 8 bits in {len(deep)} of {len(looks)} files looked at, values {lowest:.9g} to "
        f"{highest:.9g}: --levels {levels[0]:.9g} {levels[1]:.9g} are black and white"
    )
    return levels, lines
