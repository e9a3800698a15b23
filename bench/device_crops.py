"""Multi-crop of whole batches on the device, by the law of multicrop.MultiCrop.

train.py still crops on the CPU, one image after the other.
docs/log.md has how fast these are on a GPU (2026-11-26).

Shapes: B images of H x W pixels, V views of one size an image, n = B * V views, S their side.
Images are (B, H, 3, W) and views (n, S, 3, S): rows, colours, columns.
So the two products of a resize read and write the pixels as they lie.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.augment import GRID_WAVES, IMAGENET_MEAN, IMAGENET_STD

BRIGHTNESS, CONTRAST, SATURATION, HUE, NOTHING = range(5)
TRIES = 10  # at a box that lies inside, as in torchvision
LARGEST_RATIO = 4 / 3  # of a box's sides
SMALLEST_SIGMA = 0.1  # of the blur, in pixels of the view
LARGEST_SIGMA = 2.0

Uniform = Callable[..., Tensor]  # torch.rand, with a device and a generator


def random_boxes(
    n: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    uniform: Uniform,
) -> Tensor:
    """Return n boxes (top, left, height, width) in whole pixels: (n, 4).

    scale: fractions of the image's area.
    The first of ten tries that fits into the image is taken, else central_box.
    """
    area_draw, ratio_draw, top_draw, left_draw = uniform(4, n, TRIES).unbind()
    low, high = scale
    fraction = low + (high - low) * area_draw
    area = height * width * fraction
    # uniform in the logarithm: a ratio is as likely as its inverse
    log_ratio = math.log(LARGEST_RATIO) * (2 * ratio_draw - 1)
    ratio = log_ratio.exp()

    h = (area / ratio).sqrt().round()
    w = (area * ratio).sqrt().round()
    fits_h = (h > 0) & (h <= height)
    fits_w = (w > 0) & (w <= width)
    fits = fits_h & fits_w
    top = top_draw * (height - h + 1)
    left = left_draw * (width - w + 1)

    first = fits.float().argmax(dim=1, keepdim=True)
    found = fits.any(dim=1)
    tries = (top.floor(), left.floor(), h, w)
    central = central_box(height, width)
    box = []
    for side, otherwise in zip(tries, central):
        side = side.gather(1, first).squeeze(1)
        box.append(torch.where(found, side, float(otherwise)))
    return torch.stack(box, dim=1)


def central_box(height: int, width: int) -> tuple[int, int, int, int]:
    """Return the largest box in the centre whose ratio is allowed."""
    h = min(height, round(width * LARGEST_RATIO))
    w = min(width, round(height * LARGEST_RATIO))
    top = (height - h) // 2
    left = (width - w) // 2
    return top, left, h, w


def cubic(x: Tensor) -> Tensor:
    """Return Keys' cubic kernel with a = -1/2, as Pillow and torch take it where antialiased."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    far = torch.where(x < 2, far, 0.0)
    return torch.where(x < 1, near, far)


def resize_weights(start: Tensor, length: Tensor, pixels: int, size: int) -> Tensor:
    """Return matrices that crop and resize one axis: (n,), (n,) -> (n, size, pixels).

    Row i has the weights of the old pixels in the new pixel i. Outside of the crop they are 0.
    """
    start = start[:, None, None]
    length = length[:, None, None]
    scale = length / size  # old pixels for a new one
    new = torch.arange(size, device=start.device) + 0.5
    old = torch.arange(pixels, device=start.device) + 0.5
    centre = start + scale * new[:, None]

    # antialiased: where the image shrinks, the kernel grows
    distance = (old - centre) / scale.clamp(min=1)
    weights = cubic(distance)
    end = start + length
    inside = (old > start) & (old < end)
    weights = torch.where(inside, weights, 0.0)
    return weights / weights.sum(dim=-1, keepdim=True)


