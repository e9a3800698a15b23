"""Self-attention of [CLS] (Fig. 1 and 3) and of patches (Fig. 8), and masks (Sec. 4.2.2, Fig. 4).

A mask keeps a fraction of the attention's mass, the heaviest patches first:
60 % in Fig. 4, 80 % in appendix D. Fig. 4's number is the Jaccard of the best head's mask.
The best of several heads flatters diffuse maps, so two numbers stand beside it:
the mask of the heads' mean, and the fraction of the attention that falls on the object.

Shapes: B images, O objects of one image, h heads, Q tokens that look, N = r x c patches,
H x W pixels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cls_attention(backbone: nn.Module, images: Tensor) -> Tensor:
    """Return where [CLS] looks in the last block: (B, C, H, W) -> (B, h, r, c)."""
    maps = token_attention(backbone, images, [0])
    return maps[:, :, 0]


@torch.no_grad()
def token_attention(backbone: nn.Module, images: Tensor, tokens: list[int]) -> Tensor:
    """Return where Q tokens look in the last block: (B, C, H, W) -> (B, h, Q, r, c).

    Token 0 is [CLS], and token 1 + i patch i, counted row by row (Fig. 8).
    """
    probs = backbone.get_last_selfattention(images, tokens)  # (B, h, Q, 1 + N)
    patches = probs[..., 1:]  # without what [CLS] gets: maps sum to less than 1
    rows = images.shape[-2] // backbone.patch_size
    return patches.unflatten(-1, (rows, -1))


def keep_mass(attention: Tensor, mass: float) -> Tensor:
    """Return the fewest patches that hold at least `mass` of each map.

    (..., r, c), mass in 0 ... 1 -> bool (..., r, c).
    """
    flat = attention.flatten(-2)
    total = flat.sum(dim=-1, keepdim=True)
    fractions = flat / total
    weights, order = fractions.sort(dim=-1)  # the lightest first
    # the lightest are dropped while their sum is at most 1 - mass
    kept = weights.cumsum(dim=-1) > 1 - mass
    mask = torch.empty_like(kept)
    mask.scatter_(-1, order, kept)  # back to their places
    return mask.view_as(attention)


def to_pixels(patches: Tensor, patch_size: int) -> Tensor:
    """Repeat each patch's value over its pixels: (..., r, c) -> (..., H, W)."""
    rows = patches.repeat_interleave(patch_size, dim=-2)
    return rows.repeat_interleave(patch_size, dim=-1)


def overlay(image: Tensor, mask: Tensor) -> Tensor:
    """Darken what the mask leaves out: (H, W, 3) in 0 ... 1, bool (H, W) -> (H, W, 3)."""
    kept = mask.unsqueeze(-1)
    dark = 0.25 * image
    return torch.where(kept, image, dark)


def jaccard(mask: Tensor, object_mask: Tensor) -> Tensor:
    """Return intersection over union of two bool masks: (..., H, W) -> (...)."""
    both = mask & object_mask
    either = mask | object_mask
    intersection = both.sum(dim=(-2, -1))
    union = either.sum(dim=(-2, -1))
    return intersection / union.clamp(min=1)  # two empty masks: 0


def mass_on_object(attention: Tensor, object_masks: Tensor) -> Tensor:
    """Return the fraction of each map's mass on the object.

    (B, h, r, c), bool (B, H, W) -> (B, h) in 0 ... 1.
    """
    # how much of each patch the object covers: a patch on its border counts in part
    patches = attention.shape[-2:]
    pixels = object_masks.float().unsqueeze(1)
    cover = F.adaptive_avg_pool2d(pixels, patches)
    covered = attention * cover
    on_object = covered.sum(dim=(-2, -1))
    total = attention.sum(dim=(-2, -1))
    return on_object / total.clamp(min=1e-12)  # of a map of zeros: 0


def object_scores(
    attention: Tensor,
    objects: Tensor,
    void: Tensor,
    percents: Sequence[float] = (60, 80),
) -> dict[str, float]:
    """Return one image's scores: attention (h, r, c), objects bool (O, H, W), void bool (H, W).

    mass_on_object, in 0 ... 1: on any of the objects.
    jaccard_best_head_P, in %: each object's best head, mean over the objects.
    jaccard_head_mean_P, in %: the mask of the heads' mean. Void pixels, which nobody labelled
    (VOC's borders of objects), do not count.
    """
    any_object = objects.any(dim=0, keepdim=True)
    on_objects = mass_on_object(attention.unsqueeze(0), any_object)
    scores = {"mass_on_object": on_objects.mean().item()}

    # the authors' protocol: per object the best head, then the mean over objects, then images
    head_mean = attention.mean(dim=0, keepdim=True)
    for name, maps in (("best_head", attention), ("head_mean", head_mean)):
        for percent in percents:
            key = f"jaccard_{name}_{percent:g}"
            scores[key] = best_jaccard(maps, objects, void, percent)
    return scores


def best_jaccard(maps: Tensor, objects: Tensor, void: Tensor, percent: float) -> float:
    """Return the Jaccard in % of each object's best map, mean over the objects.

    maps (h, r, c), objects bool (O, H, W), void bool (H, W); H x W is the masks' own resolution.
    """
    kept = keep_mass(maps, percent / 100)
    kept = kept.float().unsqueeze(0)
    size = objects.shape[-2:]
    # nearest: a pixel takes the value of the patch that it is in
    masks = F.interpolate(kept, size, mode="nearest")
    masks = masks[0].bool() & ~void
    overlap = jaccard(masks, objects.unsqueeze(1))  # (O, h)
    best = overlap.amax(dim=1)
    return 100 * best.mean().item()


def attention_scores(attention: Tensor, object_masks: Tensor) -> dict[str, float]:
    """Return the means of object_scores over images of one object each.

    (B, h, r, c), bool (B, H, W).
    """
    nowhere = torch.zeros_like(object_masks[0])  # no pixel is void
    scores = []
    for maps, mask in zip(attention, object_masks, strict=True):
        scores.append(object_scores(maps, mask.unsqueeze(0), nowhere))

    means = {}
    for name in scores[0]:
        values = [one[name] for one in scores]
        means[name] = sum(values) / len(values)
    return means
