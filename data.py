"""Images from anywhere: embedded creatures, a folder of your own, a dataset of torchvision.

Every source becomes numbered uint8 RGB tensors, with labels where there are any. The labels are for
the evaluations; DINO never sees them.

Shapes: n images of H x W pixels.
"""
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.transforms.functional import pil_to_tensor

from runtime.commandline import InputError, brief
from runtime.creatures import CLASSES, make_creatures
from training.datasets import open_dataset
from training.folders import (
    EXTENSIONS,  # noqa: F401, for the evaluations
    WANTED,
    find_files,
    find_images,
    has_images,  # noqa: F401, for the settings
    is_image,
    listed,
)
from training.levels import find_levels, to_8_bits
from training.parts import look_around

# of 8 bits a colour: no levels to look for
EIGHT_BITS = (".jpg", ".jpeg", ".jpe", ".jfif", ".gif", ".webp", ".bmp")
UNREADABLE = Exception  # a damaged file makes Pillow's many decoders raise anything


def to_rgb(image: Image.Image, levels: tuple[float, float] | None = None) -> Image.Image:
    """Return an image of any mode in RGB, turned upright in place. Grey keeps its shades.

    What is transparent becomes white. levels: the values that become black and white in an image of
    more than 8 bits; without them its own.
    """
    modes = image.mode + str(getattr(image, "tile", ""))  # in memory, and in the file
    if modes.startswith(("I", "F")) or ";16" in modes:  # convert() would clip these at 255
        image = to_8_bits(image, levels)
    ImageOps.exif_transpose(image, in_place=True)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image


def decode(source: str | Path | bytes, levels: tuple[float, float] | None = None) -> Tensor:
    """Return an image file, or its bytes, as uint8 (3, H, W). Raise InputError with its name.

    levels: as to_rgb takes them.
    """
    if isinstance(source, bytes):
        name, file = "these bytes", io.BytesIO(source)
    else:
        name, file = repr(str(source)), source
        if not os.path.isfile(source):  # reading a pipe would wait for ever
            raise InputError(
                f"no image file at {name}: check the path; in a folder for training, "
                "--skip_bad_images leaves it out"
            )
    try:
        with Image.open(file) as image:
            image.filename = ""  # Pillow would map it, and scramble a TIFF turned by 90 degrees
            return pil_to_tensor(to_rgb(image, levels))
    except UNREADABLE as error:
        raise InputError(
            f"cannot read the image {name} ({brief(error)}): fix it or take it away; "
            "--skip_bad_images leaves such images out of a folder"
        ) from None


class Images(Dataset):
    """Numbered images: images[i] -> (uint8 (3, H, W), label). The label is -1 where there is none.

    source: a uint8 tensor (n, 3, H, W), a list of files, or a dataset of torchvision.
    masks: bool (n, H, W), True on the object, or None.
    levels: black and white of images of more than 8 bits, or None.
    notes: lines to print about the source.
    """

    def __init__(self, source, labels: Sequence[int] | Tensor | None = None,
                 classes: Sequence[str] = (), masks: Tensor | None = None,
                 levels: tuple[float, float] | None = None, notes: Sequence[str] = ()):
        self.source = source
        self.labels = None if labels is None else torch.as_tensor(labels)
        self.classes = list(classes)
        self.masks = masks
        self.levels = levels
        self.notes = list(notes)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index >= len(self):
            raise IndexError(index)  # which ends a for loop
        try:
            image = self.source[index]
        except InputError:  # says already what to fix
            raise
        except UNREADABLE as error:  # torchvision's datasets open their files here
            raise InputError(
                f"cannot read image {index} of the dataset ({brief(error)}): download it again"
            ) from None
        if isinstance(image, tuple):  # torchvision gives (image, label)
            image = pil_to_tensor(to_rgb(image[0], self.levels))
        elif not isinstance(image, Tensor):
            image = decode(image, self.levels)
        label = -1 if self.labels is None else int(self.labels[index])
        return image, label

    @property
    def in_memory(self) -> bool:
        return isinstance(self.source, Tensor)

    def subset(self, indices: Tensor) -> "Images":
        """Return the images of these indices, in their order."""
        if self.in_memory:
            source = self.source[indices]
        elif isinstance(self.source, list):
            source = [self.source[index] for index in indices.tolist()]
        else:
            source = Subset(self.source, indices.tolist())
        labels = None if self.labels is None else self.labels[indices]
        masks = None if self.masks is None else self.masks[indices]
        return Images(source, labels, self.classes, masks, self.levels)


def without_unreadable(images: Images) -> tuple[Images, list[str]]:
    """Read every image once. Return the readable ones, and the messages about the others."""

    def read(index: int) -> str:
        try:
            images[index]
        except InputError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor() as pool:
        messages = list(pool.map(read, range(len(images))))
    readable = [index for index, message in enumerate(messages) if not message]
    unreadable = [message for message in messages if message]
    return images.subset(torch.tensor(readable, dtype=torch.long)), unreadable


