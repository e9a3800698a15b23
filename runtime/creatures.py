"""The embedded images and clips: ten kinds of creature, drawn from a seed, with labels and masks.

Nothing is downloaded and nothing lies on disk. A class is a silhouette with its coat pattern.
Everything else is drawn afresh for each image: place, angle, size, both coat colours, light,
ground.

A class cannot be read off the colours: the object's fraction of the image, the dark coat's fraction
of the object and the hues are drawn from the same laws for all classes. Edges are hard, since
colours mixed along them would say how finely a coat is patterned. The ground has the same
statistics in every image: DINO learns whatever two crops of an image share, and a tint of its own
would be an easier answer than the creature (docs/log.md has the images on which just that
happened).

Shapes: n images, S side in pixels; u right, v down, the creature fits in the disc of radius 1
around (0, 0).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, cos, sin

CLASSES = (
    "fish", "ladybird", "butterfly", "starfish", "snail",
    "turtle", "flower", "snake", "mushroom", "leaf",
)
AREA = (0.14, 0.3)  # the creature's fraction of the image
DARK = (0.45, 0.6)  # the dark coat's fraction of the creature
TURN = 30.0  # degrees, to either side; and mirrored or not
STRETCH = 0.2  # of the logarithm of the aspect ratio, to either side
DUSK = (0.45, 0.6, 0.75)  # what is left of red, green and blue light at the end of a clip
ROOM = 0.15  # how far a creature may stick out of the image, in half sides


class Creatures(NamedTuple):
    """images (n, 3, S, S) uint8, labels (n,) int64, masks (n, S, S) bool: True on the object."""

    images: Tensor
    labels: Tensor
    masks: Tensor


def _ellipse(u: Tensor, v: Tensor, a: float, b: float) -> Tensor:
    """About the distance to the ellipse's edge, positive inside."""
    radius = _radius(u / a, v / b)
    return (1 - radius) * min(a, b)


def _radius(u: Tensor, v: Tensor) -> Tensor:
    """The distance from (0, 0)."""
    return (u * u + v * v).sqrt()


def _all(*parts: Tensor) -> Tensor:
    """Inside of all parts."""
    return torch.stack(parts).amin(dim=0)


def _any(*parts: Tensor) -> Tensor:
    """Inside of any part."""
    return torch.stack(parts).amax(dim=0)


def silhouette(label: int, u: Tensor, v: Tensor, phase: Tensor) -> tuple[Tensor, Tensor]:
    """Return (inside, coat), of u's and v's shape.

    inside > 0 on the creature; the dark coat is where coat is high. phase shifts the coat's pattern
    over the body, in radians.
    """
    left_right = u.abs()  # for what is the same on both sides
    up_down = v.abs()
    r = _radius(u, v)
    angle = torch.atan2(v, u)
    match CLASSES[label]:
        case "fish":
            body = _ellipse(u + 0.2, v, 0.7, 0.42)
            wedge = (u - 0.3) * 0.9 - up_down
            tail = _all(u - 0.35, 0.9 - u, wedge)
            inside = _any(body, tail)
            coat = sin(10 * u + 8 * up_down + phase)
        case "ladybird":
            diagonals = (up_down - 0.95 * left_right).abs()
            lines = _all(diagonals, left_right)
            legs = _all(0.09 - lines, 0.85 - r)
            inside = _any(0.64 - r, legs)
            coat = cos(7 * u + phase) + cos(7 * v + 2 * phase)
        case "butterfly":
            lobes = sin(2 * angle).abs() ** 0.7
            lower = 1 - 0.25 * sin(angle)
            wings = 0.22 + 0.7 * lobes * lower
            body = _ellipse(u, v, 0.12, 0.75)
            inside = _any(wings - r, body)
            coat = sin(angle).abs() + 2 * r
        case "starfish":
            inside = 0.56 + 0.36 * cos(5 * angle) - r
            coat = cos(24 * r + phase)
        case "snail":
            shell = _radius(u, v + 0.1)
            foot = _ellipse(u - 0.1, v - 0.6, 0.85, 0.2)
            foot = _all(foot, v - 0.45)
            inside = _any(0.62 - shell, foot)
            spiral = torch.atan2(v + 0.1, u) + 13 * shell
            coat = sin(spiral + phase)
        case "turtle":
            body = _ellipse(u, v, 0.68, 0.56)
            legs = 0.22 - _radius(left_right - 0.52, up_down - 0.52)
            head = 0.22 - _radius(u - 0.75, v)
            inside = _any(body, legs, head)
            coat = sin(15 * u + phase) * sin(15 * v + 2 * phase)
        case "flower":
            inside = 0.72 + 0.24 * cos(8 * angle) - r
            coat = -r
        case "snake":
            middle = 0.42 * sin(5 * u)
            slope = 2.1 * cos(5 * u)
            band = 0.19 - (v - middle).abs() / (1 + slope**2).sqrt()
            inside = _all(band, 0.95 - left_right)
            coat = sin(9 * u + phase)
        case "mushroom":
            cap = _ellipse(u, v - 0.15, 0.85, 0.9)
            cap = _all(cap, 0.15 - v)
            stem = _all(0.22 - left_right, v + 0.1, 0.85 - v)
            inside = _any(cap, stem)
            dots = cos(13 * u + phase) * cos(13 * v)
            coat = torch.where(v > 0.15, -2.0 - v, dots)
        case "leaf":
            inside = 0.98 - _radius(up_down + 0.5, u)
            coat = sin(22 * (u - up_down) + phase)
    return inside, coat


