"""DAVIS 2017 (Table 5): its videos on disk, indexed PNGs with its palette, its measures J and F.

J is the overlap of the regions, F the agreement of their outlines. Both agree with the official
evaluation of the semi-supervised task, also where one would not guess it: the first and the last
frame are not scored; the objects are 1 ... the largest number in the first annotation, each
counting once however long its video; void pixels (255) count as ground.

Shapes: T frames of H x W pixels; ids are object numbers, 0 on the ground.
"""
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data import UNREADABLE, decode
from runtime.commandline import InputError, brief, write_whole

VOID = 255


def voc_palette() -> list[int]:
    """Return red, green, blue of number 0, of 1 ... 255, as PASCAL VOC and DAVIS colour objects.

    The last three bits of the number are the highest bits of the three colours, the next three bits
    their second highest, and so on.
    """
    palette = []
    for number in range(256):
        colour = [0, 0, 0]
        for place in range(8):
            for channel in range(3):
                bit = number >> (3 * place + channel) & 1
                colour[channel] += bit << (7 - place)
        palette += colour
    return palette


PALETTE = voc_palette()


class Video(NamedTuple):
    """images uint8 (T, 3, H, W), ids uint8 (T, H, W), the frames' names, the masks' palette."""

    name: str
    images: Tensor
    ids: Tensor
    frames: list[str]
    palette: list[int] = PALETTE


def davis_files(data_path: str) -> dict[str, list[tuple[Path, Path]]]:
    """Return the (frame, annotation) files of each sequence in ImageSets/2017/val.txt."""
    root = Path(data_path)
    listing = root / "ImageSets" / "2017" / "val.txt"
    if not listing.is_file():
        raise InputError(
            f"no {str(listing)!r}: --data_path must be the folder DAVIS, with "
            "ImageSets/2017/val.txt, JPEGImages/480p and Annotations/480p in it"
        )
    files = {}
    for name in listing.read_text(errors="replace").split():
        if Path(name).name != name or name == "..":  # a folder of this name gets the masks
            raise InputError(
                f"{str(listing)!r} names {brief(name)!r}, which is no folder's own name: fix it"
            )
        folder = root / "JPEGImages" / "480p" / name
        frames = sorted(folder.glob("*.jpg"))
        if len(frames) < 3:
            raise InputError(
                f"{str(folder)!r} has {len(frames)} frames (*.jpg), and the first and the last are "
                f"not scored: add some, or take {name!r} out of {str(listing)!r}"
            )
        annotations = root / "Annotations" / "480p" / name
        files[name] = [(frame, annotations / f"{frame.stem}.png") for frame in frames]
    if not files:
        raise InputError(f"{str(listing)!r} names no sequence: write one name a line")
    return files


def read_annotation(path: Path) -> tuple[Tensor, list[int]]:
    """Read an indexed or grey PNG: ids (H, W) uint8, and its palette."""
    try:
        with Image.open(path) as image:
            mode = image.mode
            ids = np.array(image)
            palette = image.getpalette() or PALETTE
    except UNREADABLE as error:
        raise InputError(
            f"cannot read the annotation {str(path)!r} ({brief(error)}): take another copy of it"
        ) from None
    if mode not in ("P", "L"):
        raise InputError(
            f"the annotation {str(path)!r} holds {mode} colours, not object numbers: save it as an "
            "indexed PNG"
        )
    return torch.from_numpy(ids), palette


def write_annotation(path: Path, ids: Tensor, palette: list[int]) -> None:
    """Write ids (H, W) uint8 as an indexed PNG, as the official evaluation reads it."""
    image = Image.fromarray(ids.numpy())
    image.putpalette(palette)
    write_whole(path, image.save)


