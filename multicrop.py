"""Multi-crop (Sec. 3.1; appendix E; from SwAV): two global views and several small local ones.

Each view is a random crop, resized, flipped, and recoloured by BYOL's augmentations (Sec. 3.2). The crop is resized
as uint8 by torchvision; every later step works in float on the small crop, with torchvision's formulas, per image,
in place where it can: fresh memory costs more than arithmetic here. The release blurs with Pillow, whose Gaussian is
three box blurs: its pixels differ from ours by 0.4 of 255 on average.

Shapes: B images, V views, S the side of a view in pixels, K prototypes; a single view is (3, S, S) in 0 ... 1, or
(1, S, S) once it is grey.
"""
import math
from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2.functional import pil_to_tensor, resized_crop  # v1 would resize uint8 as float

from settings import IMAGENET_MEAN, IMAGENET_STD

LUMA = torch.tensor([0.2989, 0.587, 0.114])
HUE_CENTRES = torch.tensor([1 / 2, 1 / 3, 2 / 3]).view(3, 1, 1)  # opposite red; green, blue; in circles
SIXTH, BLACK = torch.tensor(1 / 6), torch.zeros(())


def grey(image: Tensor) -> Tensor:
    """The luma of ITU-R 601: 0.2989 R + 0.587 G + 0.114 B; (3, S, S) -> (1, S, S)."""
    return LUMA.matmul(image.flatten(1)).view(1, *image.shape[1:])


def blend_(image: Tensor, other: Tensor, factor: float) -> Tensor:
    """In place, factor * image + (1 - factor) * other, clamped: brightness, contrast, saturation by the other.

    other: anything that expands to (3, S, S).
    """
    return image.lerp_(other.expand_as(image), 1 - factor).clamp_(0, 1)


