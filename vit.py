"""The Vision Transformer (Sec. 3.2, Table 1): an image is a sequence of patches and a [CLS] token.

There is no classifier: the normalised [CLS] token of the last block is the feature that DINO's head, k-NN and all
evaluations read. Parameter names and shapes are those of the released checkpoints (and of timm's), so their
weights load with strict=True. Positions are learnt on a square grid and interpolated to any other grid exactly as
the release does it; stochastic depth is the release's too. Not in the paper: vit_nano, a network for the classroom,
and init_std: narrow networks learn within minutes only from wider initial weights.

Shapes: B images, C channels, H x W pixels, N patches (within a block tokens: [CLS] is one of them), D width
(embed_dim), h heads, d = D / h.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v: three (B, h, N, d) -> (B, h, N, d)."""
    if q.device.type == "cpu" and (q.dtype == torch.bfloat16 or k.shape[2] <= 64):  # where the fused kernel is slower
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # one plain copy each; matmul would make slower ones
        return attention_probs(q, k) @ v
    return F.scaled_dot_product_attention(q, k, v)


def attention_probs(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)): two (B, h, N, d) -> (B, h, N, N), rows sum to 1."""
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)


class Attention(nn.Module):
    """Multi-head self-attention: (B, N, D) -> (B, N, D); with rows, only the outputs of the first so many tokens."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def queries_keys_values(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (3, B, h, N, d)."""
        return rearrange(self.qkv(x), "B N (three h d) -> three B h N d", three=3, h=self.num_heads)

    def forward(self, x: Tensor, rows: int | None = None) -> Tensor:
        q, k, v = self.queries_keys_values(x)
        return self.proj(rearrange(attend(q[:, :, :rows], k, v), "B h N d -> B N (h d)"))


