"""The [CLS] token's self-attention as a segmentation (Sec. 4.2.2, Fig. 1, 3 and 4).

Masks are obtained by keeping a share of the attention's mass, 60 % in Fig. 4 and 80 % in appendix D, the heaviest
patches first. Fig. 4's number is the Jaccard of the best head's mask with the object. The best of several heads
flatters diffuse maps, so the share of the attention that falls on the object, and the mask of the heads' mean, stand
beside it.

Shapes: B images, O objects of one image, h heads, r x c patches, H x W pixels.
"""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def cls_attention(backbone: nn.Module, images: Tensor) -> Tensor:
    """Where [CLS] looks in the last block: (B, C, H, W) -> (B, h, r, c); what it gives to itself is left out."""
    probs = backbone.get_last_selfattention(images)[:, :, 0, 1:]
    return probs.unflatten(-1, (images.shape[-2] // backbone.patch_size, images.shape[-1] // backbone.patch_size))


def keep_mass(attention: Tensor, mass: float) -> Tensor:
    """The fewest heaviest patches that hold at least `mass` (0 ... 1) of each map: (..., r, c) -> bool (..., r, c)."""
    flat = attention.flatten(-2)
    weights, order = (flat / flat.sum(dim=-1, keepdim=True)).sort(dim=-1)
    kept = weights.cumsum(dim=-1) > 1 - mass  # from the lightest patch on, 1 - mass may go
    return torch.zeros_like(kept).scatter(-1, order, kept).view_as(attention)


def to_pixels(patches: Tensor, patch_size: int) -> Tensor:
    """Repeat each patch's value over its pixels: (..., r, c) -> (..., H, W)."""
    return patches.repeat_interleave(patch_size, dim=-2).repeat_interleave(patch_size, dim=-1)


def jaccard(mask: Tensor, object_mask: Tensor) -> Tensor:
    """Intersection over union of two bool masks: (..., H, W) -> (...)."""
    union = (mask | object_mask).sum(dim=(-2, -1))
    return (mask & object_mask).sum(dim=(-2, -1)) / union.clamp(min=1)


def mass_on_object(attention: Tensor, object_masks: Tensor) -> Tensor:
    """The share of each map's mass that falls on the object: (B, h, r, c), bool (B, H, W) -> (B, h) in 0 ... 1."""
    cover = F.adaptive_avg_pool2d(object_masks.float().unsqueeze(1), attention.shape[-2:])  # of each patch
    return (attention * cover).sum(dim=(-2, -1)) / attention.sum(dim=(-2, -1))


def object_scores(attention: Tensor, objects: Tensor, void: Tensor,
                  percents: Sequence[float] = (60, 80)) -> dict[str, float]:
    """One image's scores: attention (h, r, c), objects bool (O, H, W), void bool (H, W).

    The mass on any of the objects in 0 ... 1. Jaccards in %, without the void pixels, means over the objects: of each
    object's best head, and of the mask of the heads' mean. H x W is the masks' own resolution: a pixel takes the value
    of the patch it is in.
    """
    scores = {"mass_on_object": mass_on_object(attention.unsqueeze(0), objects.any(dim=0, keepdim=True)).mean().item()}
    for percent in percents:
        for name, maps in (("best_head", attention), ("head_mean", attention.mean(dim=0, keepdim=True))):
            patches = keep_mass(maps, percent / 100).float()
            masks = F.interpolate(patches.unsqueeze(0), objects.shape[-2:])[0].bool() & ~void  # to the nearest patch
            overlap = jaccard(masks, objects.unsqueeze(1))  # (O, h)
            scores[f"jaccard_{name}_{percent:g}"] = 100 * overlap.amax(dim=1).mean().item()
    return scores


def attention_scores(attention: Tensor, object_masks: Tensor) -> dict[str, float]:
    """Means of object_scores over B images of one object each: (B, h, r, c), bool (B, H, W)."""
    nowhere = torch.zeros_like(object_masks[0])
    scores = [object_scores(maps, mask.unsqueeze(0), nowhere) for maps, mask in zip(attention, object_masks)]
    return {name: sum(one[name] for one in scores) / len(scores) for name in scores[0]}


def overlay(image: Tensor, mask: Tensor) -> Tensor:
    """The image with the mask's outside darkened: (H, W, 3) in 0 ... 1, bool (H, W) -> (H, W, 3)."""
    return torch.where(mask.unsqueeze(-1), image, 0.25 * image)
