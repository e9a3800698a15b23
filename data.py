"""Images, from wherever they come: the embedded creatures, a folder of one's own, a dataset of torchvision.

Every source becomes the same thing: numbered uint8 RGB tensors, with labels where there are any. Labels serve the
evaluations alone; DINO never sees them.
"""
import io
import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageCms, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from runtime.commandline import InputError, brief
from runtime.creatures import CLASSES, make_creatures

EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
              ".jp2", ".tga", ".avif")
# what broken files raise
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, AttributeError, ArithmeticError,
              MemoryError, NotImplementedError, struct.error, zlib.error, Image.DecompressionBombError)
DATASETS = {  # --dataset name -> torchvision class, and its arguments for the training and the test part
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "stl10": ("STL10", {"split": "train+unlabeled"}, {"split": "test"}),
    "imagenette": ("Imagenette", {"split": "train", "size": "320px"}, {"split": "val", "size": "320px"}),
    "flowers102": ("Flowers102", {"split": "train"}, {"split": "test"}),
    "oxford_pets": ("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}),
    "food101": ("Food101", {"split": "train"}, {"split": "test"}),
    "eurosat": ("EuroSAT", {}, None),
    "mnist": ("MNIST", {"train": True}, {"train": False}),
    "fashion_mnist": ("FashionMNIST", {"train": True}, {"train": False}),
    "stanford_cars": ("StanfordCars", {"split": "train"}, {"split": "test"}),
    "imagenet": ("ImageNet", {"split": "train"}, {"split": "val"}),
}


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow (grey, palette, alpha, CMYK, LAB, 16 bits and more), turned upright (in place) -> RGB."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I") or image.mode == "F":  # convert("RGB") would clip these at 255
        values = np.array(image, dtype=np.float64)
        top = 1.0 if image.mode == "F" and values.max() <= 1 else 255.0 if values.max() <= 255 else 65535.0
        image = Image.fromarray((values / top * 255).clip(0, 255).round().astype(np.uint8))
    if image.mode == "La":  # premultiplied grey has no way to RGB but this
        image = image.convert("LA")
    if image.mode == "LAB":
        image = ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"),
                                          outputMode="RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def decode(source: str | Path | bytes) -> Tensor:
    """An image file (or its bytes) -> uint8 (3, H, W); raises InputError that names a file it cannot read."""
    if not isinstance(source, bytes) and not os.path.isfile(source):  # a pipe would be waited for without end
        raise InputError(f"no image at {str(source)!r}: check the path; of a folder, --skip_bad_images leaves it out")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return pil_to_tensor(to_rgb(image))
    except UNREADABLE as error:
        name = "these bytes" if isinstance(source, bytes) else repr(str(source))
        raise InputError(f"cannot read the image {name} ({brief(error)}): mend it or take it away; of a folder, "
                         "--skip_bad_images leaves such images out") from None


class Images(Dataset):
    """Numbered images: images[i] -> (uint8 (3, H, W), label), the label -1 where there are none.

    source: a uint8 tensor (n, 3, H, W), a list of files, or a dataset of torchvision. masks: (n, H, W) bool or None.
    """

    def __init__(self, source, labels: Sequence[int] | None = None, classes: Sequence[str] = (),
                 masks: Tensor | None = None):
        self.source, self.classes, self.masks = source, list(classes), masks
        self.labels = None if labels is None else torch.as_tensor(labels)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            item = self.source[index]
        except UNREADABLE as error:  # torchvision's datasets open their files here
            raise InputError(f"cannot read image {index} of the dataset ({brief(error)})") from None
        if isinstance(item, tuple):  # torchvision: (image, label)
            item = pil_to_tensor(to_rgb(item[0]))
        image = item if isinstance(item, Tensor) else decode(item)
        return image, -1 if self.labels is None else int(self.labels[index])

    @property
    def in_memory(self) -> bool:
        return isinstance(self.source, Tensor)

    def subset(self, indices: Tensor) -> "Images":
        """These images only, in this order."""
        if isinstance(self.source, list):
            source = [self.source[i] for i in indices.tolist()]
        else:
            source = self.source[indices] if self.in_memory else torch.utils.data.Subset(self.source, indices.tolist())
        pick = lambda values: None if values is None else values[indices]
        return Images(source, pick(self.labels), self.classes, pick(self.masks))


def without_unreadable(images: Images) -> tuple[Images, list[str]]:
    """Read every image once -> those that can be read, and the messages about the others."""

    def problem(index: int) -> str | None:
        try:
            images[index]
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        problems = list(pool.map(problem, range(len(images))))
    good = torch.tensor([i for i, message in enumerate(problems) if message is None], dtype=torch.long)
    return images.subset(good), [message for message in problems if message is not None]


