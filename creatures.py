"""The embedded pictures: ten kinds of creature, drawn from a seed, with labels and exact object masks.

Nothing is downloaded and nothing lies on disk. A class is a silhouette with its coat pattern; everything else
is drawn afresh for each picture: place, turn, size, both coat colours, light, ground. So that a class cannot be
read off the colours, the object's share of the picture and the share of the dark coat are drawn from the same laws
for all classes, and so are the hues; and edges are hard, since colours mixed along them would tell how finely a coat
is patterned. The ground has the same statistics in every picture:
DINO learns whatever two crops of a picture share, and a tint of its own would be an easier answer than the creature
(LOG.md has the pictures on which just that happened).

Shapes: n pictures, S side in pixels; u right, v down, the creature fits in the disc of radius 1 around (0, 0).
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CLASSES = ("fish", "ladybird", "butterfly", "starfish", "snail", "turtle", "flower", "snake", "mushroom", "leaf")
AREA = (0.14, 0.3)  # the creature's share of the picture
DARK = (0.45, 0.6)  # the dark coat's share of the creature
TURN = 30.0  # degrees, to either side; and mirrored or not
STRETCH = 0.2  # of the logarithm of the aspect ratio, to either side
ROOM = 0.15  # how far a creature may stick out of the picture, in half sides


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
    """Return (inside, coat): inside > 0 on the creature; coat, a field: the dark coat is where it is high.

    phase shifts the coat's pattern over the body, in radians.
    """
    r, angle = (u * u + v * v).sqrt(), torch.atan2(v, u)
    match CLASSES[label]:
        case "fish":
            tail = torch.minimum(u - 0.35, 0.9 - u).minimum((u - 0.3) * 0.9 - v.abs())
            return _either(_ellipse(u + 0.2, v, 0.7, 0.42), tail), torch.sin(10 * u + 8 * v.abs() + phase)
        case "ladybird":
            legs = torch.minimum(0.09 - (v.abs() - 0.95 * u.abs()).abs().minimum(u.abs()), 0.85 - r)
            return _either(0.64 - r, legs), torch.cos(7 * u + phase) + torch.cos(7 * v + 2 * phase)
        case "butterfly":
            wing = 0.22 + 0.7 * torch.sin(2 * angle).abs() ** 0.7 * (1 - 0.25 * torch.sin(angle))
            return _either(wing - r, _ellipse(u, v, 0.12, 0.75)), (angle.sin().abs() + 2 * r) + 0 * phase
        case "starfish":
            return 0.56 + 0.36 * torch.cos(5 * angle) - r, torch.cos(24 * r + phase)
        case "snail":
            shell = (u * u + (v + 0.1) ** 2).sqrt()
            foot = torch.minimum(_ellipse(u - 0.1, v - 0.6, 0.85, 0.2), v - 0.45)
            return _either(0.62 - shell, foot), torch.sin(torch.atan2(v + 0.1, u) + 13 * shell + phase)
        case "turtle":
            legs = 0.22 - ((u.abs() - 0.52) ** 2 + (v.abs() - 0.52) ** 2).sqrt()
            chequers = torch.sin(15 * u + phase) * torch.sin(15 * v + 2 * phase)
            return _either(_ellipse(u, v, 0.68, 0.56), legs, 0.22 - ((u - 0.75) ** 2 + v * v).sqrt()), chequers
        case "flower":
            return 0.72 + 0.24 * torch.cos(8 * angle) - r, -r + 0 * phase
        case "snake":
            slope = (1 + (2.1 * torch.cos(5 * u)) ** 2).sqrt()
            band = 0.19 - (v - 0.42 * torch.sin(5 * u)).abs() / slope
            return torch.minimum(band, 0.95 - u.abs()), torch.sin(9 * u + phase)
        case "mushroom":
            cap = torch.minimum(_ellipse(u, v - 0.15, 0.85, 0.9), 0.15 - v)
            stem = torch.minimum(0.22 - u.abs(), torch.minimum(v + 0.1, 0.85 - v))
            return _either(cap, stem), torch.where(v > 0.15, -2.0 - v, torch.cos(13 * u + phase) * torch.cos(13 * v))
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
    """Calm mottled ground (n, 3, S, S): smooth noise around one grey, the same law in all pictures."""
    noise = torch.randn(n, 3, 10, 10, generator=generator) + torch.randn(n, 1, 10, 10, generator=generator)
    fine = torch.randn(n, 1, side // 2, side // 2, generator=generator)
    grow = {"size": (side, side), "mode": "bicubic"}
    return 0.42 + 0.04 * F.interpolate(noise, **grow) + 0.02 * F.interpolate(fine, **grow)


def draw(label: int, n: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw n pictures of one class -> images (n, 3, S, S) in 0 ... 1 and masks (n, S, S) bool."""

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
    light, dark = _rgb(hue, uniform(0.55, 0.65), uniform(0.9, 1.0)), _rgb(hue, uniform(0.65, 0.75), uniform(0.2, 0.25))
    edge = coats[(uniform(*DARK) * len(coats)).long()]
    sun, phase = uniform(0, 2 * math.pi), uniform(0, 2 * math.pi)

    axis = (2 * torch.arange(side) + 1) / side - 1
    y, x = axis.view(1, -1, 1), axis.view(1, 1, -1)
    per = lambda values: values.view(n, 1, 1)
    dx, dy = (x - per(right)) / per(size), (y - per(down)) / per(size)
    cos, sin = per(turn.cos()), per(turn.sin())
    inside, coat = silhouette(label, (cos * dx + sin * dy) * per(mirror * stretch),
                              (cos * dy - sin * dx) / per(stretch), per(phase))
    is_dark = (coat > per(edge)).unsqueeze(1)
    shade = 1 + 0.05 * (per(sun.cos()) * dx + per(sun.sin()) * dy).clamp(-1, 1)
    creature = torch.where(is_dark, dark.view(n, 3, 1, 1), light.view(n, 3, 1, 1)) * shade.unsqueeze(1)
    mask = inside > 0
    images = torch.where(mask.unsqueeze(1), creature, _ground(n, side, generator))
    return images.clamp(0, 1), mask


def make_creatures(n: int, side: int = 64, seed: int = 0) -> Creatures:
    """Draw n pictures of S x S pixels, classes in turn (picture i shows class i modulo 10); about 1 ms a picture."""
    images = torch.empty(n, 3, side, side, dtype=torch.uint8)
    masks = torch.empty(n, side, side, dtype=torch.bool)
    labels = torch.arange(n) % len(CLASSES)
    for label in range(len(CLASSES)):
        generator = torch.Generator().manual_seed(seed * len(CLASSES) + label)
        for rows in (labels == label).nonzero().squeeze(1).split(100):
            pictures, objects = draw(label, len(rows), side, generator)
            images[rows], masks[rows] = (pictures * 255).round().byte(), objects
    return Creatures(images, labels, masks)
