"""The projection head (Sec. 3.1, "Network architecture"; appendix C, Fig. 9): features -> logits.

An MLP leads to a bottleneck, which is l2-normalised, and a linear layer to the K prototypes.
The prototypes are weight-normalised: logit k is g_k times the cosine of the bottleneck and
prototype k, and the gain g_k is 1 while it is frozen.
There is no batch normalisation by default, and no predictor.
Parameter names are those of the released checkpoints: mlp.0.weight ... last_layer.weight_v.

Shapes: B features, D = in_dim, d = bottleneck_dim, K = out_dim prototypes.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DINOHead(nn.Module):
    """Map features (B, D) to logits (B, K).

    nlayers: as Sec. 3.1 and the release count (3); appendix C counts the prototypes too (4).
    use_bn: batch normalisation after each hidden layer.
    norm_last_layer: freeze the prototypes' gain at 1.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int = 65536,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        init_std: float = 0.02,
    ):
        super().__init__()
        if nlayers < 1:
            raise ValueError(f"nlayers is {nlayers}: a head needs at least one layer")

        layers = hidden_layers(in_dim, hidden_dim, nlayers - 1, use_bn)
        width = in_dim if nlayers == 1 else hidden_dim
        layers.append(nn.Linear(width, bottleneck_dim))  # the bottleneck: no activation behind it
        init_linear(layers, init_std)

        self.mlp = nn.Sequential(*layers)
        if nlayers == 1:
            self.mlp = layers[0]  # release: then the name is mlp.weight, not mlp.0.weight
        self.last_layer = PrototypeLayer(bottleneck_dim, out_dim, norm_last_layer)

    def forward(self, features: Tensor) -> Tensor:
        x = self.mlp(features)  # (B, d)
        x = F.normalize(x, dim=-1)  # length 1; without it deep heads collapse (appendix C)
        return self.last_layer(x)


class PrototypeLayer(nn.Module):
    """Map (B, d) to (B, K): x w^T, where row k of w is g_k v_k / ||v_k|| (weight normalisation)."""

    def __init__(self, in_dim: int, out_dim: int, norm_last_layer: bool):
        super().__init__()
        # release: frozen at 1, which is steadier; its ViT-S runs learn it and gain a little
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not norm_last_layer)
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        bound = in_dim**-0.5
        nn.init.uniform_(self.weight_v, -bound, bound)  # release: nn.Linear's default

    def forward(self, x: Tensor) -> Tensor:
        # weight_g * F.normalize(weight_v) in one kernel: 2.5 times as fast at K = 65536
        weight = torch._weight_norm(self.weight_v, self.weight_g, 0)
        return F.linear(x, weight)


def hidden_layers(in_dim: int, hidden_dim: int, number: int, use_bn: bool) -> list[nn.Module]:
    """Return the modules of `number` hidden layers: (B, in_dim) -> (B, hidden_dim)."""
    layers: list[nn.Module] = []
    width = in_dim
    for _ in range(number):
        layers.append(nn.Linear(width, hidden_dim))
        if use_bn:  # paper: not for ViTs, which have none either; release: for convnets
            layers.append(nn.BatchNorm1d(hidden_dim))
        layers.append(nn.GELU())
        width = hidden_dim
    return layers


def init_linear(layers: list[nn.Module], std: float) -> None:
    """Start the linear layers from a truncated normal, their biases from 0."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