def blur_weights(sigma: Tensor, size: int) -> Tensor:
    """Return Gaussian blurs of one axis as band matrices: (n,) -> (n, size, size).

    The borders are reflected. A sigma of 0 gives the identity.
    """
    n = len(sigma)
    last = size - 1
    device = sigma.device
    sigma = sigma[:, None]
    radius = (3 * sigma).ceil()
    most = math.ceil(3 * LARGEST_SIGMA)
    most = min(most, last)  # a small view has no more to reflect
    taps = torch.arange(-most, most + 1, device=device)
    waves = GRID_WAVES.to(device)
    spectrum = (sigma**2 * (waves.cos() - 1)).exp()
    kernels = torch.fft.ifft(spectrum).real  # as augment.gaussian_blur
    inside = taps.abs() <= radius
    weights = torch.where(inside, kernels[:, taps], 0.0)
    weights = weights / weights.sum(dim=1, keepdim=True)

    rows = torch.arange(size, device=device)
    source = rows[:, None] + taps
    source = source.abs()  # reflected at the first pixel
    source = torch.where(source > last, 2 * last - source, source)  # and at the last one
    source = source.expand(n, -1, -1)
    weights = weights[:, None].expand_as(source)
    matrix = torch.zeros(n, size, size, device=device)
    return matrix.scatter_add_(2, source, weights.contiguous())


def grey(x: Tensor) -> Tensor:
    """Return the luma: (n, S, 3, S) -> (n, S, 1, S)."""
    red, green, blue = x.split(1, dim=2)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def hue(x: Tensor, angle: Tensor) -> Tensor:
    """Turn the hue of HSV, as augment.hue: x (n, S, 3, S), angle (n, 1, 1, 1) in circles."""
    red, green, blue = x.split(1, dim=2)
    value = x.amax(dim=2, keepdim=True)
    lowest = x.amin(dim=2, keepdim=True)
    chroma = (value - lowest).clamp(min=1e-6)

    # 0 is red; green lies at 1/3, blue at -1/3 or, once round the circle, at 2/3
    from_red = (1 + (green + blue - red - lowest) / chroma) / 6
    pixel_hue = torch.where(green >= blue, from_red, -from_red)
    turned = (pixel_hue + angle + 1).frac()

    to_red = 0.5 - (turned - 0.5).abs()
    to_green = (turned - 1 / 3).abs()
    to_blue = (turned - 2 / 3).abs()
    distance = torch.cat([to_red, to_green, to_blue], dim=2)
    fall = 6 * distance - 1
    return value - chroma * fall.clamp(0, 1)


