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
from torch import Tensor

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
    return (1 - ((u / a) ** 2 + (v / b) ** 2).sqrt()) * min(a, b)


def _either(*parts: Tensor) -> Tensor:
    return torch.stack(parts).amax(dim=0)


def silhouette(label: int, u: Tensor, v: Tensor, phase: Tensor) -> tuple[Tensor, Tensor]:
    """Return (inside, coat), of u's and v's shape.

    inside > 0 on the creature; the dark coat is where coat is high. phase shifts the coat's pattern
    over the body, in radians.
    """
    r, angle = (u * u + v * v).sqrt(), torch.atan2(v, u)
    match CLASSES[label]:
        case "fish":
            tail = torch.minimum(u - 0.35, 0.9 - u).minimum((u - 0.3) * 0.9 - v.abs())
            body = _ellipse(u + 0.2, v, 0.7, 0.42)
            return _either(body, tail), torch.sin(10 * u + 8 * v.abs() + phase)
        case "ladybird":
            legs = torch.minimum(0.09 - (v.abs() - 0.95 * u.abs()).abs().minimum(u.abs()), 0.85 - r)
            return _either(0.64 - r, legs), torch.cos(7 * u + phase) + torch.cos(7 * v + 2 * phase)
        case "butterfly":
            wing = 0.22 + 0.7 * torch.sin(2 * angle).abs() ** 0.7 * (1 - 0.25 * torch.sin(angle))
            body = _ellipse(u, v, 0.12, 0.75)
            return _either(wing - r, body), (angle.sin().abs() + 2 * r) + 0 * phase
        case "starfish":
            return 0.56 + 0.36 * torch.cos(5 * angle) - r, torch.cos(24 * r + phase)
        case "snail":
            shell = (u * u + (v + 0.1) ** 2).sqrt()
            foot = torch.minimum(_ellipse(u - 0.1, v - 0.6, 0.85, 0.2), v - 0.45)
            spiral = torch.atan2(v + 0.1, u) + 13 * shell
            return _either(0.62 - shell, foot), torch.sin(spiral + phase)
        case "turtle":
            legs = 0.22 - ((u.abs() - 0.52) ** 2 + (v.abs() - 0.52) ** 2).sqrt()
            chequers = torch.sin(15 * u + phase) * torch.sin(15 * v + 2 * phase)
            head = 0.22 - ((u - 0.75) ** 2 + v * v).sqrt()
            return _either(_ellipse(u, v, 0.68, 0.56), legs, head), chequers
        case "flower":
            return 0.72 + 0.24 * torch.cos(8 * angle) - r, -r + 0 * phase
        case "snake":
            slope = (1 + (2.1 * torch.cos(5 * u)) ** 2).sqrt()
            band = 0.19 - (v - 0.42 * torch.sin(5 * u)).abs() / slope
            return torch.minimum(band, 0.95 - u.abs()), torch.sin(9 * u + phase)
        case "mushroom":
            cap = torch.minimum(_ellipse(u, v - 0.15, 0.85, 0.9), 0.15 - v)
            stem = torch.minimum(0.22 - u.abs(), torch.minimum(v + 0.1, 0.85 - v))
            dots = torch.cos(13 * u + phase) * torch.cos(13 * v)
            return _either(cap, stem), torch.where(v > 0.15, -2.0 - v, dots)
        case "leaf":
            blade = 0.98 - ((v.abs() + 0.5) ** 2 + u * u).sqrt()
            return blade, torch.sin(22 * (u - v.abs()) + phase)
    raise ValueError(f"label {label} is not in 0 ... {len(CLASSES) - 1}")


def _coat_table(label: int) -> tuple[float, Tensor]:
    """The silhouette's area (in units of u times v) and its coat values in ascending order."""
    axis = torch.linspace(-1.1, 1.1, 400)
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    inside, coat = silhouette(label, u, v, torch.zeros(()))
    values = coat.expand_as(u)[inside > 0].sort().values
    return len(values) * (2.2 / 399) ** 2, values


def _rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Colours (n, 3) in 0 ... 1 from hue, saturation and value, each (n,) in 0 ... 1."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + 6 * hue[:, None]) % 6
    return value[:, None] * (1 - saturation[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))


