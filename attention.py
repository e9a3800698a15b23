"""The [CLS] token's self-attention as a segmentation (Sec. 4.2.2, Fig. 1, 3 and 4).

Masks are obtained by keeping a share of the attention's mass, the heaviest patches first. Fig. 4's number is the
Jaccard of the best head's mask with the object. The best of several heads flatters diffuse maps, so the share of
the attention that falls on the object, and the mask of the heads' mean, stand beside it.

Shapes: B pictures, h heads, r x c patches, H x W pixels.
"""
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


def attention_scores(attention: Tensor, object_masks: Tensor, patch_size: int) -> dict[str, float]:
    """Means over the pictures: mass on the object in 0 ... 1; Jaccards in % of the best head and of the heads' mean."""
    scores = {"mass_on_object": mass_on_object(attention, object_masks).mean().item()}
    objects = object_masks.unsqueeze(1)
    for percent in (60, 80):
        for name, maps in (("best_head", attention), ("head_mean", attention.mean(dim=1, keepdim=True))):
            overlap = jaccard(to_pixels(keep_mass(maps, percent / 100), patch_size), objects)
            scores[f"jaccard_{name}_{percent}"] = 100 * overlap.amax(dim=1).mean().item()
    return scores
