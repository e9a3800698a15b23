"""The projection head (Sec. 3.1, "Network architecture"; appendix C, Fig. 9): features -> logits.

An MLP, an l2-normalised bottleneck, and a linear layer to K prototypes whose rows are weight-normalised. With
the rows' gain frozen at 1 the logits are cosines: of the feature with each prototype. No batch normalisation by
default, and no predictor: these, the number of layers, their activation and the bottleneck are what appendices B and C
try out. Names are the released checkpoints': last_layer.weight_g (gain), last_layer.weight_v.

Shapes: B features, D = in_dim, K = out_dim prototypes.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PrototypeLayer(nn.Module):
    """Weight-normalised linear layer without bias: logits = x (g v / ||v||)^T, row by row; (B, d) -> (B, K)."""

    def __init__(self, in_dim: int, out_dim: int, norm_last_layer: bool):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not norm_last_layer)
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.uniform_(self.weight_v, -in_dim ** -0.5, in_dim ** -0.5)  # nn.Linear's default, as in the release

    def forward(self, x: Tensor) -> Tensor:
        # the kernel of torch's own weight_norm: at K = 65536 the formula by parts takes 2.5 times as long
        return F.linear(x, torch._weight_norm(self.weight_v, self.weight_g, 0))


def mlp(widths: list[int], use_bn: bool, activation: str, init_std: float) -> list[nn.Module]:
    """Linear layers from width to width, batch normalisation and activation (gelu or relu) after each but the last."""
    layers: list[nn.Module] = []
    for width_in, width_out in zip(widths, widths[1:]):
        normalisation = [nn.BatchNorm1d(width_out)] if use_bn else []
        layers += [nn.Linear(width_in, width_out), *normalisation, {"gelu": nn.GELU, "relu": nn.ReLU}[activation]()]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=init_std)
            nn.init.zeros_(layer.bias)
    return layers[:-2 if use_bn else -1]


class DINOHead(nn.Module):
    """features (B, D) -> logits (B, K).

    norm_last_layer freezes the prototypes' gain at 1: steadier, a little lower (release: off for ViT-S, on for the
    rest). use_bn puts batch normalisation after the hidden layers, which the paper does without. nlayers counts as the
    release does; the paper counts the prototypes too, and says one more. l2_bottleneck=False: as many hidden layers,
    and a linear layer with bias on the last of them. A predictor, where a student has one, follows the bottleneck, or
    the last layer where there is none.
    """

    def __init__(self, in_dim: int, out_dim: int = 65536, nlayers: int = 3, hidden_dim: int = 2048,
                 bottleneck_dim: int = 256, use_bn: bool = False, norm_last_layer: bool = True, init_std: float = 0.02,
                 activation: str = "gelu", l2_bottleneck: bool = True):
        super().__init__()
        if nlayers < l2_bottleneck:
            raise ValueError(f"nlayers is {nlayers}: a bottleneck needs at least one layer")
        self.l2_bottleneck, self.predictor = l2_bottleneck, None
        self.projection_dim = bottleneck_dim if l2_bottleneck else out_dim  # what a predictor maps to itself
        if l2_bottleneck:
            layers = mlp([in_dim] + [hidden_dim] * (nlayers - 1) + [bottleneck_dim], use_bn, activation, init_std)
            last_layer = PrototypeLayer(bottleneck_dim, out_dim, norm_last_layer)
        else:
            *layers, last_layer = mlp([in_dim] + [hidden_dim] * nlayers + [out_dim], use_bn, activation, init_std)
        self.mlp = layers[0] if len(layers) == 1 else nn.Sequential(*layers)
        self.last_layer = last_layer

    def forward(self, features: Tensor) -> Tensor:
        x = self.mlp(features) if self.l2_bottleneck else self.last_layer(self.mlp(features))
        if self.predictor:
            x = self.predictor(x)
        return self.last_layer(F.normalize(x, dim=-1)) if self.l2_bottleneck else x