def _ground(n: int, side: int, generator: torch.Generator) -> Tensor:
    """Calm mottled ground (n, 3, S, S): smooth noise around one grey, one law in all images."""
    colours = torch.randn(n, 3, 10, 10, generator=generator)
    greys = torch.randn(n, 1, 10, 10, generator=generator)
    noise = colours + greys
    fine = torch.randn(n, 1, side // 2, side // 2, generator=generator)
    grow = {"size": (side, side), "mode": "bicubic"}
    return 0.42 + 0.04 * F.interpolate(noise, **grow) + 0.02 * F.interpolate(fine, **grow)


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
    right, down = uniform(-1, 1) * room, uniform(-1, 1) * room
    hue = uniform(0, 1)
    light = _rgb(hue, uniform(0.55, 0.65), uniform(0.9, 1.0))
    dark = _rgb(hue, uniform(0.65, 0.75), uniform(0.2, 0.25))
    edge = coats[(uniform(*DARK) * len(coats)).long()]
    sun = uniform(0, 2 * math.pi)
    phase = uniform(0, 2 * math.pi)
    return Looks(size, turn, stretch, mirror, right, down, light, dark, edge, sun, phase)


def draw(label: int, looks: Looks, ground: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one of a class on each ground (n, 3, S, S): images in 0 ... 1, masks (n, S, S) bool."""
    n, side = len(ground), ground.shape[-1]
    axis = (2 * torch.arange(side) + 1) / side - 1
    y, x = axis.view(1, -1, 1), axis.view(1, 1, -1)
    per = lambda values: values.view(n, 1, 1)
    dx, dy = (x - per(looks.right)) / per(looks.size), (y - per(looks.down)) / per(looks.size)
    cos, sin = per(looks.turn.cos()), per(looks.turn.sin())
    inside, coat = silhouette(label, (cos * dx + sin * dy) * per(looks.mirror * looks.stretch),
                              (cos * dy - sin * dx) / per(looks.stretch), per(looks.phase))
    is_dark = (coat > per(looks.edge)).unsqueeze(1)
    shade = 1 + 0.05 * (per(looks.sun.cos()) * dx + per(looks.sun.sin()) * dy).clamp(-1, 1)
    coat_colours = torch.where(is_dark, looks.dark.view(n, 3, 1, 1), looks.light.view(n, 3, 1, 1))
    creature = coat_colours * shade.unsqueeze(1)
    mask = inside > 0
    return torch.where(mask.unsqueeze(1), creature, ground).clamp(0, 1), mask


def make_creatures(n: int, side: int = 64, seed: int = 0) -> Creatures:
    """Draw n images of S x S pixels, in about 1 ms each. Image i shows class i modulo 10."""
    images = torch.empty(n, 3, side, side, dtype=torch.uint8)
    masks = torch.empty(n, side, side, dtype=torch.bool)
    labels = torch.arange(n) % len(CLASSES)
    for label in range(len(CLASSES)):
        generator = torch.Generator().manual_seed(seed * len(CLASSES) + label)
        for rows in (labels == label).nonzero().squeeze(1).split(100):
            looks = choose_looks(label, len(rows), generator)
            drawn, objects = draw(label, looks, _ground(len(rows), side, generator))
            images[rows] = (drawn * 255).round().byte()
            masks[rows] = objects
    return Creatures(images, labels, masks)


def make_clip(
    seed: int = 0, frames: int = 24, side: int = 320, number: int = 3
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
        looks = choose_looks(label, 1, generator)._replace(light=coat.light, dark=coat.dark)
        looks = Looks(*(value.expand(frames, *value.shape[1:]) for value in looks))
        far, spin, growth = torch.rand(3, generator=generator) - torch.tensor([0, 0.5, 0.5])
        # all start on a circle, and each walks straight to another point of it
        start = torch.tensor(2 * math.pi * creature / number)
        end = start + 1.2 + 1.4 * far
        right = 0.6 * torch.lerp(start.cos(), end.cos(), progress)
        down = 0.6 * torch.lerp(start.sin(), end.sin(), progress)
        looks = looks._replace(right=right, down=down, turn=looks.turn + 3 * spin * progress,
                               size=0.5 * looks.size * torch.exp(0.6 * growth * progress))
        images, mask = draw(label, looks, images)
        ids[mask] = creature + 1
    light = torch.lerp(torch.ones(3), torch.tensor(DUSK), progress.unsqueeze(1))
    return (images * light.view(frames, 3, 1, 1) * 255).round().byte(), ids