def read_video(name: str, files: list[tuple[Path, Path]]) -> Video:
    """Read one sequence. Raise InputError for sizes that differ, and where there is no object."""
    images, ids = [], []
    for frame, annotation in files:
        images.append(decode(frame))
        ids.append(read_annotation(annotation)[0])
        for file, size in ((frame, images[-1].shape[1:]), (annotation, ids[-1].shape)):
            if size != images[0].shape[1:]:
                raise InputError(
                    f"{str(file)!r} is {size[1]} x {size[0]} pixels, but {str(files[0][0])!r} "
                    f"{images[0].shape[2]} x {images[0].shape[1]}: a sequence must have one size"
                )
    _, first_annotation = files[0]
    if not objects_of(ids[0]):
        raise InputError(
            f"the annotation {str(first_annotation)!r} marks no object (1 ... 254) to follow: "
            "mark one"
        )
    _, palette = read_annotation(first_annotation)
    frames = [frame.stem for frame, _ in files]
    return Video(name, torch.stack(images), torch.stack(ids), frames, palette)


def without_void(ids: Tensor) -> Tensor:
    """Return the ids with void pixels as ground."""
    return torch.where(ids == VOID, 0, ids)


def objects_of(first: Tensor) -> range:
    """Return the numbers of the objects that are scored, by the first annotation (H, W)."""
    return range(1, 1 + int(without_void(first).max()))


def region_similarity(masks: Tensor, truths: Tensor) -> Tensor:
    """Return J = |A and B| / |A or B|, 1 where both are empty: bool (T, H, W) twice -> (T,)."""
    both = (masks & truths).sum(dim=(1, 2))
    either = (masks | truths).sum(dim=(1, 2))
    return torch.where(either > 0, both.double() / either, 1.0)


def outline(masks: Tensor) -> Tensor:
    """Return where the pixel to the right, below, or right below is another.

    (T, H, W) -> (T, H, W), of bool masks bool, of ids not 0. Beyond the last row and column the
    image goes on as it ends.
    """
    height, width = masks.shape[1:]
    down = torch.arange(1, height + 1).clamp(max=height - 1)
    right = torch.arange(1, width + 1).clamp(max=width - 1)
    below = masks[:, down]
    return (masks ^ masks[:, :, right]) | (masks ^ below) | (masks ^ below[:, :, right])


def fraction_near(lines: Tensor, others: Tensor, radius: int) -> Tensor:
    """Return the fraction of the lines' pixels with one of the others' at most radius away.

    bool (T, H, W) twice -> (T,), 1 where there are no lines.
    """
    # look up each line's disc: dilating whole images would take many times longer
    frame, y, x = lines.nonzero(as_tuple=True)
    padded = F.pad(others, 4 * [radius])
    near = torch.zeros(len(frame), dtype=torch.bool)
    for down in range(-radius, radius + 1):
        reach = math.isqrt(radius**2 - down**2)
        for right in range(-reach, reach + 1):
            near |= padded[frame, y + radius + down, x + radius + right]
    number = lines.sum(dim=(1, 2))
    found = torch.zeros(len(lines), dtype=torch.double).index_add_(0, frame, near.double())
    return torch.where(number > 0, found / number, 1.0)


def contour_accuracy(masks: Tensor, truths: Tensor, tolerance: float = 0.008) -> Tensor:
    """Return F = 2 P R / (P + R) in 0 ... 1: bool (T, H, W) twice -> (T,).

    P and R are the fractions of the masks' and the truths' outlines that have the other within
    tolerance, in diagonals. F is 1 where there are no outlines, 0 where only one mask has some.
    """
    radius = math.ceil(tolerance * math.hypot(*masks.shape[1:]))
    found, true = outline(masks), outline(truths)
    precision = fraction_near(found, true, radius)
    recall = fraction_near(true, found, radius)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-12)


def scores(ids: Tensor, truth: Tensor) -> Tensor:
    """Return J and F of each object in %, means over the frames: (T, H, W) twice -> (n, 2)."""
    means = []
    for number in objects_of(truth[0]):
        masks = ids[1:-1] == number  # neither the first frame nor the last is scored
        truths = truth[1:-1] == number
        region = region_similarity(masks, truths).mean()
        contour = contour_accuracy(masks, truths).mean()
        means.append([region, contour])
    return 100 * torch.tensor(means)
