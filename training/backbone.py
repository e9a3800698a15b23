"""The backbones by name (Table 1): our ViTs, and any classifier of torchvision, ResNet-50 among them, without its last
layer. B images, D width."""
import torchvision
from torch import nn

import vit
from runtime.commandline import InputError

VITS = {"vit_nano": vit.vit_nano, "vit_tiny": vit.vit_tiny, "vit_small": vit.vit_small, "vit_base": vit.vit_base}
# torchvision's transformers take one image size only, and these two return more than features in training
NO_CONVNETS = set(torchvision.models.list_models(torchvision.models, include=["vit_*", "swin*", "maxvit*"])) | {
    "googlenet", "inception_v3"}


def is_arch(name: str) -> bool:
    """Whether build_backbone knows this name."""
    convnets = set(torchvision.models.list_models(module=torchvision.models)) - NO_CONVNETS
    return name in VITS or name in convnets


def build_backbone(arch: str, patch_size: int = 16, img_size: int = 224, num_heads: int = 0,
                   **vit_options) -> nn.Module:
    """images -> features (B, D), with D as .embed_dim; raises InputError for an unknown arch, or heads that do not fit.

    img_size, num_heads (0: the arch's own) and vit_options (in_chans, drop_path_rate, init_std) concern ViTs: a convnet
    is torchvision's as it is.
    """
    if arch in VITS:
        try:
            if num_heads:
                vit_options["num_heads"] = num_heads
            return VITS[arch](patch_size, img_size=img_size, **vit_options)
        except ValueError as error:
            raise InputError(f"--arch {arch} cannot be built: {error}") from None
    if not is_arch(arch):
        raise InputError(f"--arch {arch} is unknown: choose one of {', '.join(VITS)}, or a convnet of torchvision")
    backbone = torchvision.models.get_model(arch, weights=None)
    linears = [(name, module) for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if not linears:
        raise InputError(f"--arch {arch} has no linear classifier to take off: choose another convnet")
    name, classifier = linears[-1]
    parent, _, child = name.rpartition(".")
    setattr(backbone.get_submodule(parent), child, nn.Identity())
    backbone.embed_dim = classifier.in_features
    return backbone
