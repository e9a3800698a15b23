"""Multi-crop (Sec. 3.1; appendix, "Multi-crop"; from SwAV): two global views and several small local ones.

Each view is a random crop, resized, flipped, and recoloured by BYOL's augmentations. The crop is resized as uint8 by
torchvision; every later step works in float on the small crop, with torchvision's formulas, per picture. The release
blurs with Pillow, whose Gaussian is three box blurs: its pixels differ from ours by 0.4 of 255 on average.

Shapes: B images, V views, S the side of a view in pixels, K prototypes; a single view is (3, S, S) in 0 ... 1.
"""
import math
from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2.functional import pil_to_tensor, resized_crop  # v1 would resize uint8 as float

LUMA = torch.tensor([0.2989, 0.587, 0.114])
OWN_HUES = torch.tensor([0 / 3, 1 / 3, 2 / 3]).view(3, 1, 1)  # of red, green, blue, in circles
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def grey(image: Tensor) -> Tensor:
    """The luma of ITU-R 601: 0.2989 R + 0.587 G + 0.114 B; (3, S, S) -> (1, S, S)."""
    return LUMA.matmul(image.flatten(1)).view(1, *image.shape[1:])


def blend_(image: Tensor, other: Tensor, factor: float) -> Tensor:
    """In place, factor * image + (1 - factor) * other, clamped: brightness, contrast, saturation by the other."""
    return image.lerp_(other.expand_as(image), 1 - factor).clamp_(0, 1)


def shift_hue(image: Tensor, turn: float) -> Tensor:
    """Turn the hue of HSV by a share of the circle, keeping value V = max and chroma C = max - min.

    A channel is V - C clamp(6 d - 1, 0, 1), with d the distance on the circle, which is 1 around, of the pixel's hue
    from the channel's own: 0 for red, 1/3 for green, 2/3 for blue.
    """
    r, g, b = image
    value, low = image.amax(dim=0), image.amin(dim=0)
    chroma = value - low
    red_is_less, green_is_less = (value - r).sign_(), (value - g).sign_()  # 0 or 1; lerp is much faster than where
    slope = torch.lerp(g - b, torch.lerp(b - r, r - g, green_is_less), red_is_less)
    slope.div_(chroma.clamp(min=1e-6).mul_(6))  # without chroma, any hue will do
    hue = torch.addcmul(slope, red_is_less, green_is_less.add_(1), value=1 / 3)  # 0, 1/3 or 2/3 + slope
    distance = (hue.add_(turn + 2.5) - OWN_HUES).frac_().sub_(0.5).abs_()
    return torch.addcmul(value, chroma, distance.sub_(1 / 6).clamp_(0, 1 / 6), value=-6)


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Convolve with exp(-x^2 / 2 sigma^2), columns then rows; taps to 3 sigma, reflected at the border."""
    radius = min(math.ceil(3 * sigma), min(image.shape[-2:]) - 1)
    first, *taps = torch.arange(-radius, radius + 1).div(sigma).square().mul(-0.5).softmax(dim=0).tolist()
    image = F.pad(image, (radius,) * 4, mode="reflect")
    for axis in (1, 2):
        size = image.shape[axis] - 2 * radius
        blurred = image.narrow(axis, 0, size) * first
        for i, tap in enumerate(taps, start=1):
            blurred.add_(image.narrow(axis, i, size), alpha=tap)
        image = blurred
    return image


def solarize(image: Tensor) -> Tensor:
    """Invert what is at least half bright: 128 of 255."""
    return torch.lerp(image, 1 - image, (image >= 128 / 255).float())


def uniform(low: float, high: float) -> float:
    """One draw from torch's global generator, as all randomness of this file."""
    return low + (high - low) * torch.rand(()).item()


def color_jitter_(image: Tensor, brightness: float, contrast: float, saturation: float, hue: float) -> Tensor:
    """In random order: blend by factors from 1 -+ strength with black, the mean grey, the grey image; turn the hue.

    May write into the image.
    """
    for operation in torch.randperm(4).tolist():
        if operation == 0 and brightness:
            image = blend_(image, torch.zeros(()), uniform(max(0.0, 1 - brightness), 1 + brightness))
        elif operation == 1 and contrast:
            image = blend_(image, grey(image).mean(), uniform(max(0.0, 1 - contrast), 1 + contrast))
        elif operation == 2 and saturation:
            image = blend_(image, grey(image), uniform(max(0.0, 1 - saturation), 1 + saturation))
        elif operation == 3 and hue:
            image = shift_hue(image, uniform(-hue, hue))
    return image


class MultiCrop:
    """A picture (PIL, or uint8 tensor (3, H, W)) -> V = 2 + local_number float views (3, S, S), the globals first.

    Sizes in pixels, scales as shares of the picture's area. blur: the chance of a blur for global 1, global 2 and
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

    def __call__(self, image) -> list[Tensor]:
        image = image if isinstance(image, Tensor) else pil_to_tensor(image.convert("RGB"))
        if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
            raise ValueError(f"a picture must be a uint8 tensor (3, H, W), not {image.dtype} {tuple(image.shape)}")
        return [self.view(image, *view) for view in self.views]

    def view(self, image: Tensor, size: int, scale: tuple[float, float], blur: float, solarize_chance: float) -> Tensor:
        """One random view: uint8 (3, H, W) -> normalised float (3, S, S)."""
        box = RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3))
        view = resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
        flip, jitter, to_grey, to_blur, to_solarize = torch.rand(5).tolist()
        if flip < 0.5:
            view = view.flip(-1)
        view = view.to(torch.float32, memory_format=torch.contiguous_format).div_(255)  # one colour after the other
        if jitter < 0.8:
            view = color_jitter_(view, *self.jitter)
        if to_grey < 0.2:
            view = grey(view).repeat(3, 1, 1)
        if to_blur < blur:
            view = gaussian_blur(view, uniform(0.1, 2.0))
        if to_solarize < solarize_chance:
            view = solarize(view)
        return view.sub_(self.mean).div_(self.std)


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