def shift_hue_(image: Tensor, turn: float) -> Tensor:
    """In place, turn the hue of HSV by a share of the circle, keeping value V = max and chroma C = V - min.

    The hue, as distance from red, is (1 + (G + B - R - min) / C) / 6, to green's side where G > B, else to blue's. A
    channel is V - C clamp(6 d - 1, 0, 1) = V + C - 6 C clamp(d, 1/6, 1/3), d the hue's distance from the channel's own:
    0 for red, 1/3 for green, 2/3 for blue. Red's is measured from the opposite, 1/2, since hues run from 0 to 1.
    """
    r, g, b = image
    value, low = image.amax(dim=0), image.amin(dim=0)
    chroma = (value - low).clamp_(min=1e-6)  # without chroma, any hue will do
    hue = torch.addcdiv(SIXTH, (g + b).sub_(r).sub_(low), chroma, value=1 / 6).copysign_(g - b)
    distance = torch.sub(hue.add_(turn + 1).frac_(), HUE_CENTRES, out=image).abs_()
    torch.sub(0.5, distance[0], out=distance[0])
    return torch.addcmul(value.add_(chroma), chroma, distance.clamp_(1 / 6, 1 / 3), value=-6, out=image)


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Convolve with exp(-x^2 / 2 sigma^2), sigma in pixels, along x, then along y; taps to about 3 sigma.

    The border is reflected. In the padded image as one line of memory, the pixel to the right is 1 step away, the one
    below a row's length.
    """
    radius = min(round(3 * sigma), min(image.shape[-2:]) - 1)
    weights = [math.exp(-0.5 * (x / sigma) ** 2) for x in range(-radius, radius + 1)]
    total = sum(weights)
    padded = F.pad(image, (radius,) * 4, mode="reflect")
    (colour, row, _), line = padded.stride(), padded.flatten()
    for step in (1, row):
        size = len(line) - 2 * radius * step
        blurred = line[:size] * (weights[0] / total)
        for i, weight in enumerate(weights[1:], start=1):
            blurred.add_(line[i * step:i * step + size], alpha=weight / total)
        line = blurred
    return line.as_strided(image.shape, (colour, row, 1))


def solarize(image: Tensor) -> Tensor:
    """Invert what is at least half bright, 128 of 255: x -> |x - [x >= 128 / 255]|, whatever the shape."""
    return image.sub(image.clone().ge_(128 / 255)).abs_()


def color_jitter_(image: Tensor, strengths: Sequence[float]) -> Tensor:
    """In place, in random order: blend by factors from 1 -+ strength with black, the mean grey, grey; turn the hue.

    image (3, S, S); strengths of brightness, contrast, saturation, and of the hue in circles.
    """
    for operation, draw in zip(torch.randperm(4).tolist(), torch.rand(4).tolist(), strict=True):
        strength = strengths[operation]
        least = max(0.0, 1 - strength)
        factor = least + (1 + strength - least) * draw
        if strength == 0:
            continue
        if operation == 0:
            blend_(image, BLACK, factor)
        elif operation == 1:
            blend_(image, LUMA.dot(image.mean(dim=(1, 2))), factor)
        elif operation == 2:
            blend_(image, grey(image), factor)
        else:
            shift_hue_(image, factor - 1)  # from -strength to strength, at most half a circle
    return image


class MultiCrop:
    """An image (PIL, or uint8 tensor (3, H, W)) -> V = 2 + local_number float views (3, S, S), the globals first.

    Sizes in pixels, scales as shares of the image's area. blur: the chance of a blur for global 1, global 2 and
    locals; solarize: the chance of it, on global 2 only. The defaults are the release's.
    """

    def __init__(self, global_size: int = 224, local_size: int = 96, global_scale: tuple[float, float] = (0.4, 1.0),
                 local_scale: tuple[float, float] = (0.05, 0.4), local_number: int = 8,
                 mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD,
                 jitter: Sequence[float] = (0.4, 0.4, 0.2, 0.1), blur: Sequence[float] = (1.0, 0.1, 0.5),
                 solarize: float = 0.2):
        self.jitter = tuple(jitter)
        self.mean, self.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
        local = (local_size, local_scale, blur[2], 0.0)
        self.views = [(global_size, global_scale, blur[0], 0.0), (global_size, global_scale, blur[1], solarize),
                      *[local] * local_number]

    def __call__(self, image: Image.Image | Tensor) -> list[Tensor]:
        image = image if isinstance(image, Tensor) else pil_to_tensor(image.convert("RGB"))
        if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
            raise ValueError(f"an image must be a uint8 tensor (3, H, W), not {image.dtype} {tuple(image.shape)}")
        return [self.view(image, *view) for view in self.views]

    def view(self, image: Tensor, size: int, scale: tuple[float, float], blur: float, solarize_chance: float) -> Tensor:
        """One random view: uint8 (3, H, W) -> normalised float (3, S, S)."""
        box = RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3))
        view = resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC, antialias=True).contiguous()
        flip, jitter, to_grey, to_blur, to_solarize, sigma = torch.rand(6).tolist()
        if flip < 0.5:
            view = view.flip(-1)
        view = view / 255
        if jitter < 0.8:
            color_jitter_(view, self.jitter)
        if to_grey < 0.2:
            view = grey(view)  # (1, S, S): one channel to blur and solarise
        if to_blur < blur:
            view = gaussian_blur(view, 0.1 + 1.9 * sigma)
        if to_solarize < solarize_chance:
            view = solarize(view)
        return view.sub(self.mean).div_(self.std)


def forward_crops(backbone: nn.Module, head: nn.Module, crops: Sequence[Tensor]) -> Tensor:
    """One backbone pass for each resolution, one head pass for all: V of (B, 3, S, S) -> logits (V * B, K)."""
    same_size = groupby(crops, key=lambda crop: crop.shape[-2:])
    return head(torch.cat([backbone(torch.cat(list(group))) for _, group in same_size]))


class MultiCropNetwork(nn.Module):
    """Backbone and head as one module, of which the student and the teacher are instances: crops -> logits."""

    def __init__(self, backbone: nn.Module, head: nn.Module):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        return forward_crops(self.backbone, self.head, crops)