def find_images(folder: Path) -> list[Path]:
    """All image files in the folder and below it, sorted; linked folders are followed once."""
    files, seen = [], set()
    for here, below, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(here)) in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = [name for name in below if not name.startswith((".", "__MACOSX"))]
        files += [Path(here, name) for name in names if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    return sorted(files)


def open_folder(folder: Path, classes: Sequence[str] = ()) -> Images:
    """A folder of class folders (labelled), or any other folder with images in or below it (unlabelled).

    classes: the class folders to expect, those of the training part; another one is an error.
    """
    files = find_images(folder)
    if not files:
        raise InputError(f"no images in {str(folder)!r}: wanted {' '.join(EXTENSIONS[:6])} ... files there, "
                         "or in class folders below it")
    parents = [file.relative_to(folder).parts[0] if file.parent != folder else None for file in files]
    found = sorted(set(parents) - {None})
    if None in parents or (len(found) < 2 and not classes):
        return Images(files)
    if classes and not set(found) <= set(classes):
        raise InputError(f"{str(folder)!r} has the class folder {min(set(found) - set(classes))!r}, which the training "
                         "part lacks: the class folders of both must have the same names")
    number = {name: i for i, name in enumerate(classes or found)}
    return Images(files, [number[parent] for parent in parents], classes or found)


def torchvision_part(name: str, root: str, download: bool, **part) -> Dataset:
    """One part of a dataset of torchvision, as torchvision gives it; raises InputError where it is not."""
    extra = {"download": download}
    if name == "imagenet" or (name == "imagenette" and Path(root, "imagenette2-320").is_dir()):
        extra = {}  # the one knows no download, the other would refuse to do it twice
    try:
        return getattr(torchvision.datasets, DATASETS[name][0])(root, **part, **extra)
    except (RuntimeError, OSError, ImportError, ValueError) as error:
        raise InputError(f"--dataset {name} is not under --data_path {root!r} ({brief(error)}): mend that, or pass "
                         "--download where there is a network") from None


def open_torchvision(name: str, root: str, download: bool) -> tuple[Images, Images | None]:
    """A dataset of torchvision by its name in DATASETS -> its training and its test part."""
    if name not in DATASETS:
        raise InputError(f"--dataset {name} is unknown: choose one of {', '.join(DATASETS)}")
    opened = []
    for part in DATASETS[name][1:]:
        if part is None:
            continue
        dataset = torchvision_part(name, root, download, **part)
        where = next((key for key in ("targets", "labels", "_labels") if hasattr(dataset, key)), None)
        labels = getattr(dataset, where) if where else None
        if labels is None:
            labels = [label for _, label in getattr(dataset, "_samples", None) or dataset]
        opened.append(Images(dataset, torch.as_tensor(labels).long(), getattr(dataset, "classes", ())))
    return opened[0], opened[1] if len(opened) > 1 else None


def open_images(data_path: str = "", dataset: str = "", download: bool = False,
                  side: int = 64) -> tuple[Images, Images | None]:
    """The flags -> the training images and, where the source has them, the images to evaluate on.

    data_path may hold train/ and val/ (or test/); dataset names one of torchvision's, kept under data_path; with
    neither, the embedded images of side x side pixels are drawn.
    """
    if dataset:
        return open_torchvision(dataset, data_path or "data", download)
    if not data_path:
        drawn = make_creatures(5000, side)
        everything = Images(drawn.images, drawn.labels, CLASSES, drawn.masks)
        return everything.subset(torch.arange(4000)), everything.subset(torch.arange(4000, 5000))
    root = Path(data_path)
    if not os.path.isdir(root):
        raise InputError(f"--data_path {data_path!r} is {'a file' if os.path.exists(root) else 'not there'}: "
                         "it must be a folder of images")
    folders = {Path(folder).name for folder in next(os.walk(root, followlinks=True), [[], []])[1]}
    if "train" not in folders or (not {"val", "test"} & folders and folders != {"train"}):  # train may be a class
        return open_folder(root), None
    train = open_folder(root / "train")
    val = next((root / part for part in ("val", "test") if part in folders), None)
    return train, val and open_folder(val, train.classes)


def knn_split(train: Images, val: Images | None, most: int = 10 ** 9) -> tuple[Images, Images] | None:
    """(images that vote, images that are asked) for k-NN, or None without labels.

    Without an evaluation part every fifth image is asked, and the others vote. At most `most` vote and at most as
    many are asked, evenly spaced over the source.
    """
    if train.labels is None or len(train) < 5 or (val is not None and (val.labels is None or not len(val))):
        return None
    labelled = train.subset((train.labels >= 0).nonzero().squeeze(1))  # STL-10 marks unlabelled images with -1
    if val is None:
        order = torch.arange(len(labelled))
        labelled, val = labelled.subset(order[order % 5 != 4]), labelled.subset(order[order % 5 == 4])

    def at_most(images: Images, n: int) -> Images:
        return images if len(images) <= n else images.subset(torch.linspace(0, len(images) - 1, n).long())

    return at_most(labelled, most), at_most(val, most)
