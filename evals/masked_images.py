"""Images with masks of their objects (Fig. 4): plain folders, VOC12, Oxford Pets, creatures.

Shapes: O objects, H x W pixels.
"""
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from data import UNREADABLE, decode, find_images, open_images, to_rgb
from runtime.commandline import InputError, brief
from runtime.hardware import World
from training import evaluation
from training.datasets import torchvision_part
from training.levels import Levels

JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
VOID = 255  # a pixel that nobody labelled
MOST_SHADES = 100  # of a grey mask: more are soft borders
NUMBERED = ("P", "PA", "I", "I;16")  # Pillow's modes of images that hold numbers, not shades


class MaskedImages(Dataset):
    """Images with their objects: uint8 (3, H, W), objects bool (O, H, W), void bool (H, W).

    read(items[i]) reads image i. notes: lines to print about the source.
    """

    def __init__(
        self,
        items: Sequence,
        read: Callable[..., tuple[Tensor, Tensor, Tensor]],
        notes: Sequence[str] = (),
    ):
        self.items = items
        self.read = read
        self.notes = notes

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        try:
            return self.read(self.items[index])
        except (OSError, SyntaxError, EOFError) as error:  # torchvision opens its files here
            raise InputError(
                f"cannot read image {index} or its mask ({brief(error)}): fix it"
            ) from None