class Mlp(nn.Module):
    """Two layers with a GELU between, applied to each token: (B, N, D) -> (B, N, D)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth: x + branch(x), but in training a sample skips the branch with chance 1 - keep, and else adds
    it 1 / keep times; with rows, x is added for the first so many tokens only.

    A CPU computes the branch of the samples that take it; a GPU would have to wait for their number, and computes
    all. keep is a tensor, so that blocks with different chances still share one compiled graph.
    """

    def __init__(self, drop: float):
        super().__init__()
        self.register_buffer("keep", torch.tensor(1.0 - drop), persistent=False)

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor], rows: int | None = None) -> Tensor:
        if not self.training:
            return x[:, :rows] + branch(x)
        kept = torch.rand(len(x), device=x.device) < self.keep
        if x.device.type == "cpu" and not kept.all():
            kept = kept.nonzero().squeeze(1)
            added = branch(x.index_select(0, kept)) / self.keep
            return x[:, :rows].index_add(0, kept, added.to(x.dtype))
        return x[:, :rows] + branch(x) * (kept / self.keep).view(-1, 1, 1).to(x.dtype)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); drop_path is the chance that a sample skips a branch, if any.

    (B, N, D) -> (B, N, D); with rows, only the outputs of the first so many tokens, which still look at all.
    """

    def __init__(self, dim: int, num_heads: int, drop_path: float | None = None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = None if drop_path is None else DropPath(drop_path)

    def residual(self, x: Tensor, branch: Callable[[Tensor], Tensor], rows: int | None = None) -> Tensor:
        return self.drop_path(x, branch, rows) if self.drop_path else x[:, :rows] + branch(x)

    def forward(self, x: Tensor, rows: int | None = None) -> Tensor:
        x = self.residual(x, lambda x: self.attn(self.norm1(x), rows), rows)
        return self.residual(x, lambda x: self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Cut into p x p patches and map each linearly to D numbers: (B, C, H, W) -> (B, rows, cols, D).

    That is a convolution of stride p, and its weights are kept as one; cutting first makes it a plain product of
    matrices, which trains faster.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        p, (H, W) = self.patch_size, images.shape[-2:]
        if H % p or W % p or not H or not W:
            nearest = " x ".join(str(max(p, round(side / p) * p)) for side in (H, W))
            raise ValueError(f"an image of {H} x {W} pixels does not divide into patches of {p}: "
                             f"resize it to multiples of {p}, such as {nearest}")
        patches = rearrange(images, "B C (rows y) (cols x) -> B rows cols (C y x)", y=p, x=p)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """images (B, C, H, W), H and W any multiples of patch_size -> normalised [CLS] features (B, D)."""

    def __init__(self, patch_size: int = 16, img_size: int = 224, in_chans: int = 3, drop_path_rate: float = 0.0,
                 embed_dim: int = 384, depth: int = 12, num_heads: int = 6, init_std: float = 0.02):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size {img_size} is no multiple of patch_size {patch_size}")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide the width of {embed_dim}")
        self.embed_dim, self.patch_size, self.init_std = embed_dim, patch_size, init_std
        self.grid = img_size // patch_size  # the positions are learnt on grid x grid patches
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid ** 2, embed_dim))
        rates = [drop_path_rate * i / max(1, depth - 1) for i in range(depth)]  # stochastic depth: rises from 0
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, rate if drop_path_rate else None) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=init_std)
        nn.init.trunc_normal_(self.pos_embed, std=init_std)
        self.apply(self._init_linear)
        if init_std != 0.02:  # at the release's width the patch convolution keeps PyTorch's default, as there
            nn.init.trunc_normal_(self.patch_embed.proj.weight, std=init_std)

    def _init_linear(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=self.init_std)
            nn.init.zeros_(module.bias)

    def positions(self, rows: int, cols: int) -> Tensor:
        """The position embeddings for a grid of rows x cols patches -> (1, 1 + rows * cols, D)."""
        if rows == cols == self.grid:
            return self.pos_embed
        learnt = rearrange(self.pos_embed[:, 1:], "1 (r c) D -> 1 D r c", r=self.grid)
        # paper: bicubic interpolation; release: the scale carries + 0.1, which moves the sampling points slightly
        scale = ((rows + 0.1) / self.grid, (cols + 0.1) / self.grid)
        resized = F.interpolate(learnt, scale_factor=scale, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], rearrange(resized, "1 D r c -> 1 (r c) D")], dim=1)

    def tokens(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, 1 + N, D): [CLS], then the patches row by row, with their positions added."""
        patches = self.patch_embed(images)
        _, rows, cols, _ = patches.shape
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches.flatten(1, 2)], dim=1)
        return x + self.positions(rows, cols)

    def forward(self, images: Tensor) -> Tensor:
        x = self.tokens(images)
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, rows=1)  # [CLS]: nobody reads the patches' last outputs
        return self.norm(x)[:, 0]

    def get_last_selfattention(self, images: Tensor) -> Tensor:
        """The last block's attention probabilities: (B, C, H, W) -> (B, h, 1 + N, 1 + N), rows sum to 1.

        Row 0 is [CLS] looking (Fig. 1, 3 and 10), row 1 + i patch i (Fig. 8).
        """
        x = self.tokens(images)
        for block in self.blocks[:-1]:
            x = block(x)
        q, k, _ = self.blocks[-1].attn.queries_keys_values(self.blocks[-1].norm1(x))
        return attention_probs(q, k)

    def get_intermediate_layers(self, images: Tensor, n: int = 1) -> list[Tensor]:
        """The normalised outputs of the last n blocks, in the order of the blocks: n of (B, 1 + N, D)."""
        if not 1 <= n <= len(self.blocks):
            raise ValueError(f"n = {n} layers asked for, but this network has {len(self.blocks)} blocks")
        x, outputs = self.tokens(images), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i >= len(self.blocks) - n:
                outputs.append(self.norm(x))
        return outputs


def vit_nano(patch_size: int = 8, img_size: int = 64, in_chans: int = 3, drop_path_rate: float = 0.0,
             init_std: float = 0.02, num_heads: int = 4) -> VisionTransformer:
    """0.8 M parameters, for the embedded images: learns on a laptop in minutes. Not in the paper."""
    return VisionTransformer(patch_size, img_size, in_chans, drop_path_rate, 128, 4, num_heads, init_std)


def vit_tiny(patch_size: int = 16, img_size: int = 224, in_chans: int = 3, drop_path_rate: float = 0.0,
             init_std: float = 0.02, num_heads: int = 3) -> VisionTransformer:
    """5.5 M parameters, for small data. Not in the paper."""
    return VisionTransformer(patch_size, img_size, in_chans, drop_path_rate, 192, 12, num_heads, init_std)


def vit_small(patch_size: int = 16, img_size: int = 224, in_chans: int = 3, drop_path_rate: float = 0.0,
              init_std: float = 0.02, num_heads: int = 6) -> VisionTransformer:
    """21 M parameters: Table 1's ViT-S, the paper's workhorse."""
    return VisionTransformer(patch_size, img_size, in_chans, drop_path_rate, 384, 12, num_heads, init_std)


def vit_base(patch_size: int = 16, img_size: int = 224, in_chans: int = 3, drop_path_rate: float = 0.0,
             init_std: float = 0.02, num_heads: int = 12) -> VisionTransformer:
    """85 M parameters: Table 1's ViT-B."""
    return VisionTransformer(patch_size, img_size, in_chans, drop_path_rate, 768, 12, num_heads, init_std)
