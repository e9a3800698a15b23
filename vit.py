"""The Vision Transformer (Sec. 3.2, Table 1): an image is a sequence of patches and a [CLS] token.

There is no classifier: the normalised [CLS] token of the last block is the feature.
Parameter names and shapes are those of the released checkpoints, and of timm's.
Not in the paper: vit_nano and vit_tiny, for small data, and init_std, since narrow networks start
too slowly from weights of standard deviation 0.02.

Shapes: B images, C channels, H x W pixels, N patches, T = 1 + N tokens, D = embed_dim,
h heads, d = D / h.
"""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)  # one product for queries, keys and values
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, queries: int | None = None) -> Tensor:
        """Map (B, T, D) to (B, T, D); queries: compute that many outputs, the first ones."""
        q, k, v = self.queries_keys_values(x)
        q = q[:, :, :queries]  # queries do not affect one another: each looks at all tokens
        x = F.scaled_dot_product_attention(q, k, v)  # softmax(q k^T / sqrt(d)) v
        return self.proj(rearrange(x, "B h T d -> B T (h d)"))

    def queries_keys_values(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (3, B, h, T, d)."""
        qkv = self.qkv(x)
        return rearrange(qkv, "B T (three h d) -> three B h T d", three=3, h=self.num_heads)

    def probs(self, x: Tensor, rows: list[int] | None = None) -> Tensor:
        """Return the attention itself: (B, T, D) -> (B, h, T or len(rows), T), rows sum to 1.

        The fused kernel above never holds this matrix; figures need it.
        """
        q, k, _ = self.queries_keys_values(x)
        if rows is not None:
            q = q[:, :, rows]
        return attention_probs(q, k)


def attention_probs(q: Tensor, k: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)): (B, h, M, d), (B, h, T, d) -> (B, h, M, T)."""
    # without the scale the products spread as sqrt(d), and the softmax saturates
    scale = q.shape[-1] ** -0.5
    return (q @ k.transpose(-2, -1) * scale).softmax(dim=-1)


class Mlp(nn.Module):
    """Two layers applied to each token by itself: (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth: in training, a sample skips the branch with probability `rate`."""

    def __init__(self, rate: float):
        super().__init__()
        # a buffer, not a float: torch.compile then makes one graph for all blocks, not one for each
        self.register_buffer("keep", torch.tensor(1.0 - rate), persistent=False)

    def forward(self, branch: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        if not self.training:
            return branch
        # one draw per sample: a branch is kept whole or not at all
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) < self.keep
        return branch * (kept / self.keep)  # divided by keep, so that the mean stays


class Block(nn.Module):
    """Attention between the tokens, then an MLP on each; both are added to what comes in."""

    def __init__(self, dim: int, num_heads: int, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)  # release: 1e-6, where PyTorch has 1e-5
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def forward_cls(self, x: Tensor) -> Tensor:
        """Return the [CLS] row of forward alone: (B, T, D) -> (B, 1, D).

        For the last block: the head reads no patch.
        """
        cls = x[:, :1]
        cls = cls + self.drop_path(self.attn(self.norm1(x), queries=1))  # it looks at all tokens
        return cls + self.drop_path(self.mlp(self.norm2(cls)))


class PatchEmbed(nn.Module):
    """Map each p x p patch linearly to D numbers: (B, C, H, W) -> (B, rows, cols, D).

    Raises ValueError for a size that does not divide into patches.
    """

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.patch_size = patch_size
        # a convolution whose stride is its width is one linear layer on each patch
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        self.check_size(*images.shape[-2:])
        return rearrange(self.proj(images), "B D rows cols -> B rows cols D")

    def check_size(self, H: int, W: int) -> None:
        """Raise ValueError if p does not divide H and W: the convolution would cut a border off."""
        p = self.patch_size
        if H % p == 0 and W % p == 0 and H > 0 and W > 0:
            return
        rows = max(1, round(H / p))
        cols = max(1, round(W / p))
        raise ValueError(
            f"an image of {H} x {W} pixels does not divide into patches of {p}: "
            f"resize it to multiples of {p}, such as {rows * p} x {cols * p}"
        )


class VisionTransformer(nn.Module):
    """Map images (B, C, H, W), H and W any multiples of patch_size, to features (B, D)."""

    def __init__(
        self,
        patch_size: int = 16,
        img_size: int = 224,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        init_std: float = 0.02,
    ):
        super().__init__()
        if img_size % patch_size:
            raise ValueError(f"img_size {img_size} is no multiple of patch_size {patch_size}")
        if embed_dim % num_heads:
            raise ValueError(f"num_heads {num_heads} does not divide the width of {embed_dim}")
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.grid = img_size // patch_size  # the positions are learnt on grid x grid patches

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, embed_dim))
        self.blocks = nn.ModuleList()
        for i in range(depth):
            rate = drop_path_rate * i / max(1, depth - 1)  # linear from 0 (stochastic depth)
            self.blocks.append(Block(embed_dim, num_heads, rate))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.init_weights(init_std)

    def init_weights(self, std: float) -> None:
        """Start from a truncated normal; biases start from 0."""
        nn.init.trunc_normal_(self.cls_token, std=std)
        nn.init.trunc_normal_(self.pos_embed, std=std)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                nn.init.zeros_(module.bias)
        # release: at its std, 0.02, the patch convolution keeps PyTorch's default start
        if std != 0.02:
            nn.init.trunc_normal_(self.patch_embed.proj.weight, std=std)

    def forward(self, images: Tensor) -> Tensor:
        x = self.before_last_block(images)
        # as if the last block were one more x = block(x), of which [CLS] alone is computed
        cls = self.blocks[-1].forward_cls(x)
        return self.norm(cls)[:, 0]

    def before_last_block(self, images: Tensor) -> Tensor:
        """Return what enters the last block: (B, C, H, W) -> (B, 1 + N, D)."""
        x = self.tokens(images)
        for block in self.blocks[:-1]:
            x = block(x)
        return x

    def tokens(self, images: Tensor) -> Tensor:
        """Return [CLS], then the patches row by row: (B, C, H, W) -> (B, 1 + N, D)."""
        patches = self.patch_embed(images)
        B, rows, cols, _ = patches.shape
        cls = self.cls_token.expand(B, -1, -1)
        x = torch.cat([cls, patches.flatten(1, 2)], dim=1)
        # without positions attention could not tell where a patch was
        # int: under torch.jit.trace rows and cols are tensors
        return x + self.positions(int(rows), int(cols))

    def positions(self, rows: int, cols: int) -> Tensor:
        """Return the positions of rows x cols patches: (1, 1 + rows * cols, D).

        Any grid but the learnt one is interpolated, so that local crops need no positions of
        their own.
        """
        if rows == cols == self.grid:
            return self.pos_embed
        cls = self.pos_embed[:, :1]
        learnt = rearrange(self.pos_embed[:, 1:], "1 (r c) D -> 1 D r c", r=self.grid)
        # paper: bicubic; release: + 0.1, so that rounding loses no row; it shifts the sampling
        # points slightly
        scale = ((rows + 0.1) / self.grid, (cols + 0.1) / self.grid)
        resized = F.interpolate(learnt, scale_factor=scale, mode="bicubic")
        return torch.cat([cls, rearrange(resized, "1 D r c -> 1 (r c) D")], dim=1)

    def get_last_selfattention(self, images: Tensor, rows: list[int] | None = None) -> Tensor:
        """Return the last block's attention: (B, C, H, W) -> (B, h, 1 + N, 1 + N), rows sum to 1.

        Row 0 is [CLS] looking (Fig. 1, 3 and 10), row 1 + i patch i (Fig. 8).
        rows: these alone, since large images have large matrices.
        """
        last = self.blocks[-1]
        x = self.before_last_block(images)
        return last.attn.probs(last.norm1(x), rows)

    def get_intermediate_layers(self, images: Tensor, n: int = 1) -> list[Tensor]:
        """Return the normalised outputs of the last n blocks: n of (B, 1 + N, D)."""
        if not 1 <= n <= len(self.blocks):
            raise ValueError(
                f"n = {n} layers asked for, but this network has {len(self.blocks)} blocks"
            )
        x = self.tokens(images)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return [self.norm(x) for x in outputs[-n:]]  # release: one norm for all of them


def vit_nano(patch_size: int = 8, **sizes) -> VisionTransformer:
    """0.8 M parameters: learns on a laptop in minutes. Not in the paper."""
    nano = {"img_size": 64, "embed_dim": 128, "depth": 4, "num_heads": 4}
    return VisionTransformer(patch_size, **nano | sizes)


def vit_tiny(patch_size: int = 16, **sizes) -> VisionTransformer:
    """5.5 M parameters, for small data. Not in the paper."""
    tiny = {"embed_dim": 192, "depth": 12, "num_heads": 3}
    return VisionTransformer(patch_size, **tiny | sizes)


def vit_small(patch_size: int = 16, **sizes) -> VisionTransformer:
    """21 M parameters: Table 1's ViT-S, the paper's workhorse."""
    small = {"embed_dim": 384, "depth": 12, "num_heads": 6}
    return VisionTransformer(patch_size, **small | sizes)


def vit_base(patch_size: int = 16, **sizes) -> VisionTransformer:
    """85 M parameters: Table 1's ViT-B."""
    base = {"embed_dim": 768, "depth": 12, "num_heads": 12}
    return VisionTransformer(patch_size, **base | sizes)
