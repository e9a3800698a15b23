"""The backbones by name (Table 1): our ViTs, and torchvision's ResNets without their classifier."""

import torchvision
from torch import nn

import vit
from runtime.commandline import InputError
from settings import RESNETS

VITS = {
    "vit_nano": vit.vit_nano,
    "vit_tiny": vit.vit_tiny,
    "vit_small": vit.vit_small,
    "vit_base": vit.vit_base,
}


def build_backbone(
    arch: str, patch_size: int = 16, img_size: int = 224, num_heads: int = 0, **sizes
) -> nn.Module:
    """Return a network: images (B, 3, S, S) -> features (B, D), D is its .embed_dim.

    All arguments but arch are a ViT's; num_heads = 0 leaves the arch's own.
    Raises InputError for an unknown arch, and for heads that do not divide the width.
    """
    if arch in VITS:
        if num_heads:
            sizes["num_heads"] = num_heads
        try:
            return VITS[arch](patch_size, img_size=img_size, **sizes)
        except ValueError as error:
            raise InputError(f"--arch {arch} cannot be built: {error}") from None

    if arch in RESNETS:
        backbone = torchvision.models.get_model(arch, weights=None)
        backbone.embed_dim = backbone.fc.in_features
        backbone.fc = nn.Identity()
        return backbone

    raise InputError(f"--arch {arch} is unknown: choose one of {', '.join([*VITS, *RESNETS])}")
