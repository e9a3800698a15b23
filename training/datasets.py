"""The datasets of torchvision: where each is, its train and test part, and its labels."""

from pathlib import Path

import torch
import torchvision
from torch import Tensor
from torch.utils.data import Dataset

from runtime.commandline import InputError, brief

DATASETS = {  # --dataset name -> torchvision's class, and arguments of its train and test part
    "cifar10": ("CIFAR10", {"train": True}, {"train": False}),
    "cifar100": ("CIFAR100", {"train": True}, {"train": False}),
    "stl10": ("STL10", {"split": "train+unlabeled"}, {"split": "test"}),
    "imagenette": (
        "Imagenette", {"split": "train", "size": "320px"}, {"split": "val", "size": "320px"},
    ),
    "flowers102": ("Flowers102", {"split": "train"}, {"split": "test"}),
    "oxford_pets": ("OxfordIIITPet", {"split": "trainval"}, {"split": "test"}),
    "food101": ("Food101", {"split": "train"}, {"split": "test"}),
    "eurosat": ("EuroSAT", {}, None),
    "mnist": ("MNIST", {"train": True}, {"train": False}),
    "fashion_mnist": ("FashionMNIST", {"train": True}, {"train": False}),
    "stanford_cars": ("StanfordCars", {"split": "train"}, {"split": "test"}),
    "imagenet": ("ImageNet", {"split": "train"}, {"split": "val"}),
}



def torchvision_part(name: str, root: str, download: bool, **part) -> Dataset:
    """Open one part of a dataset of torchvision. Raise InputError where there is none."""
    options = {"download": download}
    if name == "imagenet":  # has no download
        options = {}
    if name == "imagenette" and Path(root, "imagenette2-320").is_dir():  # refuses to do it twice
        options = {}
    class_of_dataset = getattr(torchvision.datasets, DATASETS[name][0])
    try:
        return class_of_dataset(root, **part, **options)
    except (RuntimeError, OSError, ImportError, ValueError) as error:
        raise InputError(
            f"--dataset {name} is not under --data_path {root!r} ({brief(error)}): fix that, or "
            "pass --download where there is a network"
        ) from None


def labels_of(dataset: Dataset) -> Tensor:
    """Return the labels of a dataset of torchvision, which keeps them under one of four names."""
    for name in ("targets", "labels", "_labels"):
        if hasattr(dataset, name):
            return torch.as_tensor(getattr(dataset, name)).long()
    return torch.tensor([label for _, label in dataset._samples])


def open_dataset(name: str, root: str, download: bool) -> list[tuple | None]:
    """Return (dataset, labels, classes) of the train and of the test part, None where none is."""
    if name not in DATASETS:
        raise InputError(f"--dataset {name} is unknown: choose one of {', '.join(DATASETS)}")
    parts = []
    for arguments in DATASETS[name][1:]:
        if arguments is None:
            parts.append(None)
        else:
            dataset = torchvision_part(name, root, download, **arguments)
            parts.append((dataset, labels_of(dataset), getattr(dataset, "classes", ())))
    return parts
