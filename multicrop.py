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
from torchvision.transforms import InterpolationMode

# v2 resizes uint8 as it is; the older resized_crop would turn it into float first
from torchvision.transforms.v2.functional import pil_to_tensor, resized_crop

from runtime.augment import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    apply_to,
    chosen,
    color_jitter,
    flip,
    gaussian_blur,
    grey,
    jitter_range,
    normalise_colours,
    solarize,
)
from runtime.crops import TRIES, crop_and_resize, random_boxes

# All random numbers of an image are drawn before a pixel is touched. So its views are the same
# alone (MultiCrop's call) and in a batch, perhaps on a GPU (batch_views). A view has this many of
# them, uniform in 0 ... 1, for:
DRAWS = [
    4 * TRIES,  # box: area, ratio, top and left of each try
    6,  # whether to flip, jitter, grey, blur and solarise; the blur's sigma
    4,  # order of the four jitters
    4,  # their strengths
]


class View(NamedTuple):
    """One kind of view: its side in pixels, its scale as fractions of the area, and the
    probabilities of blur and solarisation."""

    size: int
    scale: tuple[float, float]
    blur: float
    solarize: float


class MultiCrop:
    """Turn an image into V = 2 + local_number views, the globals first.

    blur: its probability for global 1, global 2 and each local; solarize: on global 2 only.
    The defaults are the release's; its ViT-S/16 run has other scales (--preset vits16).
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
        self.weakest, self.strongest = jitter_range(jitter)
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)
        # BYOL's chances: the two globals are blurred and solarised differently
        global_1 = View(global_size, global_scale, blur[0], solarize=0.0)
        global_2 = View(global_size, global_scale, blur[1], solarize)
        local = View(local_size, local_scale, blur[2], solarize=0.0)
        self.views = [global_1, global_2] + [local] * local_number
        self.scales = torch.tensor([view.scale for view in self.views])

    def draw(self) -> Tensor:
        """Return all random numbers of one image's views: (V, sum of DRAWS)."""
        return torch.rand(len(self.views), sum(DRAWS))

    def __call__(self, image: Image.Image | Tensor) -> list[Tensor]:
        """Return V random views (3, S, S) of a PIL image, or of a uint8 tensor (3, H, W)."""
        if not isinstance(image, Tensor):
            image = pil_to_tensor(image.convert("RGB"))
        if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
            raise ValueError(
                f"an image must be a uint8 tensor (3, H, W), not {image.dtype} {tuple(image.shape)}"
            )
        draws = self.draw()
        sides = torch.tensor(image.shape[1:])
        boxes = random_boxes(sides, self.scales, draws[:, : DRAWS[0]]).int().tolist()
        views = []
        for view, box, draw in zip(self.views, boxes, draws.split(1), strict=True):
            size = [view.size, view.size]
            # still uint8: bytes are resized faster than floats
            x = resized_crop(image, *box, size, InterpolationMode.BICUBIC, antialias=True)
            x = x.contiguous() / 255
            views.append(self.augment(x.unsqueeze(0), draw, view)[0])
        return views

    def batch_views(self, images: Tensor, sides: Tensor, draws: Tensor) -> list[Tensor]:
        """Return V views (B, 3, S, S) of a batch, made at once on the images' device.

        images: uint8 (B, 3, H, W); sides (B, 2): the height and width that each one fills.
        draws: (B, V, sum of DRAWS). The views are those of the images one by one, but for
        the rounding of bytes.
        """
        boxes = random_boxes(sides.unsqueeze(1), self.scales, draws[:, :, : DRAWS[0]])
        images = images / 255
        views = []
        for number, view in enumerate(self.views):
            x = crop_and_resize(images, boxes[:, number], view.size)
            views.append(self.augment(x, draws[:, number], view))
        return views

    def augment(self, x: Tensor, draws: Tensor, view: View) -> Tensor:
        """Change crops at random, each in its own way, and normalise: (B, 3, S, S) -> the same."""
        _, chances, order, strengths = draws.split(DRAWS, dim=1)
        flip_draw, jitter_draw, grey_draw, blur_draw, solarize_draw, sigma = chances.unbind(dim=1)
        order = order.argsort(dim=1)  # a random permutation
        strengths = self.weakest + (self.strongest - self.weakest) * strengths
        sigma = 0.1 + 1.9 * sigma  # U(0.1, 2) pixels

        x = apply_to(x, chosen(flip_draw, 0.5), flip)  # these probabilities are BYOL's
        x = color_jitter(x, chosen(jitter_draw, 0.8), order, strengths)
        x = apply_to(x, chosen(grey_draw, 0.2), grey)
        x = apply_to(x, chosen(blur_draw, view.blur), gaussian_blur, sigma)
        x = apply_to(x, chosen(solarize_draw, view.solarize), solarize)
        return normalise_colours(x, self.mean, self.std)


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