def blend(x: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    """Return factor * x + (1 - factor) * other, cut to 0 ... 1."""
    mixed = other + (x - other) * factor
    return mixed.clamp(0, 1)


def per_image(values: Tensor) -> Tensor:
    """Return one value for all pixels of each view: (n,) -> (n, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def colours(x: Tensor, order: Tensor, amounts: Tensor, to_grey: Tensor) -> Tensor:
    """Jitter the colours of views (n, S, 3, S), each in its own order, and make some grey.

    order: (n, 4), at each place one of the constants above. amounts: (n, 4), three factors and
    the hue's angle. to_grey: bool (n,).
    """
    bright, contrast, saturation, angle = [per_image(amount) for amount in amounts.unbind(1)]
    for place in order.unbind(1):
        place = per_image(place)
        # all four for all views: the compiler makes one pass over the memory of it
        luma = grey(x)
        mean_grey = luma.mean(dim=(1, 2, 3), keepdim=True)
        brighter = blend(x, 0.0, bright)
        contrasted = blend(x, mean_grey, contrast)
        saturated = blend(x, luma, saturation)
        turned = hue(x, angle)
        x = torch.where(place == BRIGHTNESS, brighter, x)
        x = torch.where(place == CONTRAST, contrasted, x)
        x = torch.where(place == SATURATION, saturated, x)
        x = torch.where(place == HUE, turned, x)
    return torch.where(per_image(to_grey), grey(x), x)


def finish(x: Tensor, to_solarize: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Solarise some views and normalise all: (n, S, 3, S) -> (n, 3, S, S)."""
    bright = x >= 128 / 255
    inverted = per_image(to_solarize) & bright
    x = torch.where(inverted, 1 - x, x)
    x = (x - mean) / std
    return x.transpose(1, 2).contiguous()


class Views(NamedTuple):
    """The views of one size: their side, their scale, and for each the two chances, (V,)."""

    size: int
    scale: tuple[float, float]
    blur: Tensor
    solarize: Tensor


class DeviceMultiCrop:
    """Turn uint8 images (B, H, 3, W) on the device into 2 + local_number views (B, 3, S, S).

    The arguments are MultiCrop's. compile: the colours through torch.compile.
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
        device: torch.device | str = "cpu",
        compile: bool = False,
    ):
        # put on the device once: a copy in each call would wait for all of a GPU's queue
        def constant(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        self.mean = constant(mean).view(3, 1)
        self.std = constant(std).view(3, 1)
        strengths = constant(jitter)
        self.jittered = strengths > 0
        self.least = (1 - strengths).clamp(min=0)
        self.most = 1 + strengths
        self.least[HUE] = -jitter[HUE]  # an angle, to either side; the others are factors
        self.most[HUE] = jitter[HUE]

        blurs = constant(blur[:2])
        solarized = constant([0.0, solarize])
        self.kinds = [Views(global_size, global_scale, blurs, solarized)]
        if local_number:
            blurs = constant(local_number * [blur[2]])
            solarized = constant(local_number * [0.0])
            self.kinds.append(Views(local_size, local_scale, blurs, solarized))

        self.colours = colours
        self.finish = finish
        self.resize_weights = resize_weights
        if compile:
            self.colours = torch.compile(colours, dynamic=False)
            self.finish = torch.compile(finish, dynamic=False)
            self.resize_weights = torch.compile(resize_weights, dynamic=False)

    def __call__(self, images: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        """Return random views, the globals first; generator: the device's, or torch's own."""
        uniform = partial(torch.rand, device=images.device, generator=generator)
        B = len(images)
        views = []
        for kind in self.kinds:
            x = self.make_views(images, kind, uniform)
            x = x.unflatten(0, (B, -1))  # (B, V, 3, S, S)
            views.extend(x.unbind(1))
        return views

    def make_views(self, images: Tensor, kind: Views, uniform: Uniform) -> Tensor:
        """Return the views of one size, image by image: (B * V, 3, S, S)."""
        B = len(images)
        x = self.crop(images, kind, uniform)  # (n, S, 3, S) in 0 ... 1
        n = len(x)
        jitter, to_grey, to_blur, to_solarize, sigma_draw = uniform(5, n).unbind()

        amounts = self.least + (self.most - self.least) * uniform(n, 4)
        order = uniform(n, 4).argsort(dim=1)
        jittered = jitter < 0.8
        done = jittered[:, None] & self.jittered[order]
        order = torch.where(done, order, NOTHING)
        x = self.colours(x, order, amounts, to_grey < 0.2)

        sigma = SMALLEST_SIGMA + (LARGEST_SIGMA - SMALLEST_SIGMA) * sigma_draw
        blurred = to_blur < kind.blur.repeat(B)
        sigma = torch.where(blurred, sigma, 0.0)
        matrix = blur_weights(sigma, kind.size)
        x = resize(x, matrix, matrix)

        solarized = to_solarize < kind.solarize.repeat(B)
        return self.finish(x, solarized, self.mean, self.std)

    def crop(self, images: Tensor, kind: Views, uniform: Uniform) -> Tensor:
        """Return random crops, some of them flipped: (B, H, 3, W) -> (B * V, S, 3, S)."""
        B, H, _, W = images.shape
        V = len(kind.blur)
        n = B * V
        box = random_boxes(n, H, W, kind.scale, uniform)
        top, left, height, width = box.unbind(dim=1)
        rows = self.resize_weights(top, height, H, kind.size)  # (n, S, H)
        columns = self.resize_weights(left, width, W, kind.size)  # (n, S, W)

        # the columns from right to left are the flip
        flipped = uniform(n, 1, 1) < 0.5
        columns = torch.where(flipped, columns.flip(1), columns)
        rows = rows.view(B, V * kind.size, H)  # one product serves all views of an image
        pixels = images.float() / 255
        x = resize(pixels, rows, columns)
        return x.clamp(0, 1)  # the cubic kernel overshoots


def resize(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Multiply from the left and from the right, for each colour.

    x (B, H, 3, W), rows (B, V * S, H), columns (B * V, S, W) -> (B * V, S, 3, S).
    """
    W = x.shape[-1]
    n, S, _ = columns.shape
    lines = x.flatten(2)  # (B, H, 3 * W)
    x = torch.bmm(rows, lines)  # (B, V * S, 3 * W)
    x = x.view(n, -1, W)  # (n, S * 3, W)
    x = torch.bmm(x, columns.transpose(1, 2))
    return x.view(n, S, 3, S)
