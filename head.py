"""The projection head (Sec. 3.2, "Network architecture"; appendix C, "Projection head"): features -> logits.

An MLP, an l2-normalised bottleneck, and a linear layer to K prototypes whose rows are weight-normalised. With
the rows' gain frozen at 1 the logits are cosines: of the feature with each prototype. No batch normalisation by
default, and no predictor. Names are the released checkpoints': last_layer.weight_g (gain), last_layer.weight_v.

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


class DINOHead(nn.Module):
    """features (B, D) -> logits (B, K).

    norm_last_layer freezes the prototypes' gain at 1: steadier, a little lower (release: off for ViT-S, on for the
    rest). use_bn puts batch normalisation after the hidden layers, which the paper does without.
    """

    def __init__(self, in_dim: int, out_dim: int = 65536, nlayers: int = 3, hidden_dim: int = 2048,
                 bottleneck_dim: int = 256, use_bn: bool = False, norm_last_layer: bool = True, init_std: float = 0.02):
        super().__init__()
        if nlayers < 1:
            raise ValueError(f"nlayers is {nlayers}: the head needs at least one layer")
        widths = [in_dim] + [hidden_dim] * (nlayers - 1) + [bottleneck_dim]
        layers: list[nn.Module] = []
        for width_in, width_out in zip(widths, widths[1:]):
            layers += [nn.Linear(width_in, width_out)] + [nn.BatchNorm1d(width_out)] * use_bn + [nn.GELU()]
        del layers[-2 if use_bn else -1:]  # the bottleneck has neither normalisation nor activation
        self.mlp = layers[0] if nlayers == 1 else nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=init_std)
                nn.init.zeros_(layer.bias)
        self.last_layer = PrototypeLayer(bottleneck_dim, out_dim, norm_last_layer)

    def forward(self, features: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(features), dim=-1))
