"""DAVIS (Table 5): its videos on disk, indexed PNGs with its palette, its measures J and F.

J is the overlap of the regions, F the agreement of their outlines. Both agree with the official
evaluation of the semi-supervised task, also where one would not guess it: the first and the last
frame are not scored; the objects are 1 ... the largest number in the first annotation, each
counting once however long its video; void pixels (255) count as ground.

Shapes: T frames of H x W pixels; ids are object numbers, 0 on the ground.
"""
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data import decode, find_images
from evals.attention_film import frame_number
from evals.masked_images import VOID, by_name, read_numbers
from runtime.commandline import InputError, brief, write_whole
from training.levels import Levels


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


VAL = Path("ImageSets", "2017", "val.txt")  # below the folder DAVIS
Files = list[tuple[Path, Path | None]]  # of one sequence: each frame, and its annotation if any


class Video(NamedTuple):
    """images uint8 (T, 3, H, W), ids uint8 (T, H, W), the frames' names, the masks' palette.

    ids: (1, H, W) where only the first frame has a mask.
    """

    name: str
    images: Tensor
    ids: Tensor
    frames: list[str]
    palette: list[int] = PALETTE


def sequence_names(root: Path) -> list[str]:
    """Return the sequences that ImageSets/2017/val.txt names, else all of JPEGImages/480p."""
    listing = root / VAL
    folder = root / "JPEGImages" / "480p"
    if listing.is_file():
        names = listing.read_text(errors="replace").split()
        where = listing
    elif folder.is_dir():
        names = sorted(path.name for path in folder.iterdir() if path.is_dir())
        where = folder
    else:
        raise InputError(
            f"no {str(folder)!r}: --data_path must be the folder DAVIS, with JPEGImages/480p and "
            "Annotations/480p in it; of a video of your own give --frames and --masks"
        )
    if not names:
        raise InputError(f"{str(where)!r} names no sequence: add one")
    for name in names:
        if Path(name).name != name or name == "..":  # a folder of this name gets the masks
            raise InputError(
                f"{str(where)!r} names {brief(name)!r}, which is no folder's own name: fix it"
            )
    return names


def davis_files(data_path: str) -> dict[str, Files]:
    """Return the files of each sequence in DAVIS's layout."""
    root = Path(data_path)
    files = {}
    for name in sequence_names(root):
        folder = root / "JPEGImages" / "480p" / name
        frames = sorted(folder.glob("*.jpg"))
        if len(frames) < 3:
            raise InputError(
                f"{str(folder)!r} has {len(frames)} frames (*.jpg), and the first and the last are "
                "not scored: add some, or take the sequence away"
            )
        annotations = root / "Annotations" / "480p" / name
        files[name] = [(frame, annotations / f"{frame.stem}.png") for frame in frames]
    return files


def plain_files(frame_folder: str, masks: str) -> dict[str, Files]:
    """Return the files of one video, a folder of frames; its name is the folder's.

    masks: the first frame's mask, or a folder of masks with the frames' names.
    """
    folder, mask_path = Path(frame_folder), Path(masks)
    if mask_path.resolve() == folder.resolve():
        raise InputError(
            f"--masks {masks!r} is the folder of --frames: put the masks in a folder of their own, "
            "or give the first frame's mask"
        )
    found = images_in(folder)
    found = [file for file in found if file.resolve() != mask_path.resolve()]
    frames = by_name(sorted(found, key=frame_number), folder, "frames")
    if len(frames) < 3:
        raise InputError(
            f"--frames {frame_folder!r} has {len(frames)} images: give a folder of three or more"
        )
    first = next(iter(frames))
    if mask_path.is_file():
        mask_files = {first: mask_path}
    else:
        mask_files = by_name(images_in(mask_path), mask_path, "masks")
    if first not in mask_files:
        raise InputError(
            f"--masks {masks!r} has no mask of the first frame, {frames[first].name!r}: give its "
            "file, or a folder with one of this name"
        )
    pairs = [(frame, mask_files.get(name)) for name, frame in frames.items()]
    return {folder.resolve().name: pairs}


def images_in(folder: Path) -> list[Path]:
    """Return the images in the folder, without those below its folders."""
    return [file for file in find_images(folder) if file.parent == folder]


def read_annotation(path: Path) -> tuple[Tensor, list[int]]:
    """Read an indexed or grey image: ids (H, W) uint8, and its palette."""
    ids = read_numbers(path)
    if ids.max() > VOID:
        raise InputError(
            f"the annotation {str(path)!r} has the number {ids.max()}: objects are 1 ... 254"
        )
    with Image.open(path) as image:
        palette = image.getpalette() or PALETTE
    return ids.byte(), palette


def write_annotation(path: Path, ids: Tensor, palette: list[int]) -> None:
    """Write ids (H, W) uint8 as an indexed PNG, as the official evaluation reads it."""
    image = Image.fromarray(ids.numpy())
    image.putpalette(palette)
    write_whole(path, image.save)


def read_video(name: str, files: Files, levels: Levels | None = None) -> Video:
    """Read one sequence. Raise InputError for sizes that differ, and where there is no object.

    levels: of frames of more than 8 bits, as data.decode takes them.
    """
    annotated = all(annotation is not None for _, annotation in files)
    images, ids = [], []
    for frame, annotation in files:
        images.append(decode(frame, levels))
        require_size(frame, images[-1], images[0], files)
        if annotated or not ids:
            ids.append(read_annotation(annotation)[0])
            require_size(annotation, ids[-1], images[0], files)
    ids = with_one_object(torch.stack(ids))
    _, first_annotation = files[0]
    if not objects_of(ids[0]):
        raise InputError(
            f"the annotation {str(first_annotation)!r} marks no object (1 ... 254) to follow: "
            "mark one"
        )
    _, palette = read_annotation(first_annotation)
    frames = [frame.stem for frame, _ in files]
    return Video(name, torch.stack(images), ids, frames, palette)


def require_size(file: Path, pixels: Tensor, first: Tensor, files: Files) -> None:
    """Raise InputError unless a file's pixels (..., H, W) are as many as the first frame's."""
    height, width = pixels.shape[-2:]
    rows, columns = first.shape[-2:]
    if (height, width) != (rows, columns):
        raise InputError(
            f"{str(file)!r} is {width} x {height} pixels, but {str(files[0][0])!r} "
            f"{columns} x {rows}: a sequence must have one size"
        )


def with_one_object(ids: Tensor) -> Tensor:
    """Return the ids (T, H, W), with 1 for the only number of the first mask beside 0.

    DAVIS 2016 marks its object by 255, which is void in DAVIS 2017.
    """
    values = ids[0].unique()
    if len(values) == 2 and values[0] == 0:
        return (ids == values[1]).byte()
    return ids


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
