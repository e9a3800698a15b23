"""DAVIS 2017 (Table 5): its videos on disk, indexed PNGs with its palette, and its two measures J and F.

J is the overlap of the regions, F the agreement of their outlines. Both agree with the official evaluation of the
semi-supervised task, also where one would not guess it: the first and the last frame are not scored; the objects are
1 ... the largest number in the first annotation, each counting once however long its video; what is marked void (255)
counts as ground. Masks of void pixels would be taken off both masks before, which the official evaluation leaves out.

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
PALETTE = [sum((number >> 3 * bit + channel & 1) << 7 - bit for bit in range(8))  # DAVIS's, which is PASCAL VOC's:
           for number in range(256) for channel in range(3)]  # ... red, green, blue of 0, of 1 ...


class Video(NamedTuple):
    """images uint8 (T, 3, H, W), ids uint8 (T, H, W), the frames' names and the annotations' palette."""

    name: str
    images: Tensor
    ids: Tensor
    frames: list[str]
    palette: list[int] = PALETTE


def davis_files(data_path: str) -> dict[str, list[tuple[Path, Path]]]:
    """The sequences of ImageSets/2017/val.txt -> their (frame, annotation) files; raises InputError if one lacks."""
    root = Path(data_path)
    listing, files = root / "ImageSets" / "2017" / "val.txt", {}
    if not listing.is_file():
        raise InputError(f"no {str(listing)!r}: --data_path must be the folder DAVIS, with ImageSets/2017/val.txt, "
                         "JPEGImages/480p and Annotations/480p in it")
    for name in listing.read_text(errors="replace").split():
        if Path(name).name != name or name == "..":
            raise InputError(f"{str(listing)!r} names {brief(name)!r}, which is no folder's own name: take it out")
        frames = sorted((root / "JPEGImages" / "480p" / name).glob("*.jpg"))
        if len(frames) < 3:
            raise InputError(f"{str(root / 'JPEGImages' / '480p' / name)!r} has {len(frames)} frames (*.jpg), and the "
                             f"first and the last are not scored: add some, or take {name!r} out of {str(listing)!r}")
        files[name] = [(frame, root / "Annotations" / "480p" / name / f"{frame.stem}.png") for frame in frames]
        missing = next((annotation for _, annotation in files[name] if not annotation.is_file()), None)
        if missing:
            raise InputError(f"no annotation at {str(missing)!r}: add it, or take {name!r} out of {str(listing)!r}")
    if not files:
        raise InputError(f"{str(listing)!r} names no sequence: write one name a line")
    return files


def read_annotation(path: Path) -> tuple[Tensor, list[int]]:
    """An indexed (or grey) PNG -> (ids (H, W) uint8, its palette); raises InputError for another file."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L"):
                raise InputError(f"the annotation {str(path)!r} holds {image.mode} colours, not object numbers: save "
                                 "it as an indexed PNG")
            return torch.from_numpy(np.array(image)), image.getpalette() or PALETTE
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"cannot read the annotation {str(path)!r} ({brief(error)}): mend it") from None


def write_annotation(path: Path, ids: Tensor, palette: list[int]) -> None:
    """ids (H, W) uint8 -> an indexed PNG, as the official evaluation reads it."""
    image = Image.fromarray(ids.numpy())
    image.putpalette(palette)
    write_whole(path, image.save)


def read_video(name: str, files: list[tuple[Path, Path]]) -> Video:
    """Read one sequence; raises InputError for sizes that differ and for a first annotation without objects."""
    images, ids = [], []
    for frame, annotation in files:
        images.append(decode(frame))
        ids.append(read_annotation(annotation)[0])
        for file, size in ((frame, images[-1].shape[1:]), (annotation, ids[-1].shape)):
            if size != images[0].shape[1:]:
                raise InputError(f"{str(file)!r} is {size[1]} x {size[0]} pixels, but {str(files[0][0])!r} "
                                 f"{images[0].shape[2]} x {images[0].shape[1]}: all of a sequence must have one size")
    if not objects_of(ids[0]):
        raise InputError(f"the annotation {str(files[0][1])!r} marks no object (1 ... 254) to follow: mark one")
    return Video(name, torch.stack(images), torch.stack(ids), [frame.stem for frame, _ in files],
                 read_annotation(files[0][1])[1])


def objects_of(first: Tensor) -> range:
    """The numbers of the objects that are scored, by the first annotation (H, W)."""
    return range(1, 1 + int(torch.where(first == VOID, 0, first).max()))


def region_similarity(masks: Tensor, truths: Tensor) -> Tensor:
    """J = |A and B| / |A or B|, 1 where both are empty: bool (T, H, W) twice -> (T,) in 0 ... 1."""
    both, either = ((masks & truths).sum(dim=(1, 2)), (masks | truths).sum(dim=(1, 2)))
    return torch.where(either > 0, both.double() / either, 1.0)


def outline(masks: Tensor) -> Tensor:
    """Where the pixel to the right, below, or right below is another: bool (T, H, W) -> bool (T, H, W); ids -> not 0.

    Beyond the last row and column the image goes on as it ends.
    """
    down, right = (torch.arange(1, side + 1).clamp(max=side - 1) for side in masks.shape[1:])
    below = masks[:, down]
    return (masks ^ masks[:, :, right]) | (masks ^ below) | (masks ^ below[:, :, right])


def share_near(lines: Tensor, others: Tensor, radius: int) -> Tensor:
    """The share of the lines' pixels that have one of the others' at most radius away; 1 where there are no lines.

    bool (T, H, W) twice -> (T,). It looks up each line's disc: dilating whole images would take many times longer.
    """
    frame, y, x = lines.nonzero(as_tuple=True)
    padded, near = F.pad(others, 4 * [radius]), torch.zeros(len(frame), dtype=torch.bool)
    for down in range(-radius, radius + 1):
        width = math.isqrt(radius ** 2 - down ** 2)
        for right in range(-width, width + 1):
            near |= padded[frame, y + radius + down, x + radius + right]
    number = lines.sum(dim=(1, 2))
    found = torch.zeros(len(lines), dtype=torch.double).index_add_(0, frame, near.double())
    return torch.where(number > 0, found / number, 1.0)


def contour_accuracy(masks: Tensor, truths: Tensor, tolerance: float = 0.008) -> Tensor:
    """F = 2 P R / (P + R), P and R the shares of outlines that have the other within tolerance, in diagonals.

    bool (T, H, W) twice -> (T,) in 0 ... 1; 1 where there are no outlines at all, 0 where only one mask has some.
    """
    radius = math.ceil(tolerance * math.hypot(*masks.shape[1:]))
    ours, true = outline(masks), outline(truths)
    precision, recall = share_near(ours, true, radius), share_near(true, ours, radius)
    return 2 * precision * recall / (precision + recall).clamp(min=1e-12)


def scores(ids: Tensor, truth: Tensor) -> Tensor:
    """J and F of each object, means over the frames but the first and the last: (T, H, W) twice -> (n, 2) in %."""
    means = []
    for number in objects_of(truth[0]):
        masks, truths = ids[1:-1] == number, truth[1:-1] == number
        means.append([measure(masks, truths).mean() for measure in (region_similarity, contour_accuracy)])
    return 100 * torch.tensor(means)
