"""Frozen features of images (appendix F, "Evaluation Protocols"): what k-NN and every other evaluation reads.

Shapes: n images, S pixels, D width of the features.
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

MOST_PIXELS = 2 ** 24  # of a whole image that a network looks at


class EvaluationView:
    """The view that evaluations read: short side resized to S / crop, centre crop S; uint8 -> float (3, S, S).

    S = 224 and crop = 0.875 are the paper's 256 and 224 pixels; crop = 1 keeps small images whole.
    """

    def __init__(self, size: int = 224, crop: float = 0.875, mean: Sequence[float] = IMAGENET_MEAN,
                 std: Sequence[float] = IMAGENET_STD):
        self.size, self.short_side = size, round(size / crop)
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)

    def __call__(self, image: Tensor) -> Tensor:
        longest = 50 * min(image.shape[-2:])  # of a strip the rest is cut off in any case, resized or not
        if max(image.shape[-2:]) > longest:
            image = center_crop(image, [min(side, longest) for side in image.shape[-2:]])
        if min(image.shape[-2:]) != self.short_side:
            image = resize(image, self.short_side, InterpolationMode.BICUBIC, antialias=True)
        return (center_crop(image, [self.size, self.size]).float() / 255 - self.mean) / self.std


def fit_to_patches(image: Tensor, short_side: int, patch_size: int) -> Tensor:
    """Resize so that the short side is near short_side and both are multiples of the patch, in pixels.

    uint8 (3, H, W), whatever H and W -> uint8 (3, H', W').
    """
    scale = short_side / min(image.shape[-2:])
    size = [max(1, round(side * scale / patch_size)) * patch_size for side in image.shape[-2:]]
    if math.prod(size) > MOST_PIXELS:
        raise InputError(f"an image of {image.shape[-1]} x {image.shape[-2]} pixels would become one of {size[1]} x "
                         f"{size[0]}: cut it, or ask for a smaller size")
    return resize(image, size, InterpolationMode.BICUBIC, antialias=True)


def mean_and_std(args: dict) -> tuple[Tensor, Tensor]:
    """What a checkpoint's flags say of the normalisation of its images, else ImageNet's: two (3, 1, 1)."""
    return tuple(torch.tensor(args.get(name, default)).view(3, 1, 1)
                 for name, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)))


class ViewsDataset(Dataset):
    """(view, label) of each image."""

    def __init__(self, images: Images, view: EvaluationView):
        self.images, self.view = images, view

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        return self.view(image), label


@torch.no_grad()
def extract_features(network: nn.Module, images: Images, view: EvaluationView, world: World,
                     batch_size: int = 100, num_workers: int = 0, progress: str = "") -> Tensor:
    """network(view) of every image, in their order, shared over the processes -> (n, D) fp32 on the CPU."""
    share = torch.arange(len(images)).tensor_split(world.size)[world.rank]
    loader = DataLoader(ViewsDataset(images.subset(share), view), batch_size,
                        num_workers=0 if images.in_memory else num_workers,
                        worker_init_fn=leave_signals_to_training)
    modes = [(module, module.training) for module in network.modules()]  # a frozen part may stand in a training whole
    network.eval()
    batches = []
    for views, _ in tqdm(loader, progress, disable=not (progress and world.is_main), leave=False):
        with world.autocast():
            batches.append(network(views.to(world.device)).float())
    for module, training in modes:
        module.training = training
    return world.gather_rows(torch.cat(batches) if batches else torch.empty(0, 0))


class Pixels(nn.Module):
    """The image itself as its feature, at most 64 pixels a side: what a network has to beat."""

    def forward(self, images: Tensor) -> Tensor:
        images = images if images.shape[-1] <= 64 else F.interpolate(images, 64, mode="bilinear", antialias=True)
        return images.flatten(1)
