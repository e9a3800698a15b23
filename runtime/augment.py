"""Pixel operations of the augmentations, on batches, by torchvision's formulas.

Each image of a batch has an amount of its own. Each function returns new images.

Images may be on a GPU. Random numbers stay on the CPU, which reads them: reading from a GPU waits
for all that it has to do. non_blocking: a copy to the GPU does not wait either.

Shapes: n images of S x S pixels, (n, 3, S, S) in 0 ... 1; a grey one is (n, 1, S, S).
Amounts are (n,).
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# of red, green and blue in 0 ... 1, over ImageNet's images
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

LUMA = torch.tensor([0.2989, 0.587, 0.114])  # ITU-R 601: how bright red, green and blue look
GRID_WAVES = torch.arange(32) * (2 * math.pi / 32)  # the frequencies of a grid of 32 pixels


def chosen(draws: Tensor, probability: float) -> list[int]:
    """Return the indices of the images whose draw, uniform in 0 ... 1, is below the probability."""
    return [i for i, draw in enumerate(draws.tolist()) if draw < probability]


def apply_to(images: Tensor, which: list[int], operation: Callable, *amounts: Tensor) -> Tensor:
    """Return the images, some of them as the operation leaves them; the input may be overwritten.

    which: their indices. amounts: what the operation takes beside the images, (n,) each.
    """
    if not which:
        return images
    if len(which) == len(images):
        return operation(images, *amounts)
    index = torch.tensor(which)
    picked = [amount[index] for amount in amounts]
    index = index.to(images.device, non_blocking=True)
    images[index] = operation(images[index], *picked)
    return images


def color_jitter(images: Tensor, which: list[int], order: Tensor, amounts: Tensor) -> Tensor:
    """Jitter brightness, contrast, saturation and hue of some images, each in its own order.

    order (n, 4): the number of the first, second, third and last operation.
    amounts (n, 4): three factors, and the hue's angle.
    """
    operations = (brightness, contrast, saturation, hue)
    orders = order.tolist()
    for place in range(4):
        for number, operation in enumerate(operations):
            turn = [i for i in which if orders[i][place] == number]
            images = apply_to(images, turn, operation, amounts[:, number])
    return images


def jitter_range(strengths: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return the least and the largest amounts of color_jitter: (4,), (4,).

    strengths: of brightness, contrast, saturation and hue. The hue's is in circles, at most 0.5.
    """
    *factors, angle = strengths
    low = [max(0.0, 1 - strength) for strength in factors]
    high = [1 + strength for strength in factors]
    return torch.tensor([*low, -angle]), torch.tensor([*high, angle])


def flip(images: Tensor) -> Tensor:
    """Mirror left and right."""
    return images.flip(-1)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale all pixels."""
    return (images * per_image(factor, images)).clamp_(max=1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from the mean grey of the image."""
    mean_grey = grey(images.mean(dim=(2, 3), keepdim=True))  # without an image of the greys
    return blend(images, mean_grey, factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance of each pixel from its own grey."""
    return blend(images, grey(images), factor)


def blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Return factor * images + (1 - factor) * other, cut to 0 ... 1."""
    return torch.lerp(other, images, per_image(factor, images)).clamp_(0, 1)


def per_image(amount: Tensor, images: Tensor) -> Tensor:
    """Return a number for each image as it multiplies a batch: (n,) -> (n, 1, 1, 1)."""
    return amount.view(-1, 1, 1, 1).to(images.device, non_blocking=True)


def hue(images: Tensor, angle: Tensor) -> Tensor:
    """Same result as torchvision's adjust_hue to 0.01/255: turn the hue of HSV.

    angle: in circles, -0.5 ... 0.5. Value V = max and chroma C = max - min of a pixel stay.
    A channel is V - C clamp(6 d - 1, 0, 1), d the distance between the pixel's hue and its own.
    """
    r, g, b = images.split(1, dim=1)
    value = images.amax(dim=1, keepdim=True)
    lowest = images.amin(dim=1, keepdim=True)
    chroma = (value - lowest).clamp_(min=1e-6)  # a grey pixel has no hue, and any will do

    # 0 is red; green lies at 1/3, blue at -1/3 or, once round the circle, at 2/3
    from_red = (1 + (g + b - r - lowest) / chroma) / 6
    pixel_hue = from_red.copysign(g - b)  # its sign says on which side of red it lies
    turned = (pixel_hue + per_image(angle, images) + 1).frac()

    to_red = 0.5 - (turned - 0.5).abs()  # the circle closes at red, which is both 0 and 1
    to_green = (turned - 1 / 3).abs()
    to_blue = (turned - 2 / 3).abs()
    distance = torch.cat([to_red, to_green, to_blue], dim=1)
    return value - chroma * distance.mul_(6).sub_(1).clamp_(0, 1)


def grey(images: Tensor) -> Tensor:
    """Return the luma: (n, 3, S, S) -> (n, 1, S, S)."""
    luma = LUMA.to(images.device, non_blocking=True) @ images.flatten(2)
    return luma.view(-1, 1, *images.shape[2:])


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Convolve with the Gaussian of a grid; the border is reflected. sigma: in pixels, on the CPU.

    Its kernel g has the standard deviation sigma and the spectrum exp(sigma^2 (cos(w) - 1)), about
    exp(-sigma^2 w^2 / 2). Samples of exp(-x^2 / 2 sigma^2) would miss a narrow bell: under half of
    sigma below 0.35 pixels. g is separable: along x first, then along y. It is cut at 3 sigma.
    Release: Pillow's, three box blurs of the same sigma; it differs by 0.7 of 255 on average.
    """
    height, width = images.shape[-2:]
    radius = min(math.ceil(3 * sigma.max().item()), height - 1, width - 1)
    x = torch.arange(-radius, radius + 1)
    sigma = sigma[:, None]
    spectrum = (sigma**2 * (GRID_WAVES.cos() - 1)).exp()
    kernel = torch.fft.ifft(spectrum).real  # (n, 32): g(0), g(1), ...; g(-1) is the last
    weights = torch.where(x.abs() <= (3 * sigma).ceil(), kernel[:, x], 0.0)
    weights = weights / weights.sum(dim=1, keepdim=True)  # (n, 2 radius + 1)
    weights = weights.to(images.device, non_blocking=True)

    padded = F.pad(images, (radius, radius, radius, radius), mode="reflect")
    along_x = torch.zeros_like(padded[..., :width])
    for i, weight in enumerate(weights.unbind(dim=1)):
        along_x.addcmul_(padded[..., i : i + width], per_image(weight, images))
    blurred = torch.zeros_like(images)
    for i, weight in enumerate(weights.unbind(dim=1)):
        blurred.addcmul_(along_x[..., i : i + height, :], per_image(weight, images))
    return blurred


def solarize(images: Tensor) -> Tensor:
    """Invert what is at least half bright, 128 of 255."""
    return torch.where(images >= 128 / 255, 1 - images, images)


def normalise_colours(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return (images - mean) / std of each colour; mean and std: (3, 1, 1), on the CPU."""
    mean = mean.to(images.device, non_blocking=True)
    std = std.to(images.device, non_blocking=True)
    return (images - mean) / std
