"""Images with masks of their objects (Fig. 4): VOC12's layout, Oxford Pets, embedded creatures.

Shapes: O objects, H x W pixels.
"""
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from data import UNREADABLE, decode, open_images, to_rgb
from runtime.commandline import InputError, brief
from runtime.hardware import World
from training.datasets import torchvision_part


class MaskedImages(Dataset):
    """Images with their objects: uint8 (3, H, W), objects bool (O, H, W), void bool (H, W).

    read(items[i]) reads image i.
    """

    def __init__(self, items: Sequence, read: Callable[..., tuple[Tensor, Tensor, Tensor]]):
        self.items = items
        self.read = read

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


def read_voc(item: tuple[Path, Path]) -> tuple[Tensor, Tensor, Tensor]:
    """Read VOC12's image and mask: 0 the ground, 255 void, any other number an object."""
    image_file, mask_file = item
    image = decode(image_file)
    try:
        with Image.open(mask_file) as file:
            numbers = torch.from_numpy(np.array(file))
    except UNREADABLE as error:
        raise InputError(
            f"cannot read the mask {str(mask_file)!r} ({brief(error)}): take another copy of it"
        ) from None
    if numbers.shape != image.shape[-2:]:
        raise InputError(
            f"the mask {str(mask_file)!r} is {tuple(numbers.shape)}, its image "
            f"{tuple(image.shape[-2:])}: a mask must be a palette image, one number a pixel, as "
            "large as its image"
        )
    found = [number for number in numbers.unique().tolist() if number not in (0, 255)]
    objects = torch.zeros(len(found), *numbers.shape, dtype=torch.bool)
    for i, number in enumerate(found):
        objects[i] = numbers == number
    return image, objects, numbers == 255


def open_voc(folder: Path) -> list[tuple[Path, Path]]:
    """Return the images and masks that VOC12's val.txt names."""
    listed = folder / "ImageSets" / "Segmentation" / "val.txt"
    if not listed.is_file():
        raise InputError(
            f"no {str(listed)!r}: --data_path must be laid out as VOCdevkit/VOC2012, or leave it "
            "out"
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


def open_masked(flags: Namespace, world: World) -> MaskedImages:
    """Open VOC12's layout, Oxford Pets, or the embedded test images, as the flags say."""
    if flags.dataset not in ("", "oxford_pets"):
        raise InputError(
            f"--dataset {flags.dataset} has no masks: take oxford_pets, or a --data_path as VOC12's"
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
