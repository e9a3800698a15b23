"""Pixel operations of the augmentations, on one image, by torchvision's formulas.

Each returns a new image and leaves its input as it is.

Shapes: an image is (3, S, S) in 0 ... 1, and (1, S, S) once it is grey.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# of red, green and blue in 0 ... 1, over ImageNet's images
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

LUMA = torch.tensor([0.2989, 0.587, 0.114])  # ITU-R 601: how bright red, green and blue look
BLACK = torch.zeros(1, 1, 1)
GRID_WAVES = torch.arange(32) * (2 * math.pi / 32)  # the frequencies of a grid of 32 pixels


def color_jitter(image: Tensor, strengths: Sequence[float]) -> Tensor:
    """Apply brightness, contrast, saturation and hue jitter, in random order.

    strengths: of these four. The hue's is in circles, at most 0.5.
    """
    operations = (brightness, contrast, saturation, hue)
    order = torch.randperm(4).tolist()
    draws = torch.rand(4).tolist()
    for which, draw in zip(order, draws, strict=True):
        operation = operations[which]
        strength = strengths[which]
        if strength == 0:
            continue
        if operation is hue:  # an angle around 0
            low = -strength
            high = strength
        else:  # a factor around 1
            low = max(0.0, 1 - strength)
            high = 1 + strength
        amount = low + (high - low) * draw
        image = operation(image, amount)
    return image


def brightness(image: Tensor, factor: float) -> Tensor:
    """Scale all pixels, as a blend with black."""
    return blend(image, BLACK, factor)


def contrast(image: Tensor, factor: float) -> Tensor:
    """Scale the distance from the mean grey."""
    mean_colour = image.mean(dim=(1, 2))
    mean_grey = LUMA.dot(mean_colour)  # the mean of the greys, without an image of them
    return blend(image, mean_grey, factor)


def saturation(image: Tensor, factor: float) -> Tensor:
    """Scale the distance of each pixel from its own grey."""
    return blend(image, grey(image), factor)


def blend(image: Tensor, other: Tensor, factor: float) -> Tensor:
    """Return factor * image + (1 - factor) * other, cut to 0 ... 1."""
    mixed = torch.lerp(other, image, factor)
    return mixed.clamp_(0, 1)


def hue(image: Tensor, angle: float) -> Tensor:
    """Same result as torchvision's adjust_hue to 0.01/255: turn the hue of HSV.

    angle: in circles, -0.5 ... 0.5. Value V = max and chroma C = max - min of a pixel stay.
    A channel is V - C clamp(6 d - 1, 0, 1), d the distance between the pixel's hue and its own.
    """
    r, g, b = image
    value = image.amax(dim=0)
    lowest = image.amin(dim=0)
    chroma = (value - lowest).clamp(min=1e-6)  # a grey pixel has no hue, and any will do

    # 0 is red; green lies at 1/3, blue at -1/3 or, once round the circle, at 2/3
    from_red = (1 + (g + b - r - lowest) / chroma) / 6
    pixel_hue = from_red.copysign(g - b)  # its sign says on which side of red it lies
    turned = (pixel_hue + angle + 1).frac()

    to_red = 0.5 - (turned - 0.5).abs()  # the circle closes at red, which is both 0 and 1
    to_green = (turned - 1 / 3).abs()
    to_blue = (turned - 2 / 3).abs()
    distance = torch.stack([to_red, to_green, to_blue])
    fall = 6 * distance - 1  # a channel is lower the further its hue is
    return value - chroma * fall.clamp(0, 1)


def grey(image: Tensor) -> Tensor:
    """Return the luma: (3, S, S) -> (1, S, S)."""
    luma = LUMA @ image.flatten(1)
    return luma.view_as(image[:1])


def gaussian_blur(image: Tensor, sigma: float) -> Tensor:
    """Convolve with the Gaussian of a grid, sigma in pixels; the border is reflected.

    Its kernel g has the standard deviation sigma and the spectrum exp(sigma^2 (cos(w) - 1)), about
    exp(-sigma^2 w^2 / 2). Samples of exp(-x^2 / 2 sigma^2) would miss a narrow bell: under half of
    sigma below 0.35 pixels. g is separable: along x first, then along y. It is cut at 3 sigma.
    Release: Pillow's, three box blurs of the same sigma; it differs by 0.7 of 255 on average.
    """
    height, width = image.shape[-2:]
    radius = math.ceil(3 * sigma)
    radius = min(radius, height - 1, width - 1)  # a small crop has no more to reflect
    spectrum = (sigma**2 * (GRID_WAVES.cos() - 1)).exp()
    kernel = torch.fft.ifft(spectrum).real  # g(0), g(1), ...; g(-1) is the last
    weights = kernel[torch.arange(-radius, radius + 1)]
    weights = (weights / weights.sum()).tolist()

    padded = F.pad(image, 4 * [radius], mode="reflect")
    along_x = torch.zeros_like(padded[..., :width])
    for x, weight in enumerate(weights):
        along_x.add_(padded[..., x : x + width], alpha=weight)
    blurred = torch.zeros_like(image)
    for y, weight in enumerate(weights):
        blurred.add_(along_x[:, y : y + height], alpha=weight)
    return blurred


def solarize(image: Tensor) -> Tensor:
    """Invert what is at least half bright, 128 of 255."""
    bright = image >= 128 / 255
    return torch.where(bright, 1 - image, image)
