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

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision.transforms.functional import pil_to_tensor

from runtime.commandline import InputError, brief
from runtime.creatures import CLASSES, make_creatures

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".tga", ".avif",
)
UNREADABLE = Exception  # a damaged file makes Pillow's many decoders raise anything


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any mode in RGB, turned upright in place. Grey keeps its shades."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I") or image.mode == "F":  # convert() would clip these at 255
        values = np.array(image, dtype=np.float64)
        white = 65535.0
        if values.max() <= 255:
            white = 255.0
        if image.mode == "F" and values.max() <= 1:
            white = 1.0
        values = (values / white * 255).clip(0, 255).round()
        image = Image.fromarray(values.astype(np.uint8))
    if image.mode != "RGB":
        image = image.convert("RGB")
    return image


def decode(source: str | Path | bytes) -> Tensor:
    """Return an image file, or its bytes, as uint8 (3, H, W). Raise InputError with its name."""
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
            return pil_to_tensor(to_rgb(image))
    except UNREADABLE as error:
        raise InputError(
            f"cannot read the image {name} ({brief(error)}): fix it or take it away; "
            "--skip_bad_images leaves such images out of a folder"
        ) from None


class Images(Dataset):
    """Numbered images: images[i] -> (uint8 (3, H, W), label). The label is -1 where there is none.

    source: a uint8 tensor (n, 3, H, W), a list of files, or a dataset of torchvision.
    masks: bool (n, H, W), True on the object, or None.
    """

    def __init__(self, source, labels: Sequence[int] | Tensor | None = None,
                 classes: Sequence[str] = (), masks: Tensor | None = None):
        self.source = source
        self.labels = None if labels is None else torch.as_tensor(labels)
        self.classes = list(classes)
        self.masks = masks

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image = self.source[index]
        except UNREADABLE as error:  # torchvision's datasets open their files here
            raise InputError(
                f"cannot read image {index} of the dataset ({brief(error)}): download it again"
            ) from None
        if isinstance(image, tuple):  # torchvision gives (image, label)
            image = pil_to_tensor(to_rgb(image[0]))
        elif not isinstance(image, Tensor):
            image = decode(image)
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
        return Images(source, labels, self.classes, masks)


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


def find_images(folder: Path) -> list[Path]:
    """Return all image files in the folder and below it, sorted."""
    files = []
    visited = set()
    for here, below, names in os.walk(folder, followlinks=True):
        if os.path.realpath(here) in visited:  # a link that leads back up would never end
            below.clear()
            continue
        visited.add(os.path.realpath(here))
        below[:] = [name for name in below if not name.startswith((".", "__MACOSX"))]
        for name in names:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                files.append(Path(here, name))
    return sorted(files)


def open_folder(folder: Path, train_classes: Sequence[str] = ()) -> Images:
    """Open a folder of class folders with labels, or any other folder of images without.

    train_classes: the class folders of the train part, for its test part: others are an error.
    """
    files = find_images(folder)
    if not files:
        raise InputError(
            f"no images in {str(folder)!r}: wanted {' '.join(EXTENSIONS[:6])} ... files there, "
            "or in class folders below it"
        )
    if any(file.parent == folder for file in files):
        return Images(files)
    parents = [file.relative_to(folder).parts[0] for file in files]
    classes = sorted(set(parents))
    if train_classes:
        for name in classes:
            if name not in train_classes:
                raise InputError(
                    f"{str(folder)!r} has the class folder {name!r}, which the train part lacks: "
                    "the class folders of both must have the same names"
                )
        classes = list(train_classes)
    elif len(classes) < 2:  # one folder of images is no class
        return Images(files)
    number = {name: label for label, name in enumerate(classes)}
    return Images(files, [number[parent] for parent in parents], classes)


def open_images(
    data_path: str = "", dataset: str = "", download: bool = False, side: int = 64
) -> tuple[Images, Images | None]:
    """Return the train images, and the test images or None, that the flags of these names mean.

    data_path may hold train/ and val/ (or test/). dataset is a name of training/datasets.py, kept
    under data_path. With neither, embedded creatures of side x side pixels are drawn.
    """
    if dataset:
        from training.datasets import open_dataset  # the other sources need nothing of it

        train, test = open_dataset(dataset, data_path or "data", download)
        test_images = Images(*test) if test else None
        return Images(*train), test_images
    if not data_path:
        drawn = make_creatures(5000, side)
        creatures = Images(drawn.images, drawn.labels, CLASSES, drawn.masks)
        return creatures.subset(torch.arange(4000)), creatures.subset(torch.arange(4000, 5000))
    root = Path(data_path)
    if not os.path.isdir(root):
        problem = "a file" if os.path.exists(root) else "not there"
        raise InputError(f"--data_path {data_path!r} is {problem}: it must be a folder of images")
    _, folders, _ = next(os.walk(root), ("", [], []))  # none where the folder may not be read
    parts = [name for name in ("val", "test") if name in folders]
    # beside other folders, and without val/ or test/, a folder named train is a class
    if "train" not in folders or not (parts or folders == ["train"]):
        return open_folder(root), None
    train = open_folder(root / "train")
    if not parts:
        return train, None
    return train, open_folder(root / parts[0], train.classes)


def at_most(images: Images, limit: int) -> Images:
    """Return all images, or `limit` of them evenly spaced."""
    if len(images) <= limit:
        return images
    return images.subset(torch.linspace(0, len(images) - 1, limit).long())


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
