"""Networks for other programs, through PyTorch Hub.

    folder = "path/to/this/repository"
    backbone = torch.hub.load(folder, "dino_vits16", source="local")  # the authors' weights
    backbone = torch.hub.load(folder, "dino", source="local", checkpoint="runs/demo/checkpoint.pth")
    features = backbone(images)  # (B, 3, S, S), normalised by ImageNet's mean and std -> (B, D)

The weights of the authors are downloaded once; an incomplete file is refused.
Each network is in evaluation mode, and its parameters take gradients.
"""
from torch import nn

from training.backbone import build_backbone
from training.checkpoint import load_backbone
from training.pretrained import download_pretrained

dependencies = ["torch", "torchvision", "einops"]  # PyTorch Hub looks whether these are installed


def dino_vits16(pretrained: bool = True) -> nn.Module:
    """Return ViT-S/16, with D = 384."""
    return _released("dino_vits16", pretrained, arch="vit_small", patch_size=16)


def dino_vits8(pretrained: bool = True) -> nn.Module:
    """Return ViT-S/8, with D = 384."""
    return _released("dino_vits8", pretrained, arch="vit_small", patch_size=8)


def dino_vits8_300ep(pretrained: bool = True) -> nn.Module:
    """Return ViT-S/8 after 300 epochs, whose attention the paper's figures draw, with D = 384."""
    return _released("dino_vits8_300ep", pretrained, arch="vit_small", patch_size=8)


def dino_vitb16(pretrained: bool = True) -> nn.Module:
    """Return ViT-B/16, with D = 768."""
    return _released("dino_vitb16", pretrained, arch="vit_base", patch_size=16)


def dino_vitb8(pretrained: bool = True) -> nn.Module:
    """Return ViT-B/8, with D = 768."""
    return _released("dino_vitb8", pretrained, arch="vit_base", patch_size=8)


def dino_resnet50(pretrained: bool = True) -> nn.Module:
    """Return ResNet-50 without its classifier, with D = 2048."""
    return _released("dino_resnet50", pretrained, arch="resnet50")


def dino(checkpoint: str, key: str = "teacher", num_heads: int = 0) -> nn.Module:
    """Return the backbone of a checkpoint, of train.py or of another program.

    key is "teacher" or "student". num_heads is for files that do not say it.
    Raises InputError where the file does not fit.
    """
    backbone, _ = load_backbone(checkpoint, key, num_heads=num_heads)
    return backbone.requires_grad_(True)


def _released(name: str, pretrained: bool, **network) -> nn.Module:
    """Return the authors' network of that name, or the same network with random weights."""
    if pretrained:
        return dino(str(download_pretrained(name)))
    return build_backbone(**network).eval()
