"""Frozen features of images (appendix F, "Evaluation Protocols"), which every evaluation reads.

Shapes: n images of H x W pixels, views of S x S pixels, D numbers a feature, C classes.
"""
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize
from tqdm import tqdm

from data import Images
from runtime.augment import IMAGENET_MEAN, IMAGENET_STD
from runtime.commandline import InputError
from runtime.hardware import World, leave_signals_to_training

MOST_PIXELS = 2**24  # of a whole image that a network reads: attention grows with their square


def normalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (image / 255 - mean) / std for each colour: uint8 (3, H, W) -> float (3, H, W)."""
    mean = torch.as_tensor(mean).view(3, 1, 1)
    std = torch.as_tensor(std).view(3, 1, 1)
    return (image.float() / 255 - mean) / std


def mean_and_std(args: dict) -> tuple[Sequence[float], Sequence[float]]:
    """Return the mean and deviation that a checkpoint's flags name, or those of ImageNet."""
    return args.get("mean", IMAGENET_MEAN), args.get("std", IMAGENET_STD)


class EvaluationView:
    """The centre of an image, as the evaluations see it: uint8 (3, H, W) -> float (3, S, S).

    The short side is resized to S / crop pixels, then the centre is cut out. S = 224 and
    crop = 0.875 are the paper's 256 and 224 pixels. crop = 1 keeps square images whole.
    """

    def __init__(
        self,
        size: int = 224,
        crop: float = 0.875,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        self.size = size
        self.short_side = round(size / crop)
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        # a strip of 1 x 20,000 pixels would grow beyond the memory, and its ends are cut off anyway
        longest = 50 * min(height, width)
        if max(height, width) > longest:
            image = center_crop(image, [min(height, longest), min(width, longest)])
        if min(height, width) != self.short_side:
            image = resize(image, self.short_side, InterpolationMode.BICUBIC, antialias=True)
        image = center_crop(image, [self.size, self.size])
        return normalise(image, self.mean, self.std)


def fit_to_patches(image: Tensor, short_side: float, patch_size: int) -> Tensor:
    """Resize a whole image so that both sides are multiples of the patch.

    The short side comes near short_side pixels: uint8 (3, H, W) -> uint8 (3, H', W').
    """
    height, width = image.shape[-2:]
    scale = short_side / min(height, width)
    rows = max(1, round(height * scale / patch_size))
    columns = max(1, round(width * scale / patch_size))
    size = [rows * patch_size, columns * patch_size]
    if math.prod(size) > MOST_PIXELS:
        raise InputError(
            f"an image of {width} x {height} pixels would become one of {size[1]} x {size[0]}: "
            "cut it, or ask for a smaller size"
        )
    return resize(image, size, InterpolationMode.BICUBIC, antialias=True)


class ViewsDataset(Dataset):
    """The view of each image: dataset[i] -> float (3, S, S)."""

    def __init__(self, images: Images, view: EvaluationView):
        self.images = images
        self.view = view

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image, _ = self.images[index]
        return self.view(image)


@torch.no_grad()
def extract_features(
    network: nn.Module,
    images: Images,
    view: EvaluationView,
    world: World,
    batch_size: int = 100,
    num_workers: int = 0,
    progress: str = "",
) -> Tensor:
    """Return the network's output for the view of every image, in their order: (n, D) fp32.

    The processes share the images, and each gets all features, on the CPU. progress: a bar's title.
    """
    mine = torch.arange(len(images)).tensor_split(world.size)[world.rank]
    if images.in_memory:
        num_workers = 0  # there is nothing to decode
    loader = DataLoader(
        ViewsDataset(images.subset(mine), view),
        batch_size,
        num_workers=num_workers,
        worker_init_fn=leave_signals_to_training,
    )
    # a training calls this too: afterwards every module is in the mode it was in
    modes = {module: module.training for module in network.modules()}
    network.eval()
    batches = []
    for views in tqdm(loader, progress, disable=not (progress and world.is_main), leave=False):
        with world.autocast():
            features = network(views.to(world.device))
        batches.append(features.float())
    for module, mode in modes.items():
        module.training = mode
    features = torch.cat(batches) if batches else torch.empty(0, 0)  # fewer images than processes
    return world.gather_rows(features)


class Pixels(nn.Module):
    """The image itself as its feature, at most 64 pixels a side. A network has to beat it."""

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] > 64:
            images = F.interpolate(images, 64, mode="bilinear", antialias=True)
        return images.flatten(1)


def among_first(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return where the right label is among the k highest scores: (n, C), (n,) -> bool (n,)."""
    first = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return (first == labels[:, None]).any(dim=1)


def top_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Return the top-k accuracy in %: scores (n, C), labels (n,)."""
    return 100 * among_first(scores, labels, k).float().mean().item()
