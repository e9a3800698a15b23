"""Multi-crop (Sec. 3.1; appendix E; from SwAV): two global views and several small local ones.

A view is a random crop, resized, flipped, and recoloured by BYOL's augmentations (Sec. 3.2).
The pixel operations are in runtime/augment.py.

Shapes: B images, V views, S the side of a view in pixels, K prototypes.
"""
from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, RandomResizedCrop

# v2 resizes uint8 as it is; the older resized_crop would turn it into float first
from torchvision.transforms.v2.functional import pil_to_tensor, resized_crop

from runtime.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    color_jitter,
    gaussian_blur,
    grey,
    solarize,
)


class View(NamedTuple):
    """One kind of view: its side in pixels, its scale as fractions of the area, and the
    probabilities of blur and solarisation."""

    size: int
    scale: tuple[float, float]
    blur: float
    solarize: float


class MultiCrop:
    """Turn an image into V = 2 + local_number views (3, S, S), the globals first.

    blur: the chance of it for global 1, global 2 and each local; solarize: on global 2 only.
    The defaults are the release's.
    """

    def __init__(
        self,
        global_size: int = 224,
        local_size: int = 96,
        global_scale: tuple[float, float] = (0.4, 1.0),
        local_scale: tuple[float, float] = (0.05, 0.4),
        local_number: int = 8,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        jitter: Sequence[float] = (0.4, 0.4, 0.2, 0.1),
        blur: Sequence[float] = (1.0, 0.1, 0.5),
        solarize: float = 0.2,
    ):
        self.jitter = tuple(jitter)
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)
        # BYOL's chances: the two globals are blurred and solarised differently
        global_1 = View(global_size, global_scale, blur[0], solarize=0.0)
        global_2 = View(global_size, global_scale, blur[1], solarize)
        local = View(local_size, local_scale, blur[2], solarize=0.0)
        self.views = [global_1, global_2] + [local] * local_number

    def __call__(self, image: Image.Image | Tensor) -> list[Tensor]:
        """Return V random views of a PIL image, or of a uint8 tensor (3, H, W)."""
        if not isinstance(image, Tensor):
            image = pil_to_tensor(image.convert("RGB"))
        if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
            raise ValueError(
                f"an image must be a uint8 tensor (3, H, W), not {image.dtype} {tuple(image.shape)}"
            )
        return [self.make_view(image, view) for view in self.views]

    def make_view(self, image: Tensor, view: View) -> Tensor:
        """Return one random view: uint8 (3, H, W) -> normalised float (3, S, S)."""
        box = RandomResizedCrop.get_params(image, view.scale, ratio=(3 / 4, 4 / 3))
        size = [view.size, view.size]
        # still uint8: bytes are resized faster than floats
        x = resized_crop(image, *box, size, InterpolationMode.BICUBIC, antialias=True)

        # all draws in one call, even those left unused; the probabilities below are BYOL's
        flip, jitter, to_grey, to_blur, to_solarize, sigma = torch.rand(6).tolist()
        if flip < 0.5:
            x = x.flip(-1)
        x = x.contiguous() / 255  # from here on floats in 0 ... 1
        if jitter < 0.8:
            x = color_jitter(x, self.jitter)
        if to_grey < 0.2:
            x = grey(x)  # one channel, which is cheaper to blur
        if to_blur < view.blur:
            x = gaussian_blur(x, 0.1 + 1.9 * sigma)  # sigma: U(0.1, 2) pixels
        if to_solarize < view.solarize:
            x = solarize(x)
        return (x - self.mean) / self.std  # a grey (1, S, S) becomes three channels


def forward_crops(backbone: nn.Module, head: nn.Module, crops: Sequence[Tensor]) -> Tensor:
    """Return the logits of all views: V of (B, 3, S, S) -> (V * B, K)."""
    features = []
    for _, same_size in groupby(crops, key=lambda crop: crop.shape[-2:]):
        batch = torch.cat(list(same_size))
        features.append(backbone(batch))  # one pass for each resolution, not for each view
    return head(torch.cat(features))  # one pass, whose batch normalisation is over all views


class MultiCropNetwork(nn.Module):
    """Backbone and head as one module: student and teacher are instances of it."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """Map V of (B, 3, S, S) to logits (V * B, K)."""
        return forward_crops(self.backbone, self.head, crops)