def read_embedded(item: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Read an embedded image and its mask (H, W): one object, and no pixel in doubt."""
    image, mask = item
    return image, mask.unsqueeze(0), torch.zeros_like(mask)


def read_pet(item: tuple[Image.Image, Image.Image]) -> tuple[Tensor, Tensor, Tensor]:
    """Read Oxford Pets' image and trimap: 1 the pet, 2 the ground, 3 the border between them."""
    image, trimap = item
    numbers = pil_to_tensor(trimap)
    return pil_to_tensor(to_rgb(image)), numbers == 1, numbers[0] == 3


def read_numbers(file: Path) -> Tensor:
    """Return a mask file's numbers, one a pixel, turned upright: (H, W) int32.

    Of a palette image its indices, of a grey one its shades. Colours count as grey where all three
    are equal everywhere, and are refused elsewhere.
    """
    alpha_varies = False
    try:
        with Image.open(file) as image:
            image.filename = ""  # else a turned TIFF is scrambled, as in data.decode
            mode = image.mode
            ImageOps.exif_transpose(image, in_place=True)  # as its image is
            if mode in ("LA", "PA", "RGBA"):
                lowest, highest = image.getchannel("A").getextrema()
                alpha_varies = lowest < highest
                image = image.convert(mode.removesuffix("A"))  # without its transparency
            values = np.array(image)
    except UNREADABLE as error:
        raise InputError(
            f"cannot read the mask {str(file)!r} ({brief(error)}): take another copy of it"
        ) from None
    if alpha_varies and (values == values[0, 0]).all():
        raise InputError(
            f"the mask {str(file)!r} has one colour, and its object in the transparency: save that "
            "as a grey PNG"
        )
    with np.errstate(invalid="ignore"):  # NaN is refused below
        numbers = values.astype(np.int32)
    if (values != numbers).any():
        raise InputError(
            f"the mask {str(file)!r} has a value that is no whole number: save it as whole ones, "
            "such as 0 and 255"
        )
    numbers = torch.from_numpy(numbers)
    if numbers.ndim == 3:
        red = numbers[..., :1]
        if (numbers != red).any():
            raise InputError(
                f"the mask {str(file)!r} holds {mode} colours, not one number a pixel: save it as "
                "a grey or indexed PNG"
            )
        numbers = red.squeeze(-1)
    if file.suffix.lower() in JPEG:  # it blurs borders: from 0 to 255
        return (numbers > 127).int()
    shades = len(numbers.unique())
    if shades > MOST_SHADES and mode not in NUMBERED:
        raise InputError(
            f"the mask {str(file)!r} has {shades} shades, which cannot be numbers of objects: save "
            "soft borders as two values, such as 0 and 255"
        )
    return numbers


def numbered_objects(numbers: Tensor) -> Tensor:
    """Return the mask of every number but 0: (H, W) -> bool (O, H, W)."""
    found = [number for number in numbers.unique().tolist() if number != 0]
    objects = torch.zeros(len(found), *numbers.shape, dtype=torch.bool)
    for i, number in enumerate(found):
        objects[i] = numbers == number
    return objects


def read_voc(item: tuple[Path, Path]) -> tuple[Tensor, Tensor, Tensor]:
    """Read VOC12's image and mask: 0 the ground, 255 void, any other number an object."""
    image_file, mask_file = item
    image = decode(image_file)
    numbers = read_numbers(mask_file)
    if numbers.shape != image.shape[-2:]:
        raise InputError(
            f"the mask {str(mask_file)!r} is {tuple(numbers.shape)}, its image "
            f"{tuple(image.shape[-2:])}: VOC12's masks are as large as their images"
        )
    void = numbers == VOID
    return image, numbered_objects(numbers.masked_fill(void, 0)), void


def values_in(mask: Path) -> list[int]:
    """Return the values that a mask file has, each once."""
    return read_numbers(mask).unique().tolist()


class Meaning(NamedTuple):
    """What the numbers of all masks of a folder mean.

    numbered: every number but 0 is an object; else the larger of a mask's two values.
    has_void: 255 is void.
    """

    numbered: bool
    has_void: bool


def find_meaning(masks: Sequence[Path]) -> tuple[Meaning, str]:
    """Return what the masks' numbers mean, and a line that says so.

    Decided once for all masks: 255 may be void, and one with 0 and 255 alone does not say so.
    """
    with ThreadPoolExecutor() as pool:
        values = list(pool.map(values_in, masks))
    numbered, with_void = [], []
    for mask, found in zip(masks, values, strict=True):
        if len(found) > 2:
            numbered.append(mask)
            if VOID in found:
                with_void.append(mask)
    if with_void:
        line = "masks: 0 is the ground, 255 is void, every other number an object, by "
        return Meaning(numbered=True, has_void=True), line + repr(with_void[0].name)
    if numbered:
        line = "masks: 0 is the ground, every number but 0 is an object, by "
        return Meaning(numbered=True, has_void=False), line + repr(numbered[0].name)
    line = "masks: of a mask's two values the larger value is the object"
    return Meaning(numbered=False, has_void=False), line


def read_pair(
    item: tuple[Path, Path], meaning: Meaning, levels: Levels | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Read an image and its mask, which may have a size of its own.

    levels: of images of more than 8 bits, as data.decode takes them.
    """
    image_file, mask_file = item
    image = decode(image_file, levels)
    numbers = read_numbers(mask_file)
    require_shape(mask_file, numbers, image)
    void = torch.zeros_like(numbers, dtype=torch.bool)
    if meaning.has_void:
        void = numbers == VOID
    if meaning.numbered:
        return image, numbered_objects(numbers.masked_fill(void, 0)), void
    ground = numbers.min()
    if ground == numbers.max():  # one value: all ground, or all object
        ground = 0
    return image, (numbers > ground).unsqueeze(0), void


def require_shape(file: Path, mask: Tensor, image: Tensor) -> None:
    """Raise InputError unless a mask (h, w) has the shape of its image (3, H, W), but for rounding.

    A mask of another shape was cut, or not turned as its image was.
    """
    h, w = mask.shape
    H, W = image.shape[-2:]
    if abs(w - h * W / H) > 1 + 0.03 * w:
        raise InputError(
            f"the mask {str(file)!r} is {w} x {h} pixels, its image {W} x {H}, which is another "
            "shape: take the mask of the whole image, turned as it is"
        )


def by_name(files: Iterable[Path], folder: Path, flag: str) -> dict[str, Path]:
    """Return files by their names below the folder, without the ending; in their order."""
    named = {}
    for file in files:
        name = file.relative_to(folder).with_suffix("").as_posix()
        if name in named:
            raise InputError(
                f"--{flag} {str(folder)!r} has both {named[name].name!r} and {file.name!r}: one of "
                "a name, please, and the masks in a folder of their own"
            )
        named[name] = file
    return named


def images_of(folder: str, flag: str) -> dict[str, Path]:
    """Return the images of a folder by their names below it, without the ending."""
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"--{flag} {folder!r} is no folder: give a folder of images")
    return by_name(find_images(root), root, flag)


def open_pairs(flags: Namespace, args: dict) -> MaskedImages:
    """Return the images and masks of the same names; a note counts what has no partner.

    args: of the checkpoint.
    """
    image_folder, mask_folder = flags.images, flags.masks
    images = images_of(image_folder, "images")
    masks = images_of(mask_folder, "masks")
    names = sorted(images.keys() & masks.keys())
    if not names:
        raise InputError(
            f"none of the {len(images)} images in {image_folder!r} has its name among the "
            f"{len(masks)} masks in {mask_folder!r}: names must be the same, such as cat.jpg and "
            "cat.png"
        )
    pairs = [(images[name], masks[name]) for name in names]
    without_mask = len(images) - len(pairs)
    without_image = len(masks) - len(pairs)
    levels, notes = evaluation.shared_levels([image for image, _ in pairs], flags, args)
    meaning, line = find_meaning([mask for _, mask in pairs])
    notes.append(line)
    if without_mask or without_image:
        left_out = f"{without_mask} images without a mask, {without_image} masks without an image"
        notes.append(f"left out: {left_out}")
    return MaskedImages(pairs, partial(read_pair, meaning=meaning, levels=levels), notes)


def open_voc(folder: Path) -> list[tuple[Path, Path]]:
    """Return the images and masks that VOC12's val.txt names."""
    listed = folder / "ImageSets" / "Segmentation" / "val.txt"
    if not listed.is_file():
        raise InputError(
            f"no {str(listed)!r}: --data_path must be laid out as VOCdevkit/VOC2012; of other "
            "folders give --images and --masks"
        )
    items = []
    for name in listed.read_text().split():
        image = folder / "JPEGImages" / f"{name}.jpg"
        mask = folder / "SegmentationObject" / f"{name}.png"
        for path in (image, mask):
            if not path.is_file():
                raise InputError(
                    f"{str(listed)!r} names {name!r}, but there is no {str(path)!r}: add it, or "
                    "take the name out"
                )
        items.append((image, mask))
    if not items:
        raise InputError(f"{str(listed)!r} names no images: fill it with names, one a line")
    return items


def open_masked(flags: Namespace, world: World, args: dict) -> MaskedImages:
    """Open plain folders, VOC12's layout, Oxford Pets, or the embedded test images.

    args: of the checkpoint.
    """
    if bool(flags.images) != bool(flags.masks):
        raise InputError("--images and --masks go together: give a folder to each")
    if flags.images and (flags.data_path or flags.dataset):
        raise InputError("--images and --masks are the data: leave --data_path and --dataset out")
    if flags.images:
        return open_pairs(flags, args)
    if flags.dataset not in ("", "oxford_pets"):
        raise InputError(
            f"--dataset {flags.dataset} has no masks: take oxford_pets, or --images and --masks"
        )
    if flags.dataset:
        part = {"split": "test", "target_types": "segmentation"}
        with world.main_first(flags.download):
            pets = torchvision_part(
                "oxford_pets", flags.data_path or "data", flags.download, **part
            )
        return MaskedImages(pets, read_pet)
    if flags.data_path:
        return MaskedImages(open_voc(Path(flags.data_path)), read_voc)
    _, test = open_images()
    return MaskedImages(list(zip(test.source, test.masks)), read_embedded)