def _coat_table(label: int) -> tuple[float, Tensor]:
    """The silhouette's area (in units of u times v) and its coat values in ascending order."""
    axis = torch.linspace(-1.1, 1.1, 400)
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    no_shift = torch.zeros(())
    inside, coat = silhouette(label, u, v, no_shift)
    values = coat[inside > 0].sort().values
    spacing = 2.2 / 399
    return len(values) * spacing**2, values


def _rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Colours (n, 3) in 0 ... 1 from hue, saturation and value, each (n,) in 0 ... 1."""
    hue, saturation, value = hue[:, None], saturation[:, None], value[:, None]
    offsets = torch.tensor([5.0, 3.0, 1.0])
    k = (offsets + 6 * hue) % 6
    ramp = torch.minimum(k, 4 - k).clamp(0, 1)
    return value * (1 - saturation * ramp)


def _ground(n: int, side: int, generator: torch.Generator) -> Tensor:
    """Calm mottled ground (n, 3, S, S): smooth noise around one grey, one law in all images."""

    def noise(channels: int, cells: int) -> Tensor:
        return torch.randn(n, channels, cells, cells, generator=generator)

    def grown(cells: Tensor) -> Tensor:
        return F.interpolate(cells, (side, side), mode="bicubic")

    colours = noise(3, 10)
    greys = noise(1, 10)
    fine = noise(1, side // 2)
    return 0.42 + 0.04 * grown(colours + greys) + 0.02 * grown(fine)


class Looks(NamedTuple):
    """How n creatures of one class stand, and their coats: each (n,), but two colours (n, 3)."""

    size: Tensor  # of radius 1, in half sides
    turn: Tensor  # radians
    stretch: Tensor
    mirror: Tensor
    right: Tensor  # half sides
    down: Tensor
    light: Tensor
    dark: Tensor
    edge: Tensor  # the coat is dark above it
    sun: Tensor
    phase: Tensor


def choose_looks(label: int, n: int, generator: torch.Generator) -> Looks:
    """Draw the looks of n creatures of one class."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    area, coats = _coat_table(label)
    size = (4 * uniform(*AREA) / area).sqrt()
    turn = uniform(-1, 1) * math.radians(TURN)
    stretch = torch.exp(uniform(-1, 1) * STRETCH)
    mirror = 1 - 2 * torch.randint(2, (n,), generator=generator)
    room = (1 - 0.95 * size).clamp(min=0) + ROOM
    right = uniform(-1, 1) * room
    down = uniform(-1, 1) * room
    hue = uniform(0, 1)
    light = _rgb(hue, uniform(0.55, 0.65), uniform(0.9, 1.0))
    dark = _rgb(hue, uniform(0.65, 0.75), uniform(0.2, 0.25))
    rank = uniform(*DARK) * len(coats)
    edge = coats[rank.long()]
    sun = uniform(0, 2 * math.pi)
    phase = uniform(0, 2 * math.pi)
    return Looks(size, turn, stretch, mirror, right, down, light, dark, edge, sun, phase)