def open_folder(
    folder: Path, train_classes: Sequence[str] = (), files: Sequence[Path] = ()
) -> Images:
    """Open a folder of class folders with labels, or any other folder of images without.

    train_classes: the class folders of the train part, for its test part: others are an error.
    files: images that may be below it; without them they are looked for.
    """
    depth = len(folder.parts)
    files = files or find_images(folder)
    files = [file for file in files if file.parts[:depth] == folder.parts]
    if not files:
        raise InputError(f"no images in {str(folder)!r}: {WANTED}")
    below = [file for file in files if len(file.parts) > depth + 1]
    classes = sorted({file.parts[depth] for file in below})
    # one folder of images is no class, nor is val/images beside train's classes
    if classes in ([], ["images"]) or (len(classes) < 2 and not train_classes):
        return Images(files)

    notes = []
    loose = len(files) - len(below)
    if loose > max(1, len(files) // 10):
        beside = f"{loose} images beside the folders {listed(classes)} of {folder}"
        return Images(files, notes=[f"no labels: {beside}"])
    if loose:
        names = [file.name for file in files if file.parent == folder]
        notes.append(f"left out, beside the class folders of {folder}: {listed(names)}")
    if train_classes:
        for name in classes:
            if name not in train_classes:
                raise InputError(
                    f"{str(folder)!r} has the class folder {name!r}, which the train part lacks: "
                    "the class folders of both must have the same names"
                )
        missing = [name for name in train_classes if name not in classes]
        if missing:
            some = f"{len(missing)} of the {len(train_classes)} classes"
            notes.append(f"no test images of {some} in {folder}: {listed(missing)}")
        classes = list(train_classes)
    number = {name: label for label, name in enumerate(classes)}
    labels = [number[file.parts[depth]] for file in below]
    return Images(below, labels, classes, notes=notes)


def open_root(root: Path, levels: tuple[float, float]) -> tuple[Images, Images | None]:
    """Return the train and test images of a folder of any layout; the notes are the train images'.

    levels: as open_images takes them.
    """
    files = find_files(root)
    train_folder, test_folder, notes = look_around(root, files)
    files = [file for file in files if is_image(file)]
    train = open_folder(train_folder, files=files)
    notes += train.notes

    test = None
    if test_folder:
        test = open_folder(test_folder, train.classes, files)
        notes += test.notes
        if train.classes and test.labels is None:
            notes.append(f"left out: {test_folder}, which has no class folders")
            test = None

    files = train.source + (test.source if test else [])
    files = [file for file in files if not file.name.lower().endswith(EIGHT_BITS)]
    if files:
        train.levels, more = find_levels(files, levels)
        notes += more
        if test:
            test.levels = train.levels
    train.notes = notes
    return train, test


def draw_images(side: int = 64, seed: int = 0) -> tuple[Images, Images]:
    """Draw the embedded creatures: 4000 train images, 1000 test images."""
    drawn = make_creatures(5000, side, seed)
    creatures = Images(drawn.images, drawn.labels, CLASSES, drawn.masks)
    return creatures.subset(torch.arange(4000)), creatures.subset(torch.arange(4000, 5000))


def open_images(
    data_path: str = "",
    dataset: str = "",
    download: bool = False,
    side: int = 64,
    levels: tuple[float, float] = (0.0, 0.0),
) -> tuple[Images, Images | None]:
    """Return the train images, and the test images or None, that the flags of these names mean.

    data_path may hold train/ and val/ (or test/). dataset is a name of training/datasets.py, kept
    under data_path. With neither, embedded creatures of side x side pixels are drawn.
    levels: black and white of images of more than 8 bits; 0 and 0: they are looked for.
    """
    if dataset:
        train, test = open_dataset(dataset, data_path or "data", download)
        test_images = Images(*test) if test else None
        return Images(*train), test_images
    if not data_path:
        return draw_images(side)
    root = Path(data_path)
    if not os.path.isdir(root):
        problem = "a file" if os.path.exists(root) else "not there"
        raise InputError(
            f"--data_path {data_path!r} is {problem}: it must be a folder of images, unpacked and "
            "on this machine"
        )
    return open_root(root, levels)


def evenly_spaced(n: int, limit: int) -> Tensor:
    """Return `limit` of the numbers 0 to n - 1, or all, from the first to the last.

    For a few images to look at: class folders come class by class, so the first ones would be of
    one class or few. Not to measure with: every second creature is of an even class.
    """
    return torch.linspace(0, n - 1, min(limit, n)).long()


def at_most(images: Images, limit: int) -> Images:
    """Return all images, or `limit` of them, drawn once for all and in their order."""
    if len(images) <= limit:
        return images
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:limit]
    return images.subset(drawn.sort().values)


def knn_split(
    train: Images, test: Images | None, limit: int = 10**9
) -> tuple[Images, Images] | None:
    """Return (train images, test images) with labels, at most `limit` of each; None without labels.

    Without a test part every fifth train image becomes a test image.
    """
    if train.labels is None or len(train) < 5:
        return None
    train = train.subset((train.labels >= 0).nonzero().squeeze(1))  # STL-10 has unlabelled images
    if test is None:
        order = torch.arange(len(train))
        is_test = order % 5 == 4
        test = train.subset(order[is_test])
        train = train.subset(order[~is_test])
    elif test.labels is None or len(test) == 0:
        return None
    return at_most(train, limit), at_most(test, limit)
