"""The backbones by name: our ViTs, and any classification network of torchvision with its classifier taken off."""
import torchvision
from torch import nn

import vit
from commandline import InputError

VITS = {"vit_nano": vit.vit_nano, "vit_tiny": vit.vit_tiny, "vit_small": vit.vit_small, "vit_base": vit.vit_base}


def build_backbone(arch: str, patch_size: int = 16, img_size: int = 224, **vit_options) -> nn.Module:
    """images -> features (B, D), with D as .embed_dim; raises InputError for an unknown arch.

    img_size and vit_options (in_chans, drop_path_rate, init_std) concern ViTs: a convnet is torchvision's as it is.
    """
    if arch in VITS:
        return VITS[arch](patch_size, img_size, **vit_options)
    if arch not in torchvision.models.list_models(module=torchvision.models):
        raise InputError(f"--arch {arch} is unknown: choose one of {', '.join(VITS)}, or a convnet of torchvision "
                         "such as resnet50")
    backbone = torchvision.models.get_model(arch, weights=None)
    linears = [(name, module) for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    name, classifier = linears[-1]
    parent, _, child = name.rpartition(".")
    setattr(backbone.get_submodule(parent), child, nn.Identity())
    backbone.embed_dim = classifier.in_features
    return backbone