def draw(label: int, looks: Looks, ground: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one of a class on each ground (n, 3, S, S): images in 0 ... 1, masks (n, S, S) bool."""
    n = len(ground)
    side = ground.shape[-1]

    def per_image(values: Tensor) -> Tensor:
        return values.view(n, 1, 1)

    # from the image's pixels to the creature's own axes: moved, grown, turned, stretched
    axis = (2 * torch.arange(side) + 1) / side - 1
    x = axis.view(1, 1, -1) - per_image(looks.right)
    y = axis.view(1, -1, 1) - per_image(looks.down)
    x = x / per_image(looks.size)
    y = y / per_image(looks.size)
    turn_cos = per_image(looks.turn.cos())
    turn_sin = per_image(looks.turn.sin())
    u = turn_cos * x + turn_sin * y
    v = turn_cos * y - turn_sin * x
    u = u * per_image(looks.mirror * looks.stretch)
    v = v / per_image(looks.stretch)
    inside, coat = silhouette(label, u, v, per_image(looks.phase))
    mask = inside > 0

    is_dark = coat > per_image(looks.edge)
    light = looks.light.view(n, 3, 1, 1)
    dark = looks.dark.view(n, 3, 1, 1)
    colours = torch.where(is_dark.unsqueeze(1), dark, light)

    towards_sun = per_image(looks.sun.cos()) * x + per_image(looks.sun.sin()) * y
    shade = 1 + 0.05 * towards_sun.clamp(-1, 1)
    creature = colours * shade.unsqueeze(1)
    images = torch.where(mask.unsqueeze(1), creature, ground)
    return images.clamp(0, 1), mask


def make_creatures(n: int, side: int = 64, seed: int = 0) -> Creatures:
    """Draw n images of S x S pixels, in about 1 ms each. Image i shows class i modulo 10."""
    images = torch.empty(n, 3, side, side, dtype=torch.uint8)
    masks = torch.empty(n, side, side, dtype=torch.bool)
    labels = torch.arange(n) % len(CLASSES)
    for label in range(len(CLASSES)):
        generator = torch.Generator().manual_seed(seed * len(CLASSES) + label)
        of_class = (labels == label).nonzero().squeeze(1)
        for rows in of_class.split(100):
            looks = choose_looks(label, len(rows), generator)
            ground = _ground(len(rows), side, generator)
            drawn, objects = draw(label, looks, ground)
            images[rows] = (drawn * 255).round().byte()
            masks[rows] = objects
    return Creatures(images, labels, masks)


def make_clip(
    seed: int = 0,
    frames: int = 24,
    side: int = 320,
    number: int = 3,
) -> tuple[Tensor, Tensor]:
    """Draw creatures that walk, turn and grow or shrink, in falling light.

    Return the frames (T, 3, S, S) and ids (T, S, S), both uint8. ids are 0 on the ground, 1 ...
    number on the creatures; the later ones walk in front. All wear the same colours: these would
    distinguish them without a network.
    """
    generator = torch.Generator().manual_seed(seed)
    progress = torch.linspace(0, 1, frames)
    images = _ground(1, side, generator).expand(frames, -1, -1, -1)
    ids = torch.zeros(frames, side, side, dtype=torch.uint8)
    labels = torch.randperm(len(CLASSES), generator=generator)[:number].tolist()
    coat = choose_looks(labels[0], 1, generator)
    for creature, label in enumerate(labels):
        looks = choose_looks(label, 1, generator)
        far, spin, growth = torch.rand(3, generator=generator) - torch.tensor([0, 0.5, 0.5])

        # all start on a circle, and each walks straight to another point of it
        start = torch.tensor(2 * math.pi * creature / number)
        end = start + 1.2 + 1.4 * far
        right = 0.6 * torch.lerp(start.cos(), end.cos(), progress)
        down = 0.6 * torch.lerp(start.sin(), end.sin(), progress)
        grown = torch.exp(0.6 * growth * progress)
        looks = looks._replace(
            right=right,
            down=down,
            turn=looks.turn + 3 * spin * progress,
            size=0.5 * looks.size * grown,
            light=coat.light,
            dark=coat.dark,
        )
        # what does not move is the same in all frames
        looks = Looks(*(value.expand(frames, *value.shape[1:]) for value in looks))
        images, mask = draw(label, looks, images)
        ids[mask] = creature + 1

    day = torch.ones(3)
    light = torch.lerp(day, torch.tensor(DUSK), progress.unsqueeze(1))
    images = images * light.view(frames, 3, 1, 1)
    return (images * 255).round().byte(), ids
