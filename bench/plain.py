"""What stock code looks like: the other side of the bench's ratios.

Torchvision's transforms on Pillow images, attention whose matrix stands in memory, a last block
that computes tokens which nobody reads, a log-softmax for each pair of views, AdamW tensor by
tensor, a teacher moved by mul and add, and a k-NN vote over one-hot labels.
The authors' release has these forms too. Head and clipping are those of the files on top.
Each part computes what ours computes, the blur and the random draws apart (tests/test_bench.py).

Shapes: B images, V views, S the side of a view, T tokens, D width, h heads, d = D / h,
K prototypes, N train and n test images, C classes.
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms

from loss import DINOLoss
from optimizer import parameter_groups
from settings import IMAGENET_MEAN, IMAGENET_STD
from vit import Attention, VisionTransformer, attention_probs


def blur(image: Image.Image) -> Image.Image:
    """Blur by Pillow's Gaussian, which is three box blurs; sigma in pixels."""
    sigma = random.uniform(0.1, 2.0)
    return image.filter(ImageFilter.GaussianBlur(sigma))


def view(size: int, scale: tuple[float, float], blur_chance: float, solarize_chance: float):
    """Return the transform of one view: image -> normalised float (3, S, S)."""
    bicubic = transforms.InterpolationMode.BICUBIC
    jitter = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    return transforms.Compose([
        transforms.RandomResizedCrop(size, scale, interpolation=bicubic),
        transforms.RandomHorizontalFlip(),
        transforms.RandomApply([jitter], 0.8),
        transforms.RandomGrayscale(0.2),
        transforms.RandomApply([blur], blur_chance),
        transforms.RandomApply([ImageOps.solarize], solarize_chance),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ])


class PlainCrops:
    """Multi-crop: a Pillow image -> V views (3, S, S), the two global ones first."""

    def __init__(self, global_size: int = 224, local_size: int = 96, local_number: int = 8):
        global_1 = view(global_size, (0.4, 1.0), 1.0, 0.0)
        global_2 = view(global_size, (0.4, 1.0), 0.1, 0.2)
        local = view(local_size, (0.05, 0.4), 0.5, 0.0)
        self.views = [global_1, global_2, *[local] * local_number]

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [transform(image) for transform in self.views]


class PlainImages(Dataset):
    """The crops of each image file."""

    def __init__(self, files: list[Path], crops: PlainCrops):
        self.files = files
        self.crops = crops

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> list[Tensor]:
        with Image.open(self.files[index]) as image:
            return self.crops(image.convert("RGB"))


class PlainAttention(nn.Module):
    """Self-attention by its formula: the matrix of each head stands in memory."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, D) to (B, T, D)."""
        q, k, v = self.attention.queries_keys_values(x)
        probs = attention_probs(q, k)  # (B, h, T, T)
        return self.attention.proj(rearrange(probs @ v, "B h T d -> B T (h d)"))


class PlainViT(nn.Module):
    """A ViT with PlainAttention, whose last block computes all tokens, read or not."""

    def __init__(self, vit: VisionTransformer):
        super().__init__()
        for block in vit.blocks:
            block.attn = PlainAttention(block.attn)
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        """Return the features: (B, 3, S, S) -> (B, D)."""
        tokens = self.vit.get_intermediate_layers(images, n=1)[0]
        return tokens[:, 0]


class PlainLoss(DINOLoss):
    """Eq. 1 to 3, with a log-softmax for each pair of views instead of one for each view."""

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float
    ) -> Tensor:
        """Return the mean cross-entropy: (V * B, K), (2 * B, K) -> scalar."""
        p_teacher = self.teacher_probs(teacher_logits.detach().float(), teacher_temp)
        student_views = (student_logits.float() / self.student_temp).split(len(p_teacher) // 2)
        pairs = []
        for teacher_view, p in enumerate(p_teacher.chunk(2)):
            for student_view, logits in enumerate(student_views):
                if student_view != teacher_view:
                    pairs.append(-(p * logits.log_softmax(dim=-1)).sum(dim=-1).mean())
        return sum(pairs) / len(pairs)


def plain_optimizer(student: nn.Module) -> torch.optim.Optimizer:
    """Return an AdamW that goes from tensor to tensor, and decays what ours decays."""
    return torch.optim.AdamW(parameter_groups(student), lr=0.0, foreach=False, fused=False)


@torch.no_grad()
def plain_update_teacher(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """Move each parameter: theta_t <- lambda theta_t + (1 - lambda) theta_s, lambda = momentum."""
    pairs = zip(student.parameters(), teacher.parameters(), strict=True)
    for student_param, teacher_param in pairs:
        change = (1 - momentum) * student_param  # a copy of every weight
        teacher_param.mul_(momentum).add_(change)


def plain_knn(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, num_classes: int
) -> Tensor:
    """Return the votes of the 20 nearest train images: (N, D), (N,), (n, D) -> (n, C)."""
    train_features = F.normalize(train_features, dim=1)
    test_features = F.normalize(test_features, dim=1)
    votes = []
    for rows in test_features.chunk(100):
        cosines, nearest = (rows @ train_features.T).topk(20, dim=1)
        weights = (cosines / 0.07).exp().unsqueeze(-1)
        one_hot = F.one_hot(train_labels[nearest], num_classes)  # a vector for each neighbour
        votes.append((one_hot * weights).sum(dim=1))
    return torch.cat(votes)
