"""Random boxes of images, and their crops as two products of matrices.

Shapes: n images of H x W pixels, a box in each, S the side of a crop.
"""
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

TRIES = 10  # at a box that lies inside, as in torchvision
LARGEST_RATIO = 4 / 3  # of a box's sides


def random_boxes(sides: Tensor, scales: Tensor, draws: Tensor) -> Tensor:
    """Return random boxes (top, left, height, width), by torchvision's law: (..., 4).

    sides (..., 2): heights and widths of the images.
    scales (..., 2): the least and the largest fraction of the area.
    draws: uniform in 0 ... 1, (..., 4 * TRIES).
    The first of ten tries that fits into the image is taken, else the central box.
    """
    height, width = sides.split(1, dim=-1)
    low, high = scales.split(1, dim=-1)
    area_draw, ratio_draw, top_draw, left_draw = draws.chunk(4, dim=-1)
    area = height * width * (low + (high - low) * area_draw)
    # uniform in the logarithm: a ratio is as likely as its inverse
    ratio = (math.log(LARGEST_RATIO) * (2 * ratio_draw - 1)).exp()

    h = (area / ratio).sqrt().round()
    w = (area * ratio).sqrt().round()
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
    top = (top_draw * (height - h + 1)).floor()
    left = (left_draw * (width - w + 1)).floor()
    tries = torch.stack([top, left, h, w], dim=-1)  # (..., TRIES, 4)

    first = fits.int().argmax(dim=-1)
    boxes = tries.take_along_dim(first[..., None, None], dim=-2).squeeze(-2)
    return torch.where(fits.any(dim=-1, keepdim=True), boxes, central_box(height, width))


def central_box(height: Tensor, width: Tensor) -> Tensor:
    """Return the largest box in the centre whose ratio is allowed: (..., 1) twice -> (..., 4)."""
    h = torch.minimum(height, (width * LARGEST_RATIO).round())
    w = torch.minimum(width, (height * LARGEST_RATIO).round())
    top = (height - h).div(2, rounding_mode="floor")
    left = (width - w).div(2, rounding_mode="floor")
    return torch.cat([top, left, h, w], dim=-1)


def crop_and_resize(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut a box out of each image and resize it: (n, 3, H, W) in 0 ... 1, (n, 4) -> (n, 3, S, S).

    Same result as torchvision's antialiased bicubic resize of floats.
    """
    H, W = images.shape[-2:]
    boxes = boxes.to(images.device, non_blocking=True)  # a GPU is not waited for
    top, left, height, width = boxes.unbind(dim=1)
    rows = resize_weights(top, height, H, size)
    columns = resize_weights(left, width, W, size)
    # a resize is linear in the pixels: one matrix for the rows, one for the columns
    crops = rows[:, None] @ images @ columns[:, None].transpose(-2, -1)
    return crops.clamp(0, 1)  # the cubic kernel overshoots


def resize_weights(start: Tensor, length: Tensor, pixels: int, size: int) -> Tensor:
    """Return matrices that crop and resize one axis: (n,), (n,) -> (n, S, pixels), rows sum to 1.

    Row i has the weights of the old pixels in the new pixel i. Outside of the crop they are 0.
    """
    start = start[:, None, None]
    length = length[:, None, None]
    scale = length / size  # old pixels for a new one
    new = torch.arange(size, device=start.device) + 0.5
    old = torch.arange(pixels, device=start.device) + 0.5
    centre = start + scale * new[:, None]

    # antialiased: where the image shrinks, the kernel grows
    weights = cubic((old - centre) / scale.clamp(min=1))
    inside = (old > start) & (old < start + length)
    weights = torch.where(inside, weights, 0.0)
    return weights / weights.sum(dim=-1, keepdim=True)


def shrunk(image: Tensor, side: int) -> Tensor:
    """Return uint8 (3, H, W) with no side longer than `side` pixels; it keeps its shape."""
    height, width = image.shape[-2:]
    shrink = side / max(height, width)
    if shrink >= 1:
        return image
    size = [max(1, round(height * shrink)), max(1, round(width * shrink))]
    return resize(image, size, InterpolationMode.BICUBIC, antialias=True)


def padded(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return images of any shapes as one uint8 tensor (n, 3, H, W), and their sides (n, 2).

    Each stands in the left upper corner; what is right of it and below is 0.
    """
    sides = torch.tensor([image.shape[-2:] for image in images])
    H, W = sides.amax(dim=0).tolist()
    pixels = torch.zeros(len(images), 3, H, W, dtype=torch.uint8)
    for i, image in enumerate(images):
        _, height, width = image.shape
        pixels[i, :, :height, :width] = image
    return pixels, sides


def cubic(x: Tensor) -> Tensor:
    """Return Keys' cubic kernel with a = -1/2, as Pillow and torch take it where antialiased."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    far = torch.where(x < 2, far, 0.0)
    return torch.where(x < 1, near, far)
