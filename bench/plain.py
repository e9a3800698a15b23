"""Each part as a textbook writes it, without a thought of speed: what the bench measures ours against.

Pillow's augmentations, a ViT that takes every token through every block with explicit attention, a loss that loops
over the pairs of views, and a clipping, an optimiser and a teacher that go from tensor to tensor, as in the authors'
release. They compute the same as ours, the blur and the random draws apart: tests/test_bench.py compares them.

Shapes: B images, V views, N patches, D width, h heads, d = D / h, K prototypes.
"""
import copy
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.utils.data import Dataset
from torchvision import transforms

from loss import DINOLoss
from multicrop import MultiCropNetwork
from optimizer import parameter_groups
from runtime.augment import IMAGENET_MEAN, IMAGENET_STD
from runtime.hardware import World
from train import Schedules
from vit import Attention, VisionTransformer


def blur(image: Image.Image) -> Image.Image:
    """Pillow's Gaussian, which is three box blurs."""
    return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


class PlainCrops:
    """Multi-crop by torchvision's stock transforms on Pillow images: image -> V float tensors (3, S, S)."""

    def __init__(self, global_size: int = 224, local_size: int = 96, local_number: int = 8):
        bicubic = transforms.InterpolationMode.BICUBIC

        def view(size: int, scale: tuple[float, float], blur_chance: float, solarize_chance: float):
            return transforms.Compose([
                transforms.RandomResizedCrop(size, scale, interpolation=bicubic),
                transforms.RandomHorizontalFlip(),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
                transforms.RandomGrayscale(0.2),
                transforms.RandomApply([blur], blur_chance),
                transforms.RandomApply([ImageOps.solarize], solarize_chance),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

        self.views = [view(global_size, (0.4, 1.0), 1.0, 0.0), view(global_size, (0.4, 1.0), 0.1, 0.2),
                      *[view(local_size, (0.05, 0.4), 0.5, 0.0)] * local_number]

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [view(image) for view in self.views]


class PlainImages(Dataset):
    """The crops of each image file."""

    def __init__(self, files: Sequence[Path], crops: PlainCrops):
        self.files, self.crops = files, crops

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> list[Tensor]:
        with Image.open(self.files[index]) as image:
            return self.crops(image.convert("RGB"))


class PlainAttention(Attention):
    """softmax(q k^T / sqrt(d)) v with the (N, N) matrix in memory."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "B N (three h d) -> three B h N d", three=3, h=self.num_heads)
        probs = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.proj(rearrange(probs @ v, "B h N d -> B N (h d)"))


class PlainVisionTransformer(VisionTransformer):
    """All tokens through all blocks and the last normalisation, and then the first is taken."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.tokens(images)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]


PLAIN = {Attention: PlainAttention, VisionTransformer: PlainVisionTransformer}


def plain_copy(network: nn.Module) -> nn.Module:
    """The same weights in the plain classes; the head, and a convnet, compute as they do."""
    network = copy.deepcopy(network)
    for module in network.modules():
        module.__class__ = PLAIN.get(type(module), type(module))
    return network


class PlainLoss(DINOLoss):
    """Eq. 3 as a double loop over the pairs of views: logits (V * B, K), (2 * B, K) -> scalar, in nats."""

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        B = len(teacher_logits) // 2
        students = (student_logits.float() / self.student_temp).split(B)
        teachers = ((teacher_logits.detach().float() - self.center) / teacher_temp).softmax(dim=-1).split(B)
        losses = [-(teacher * student.log_softmax(dim=-1)).sum(dim=-1).mean()
                  for t, teacher in enumerate(teachers) for v, student in enumerate(students) if t != v]
        return sum(losses) / len(losses)


def plain_clip_gradients(student: nn.Module, max_norm: float) -> None:
    """Each tensor's gradient down to max_norm, decided in Python: a GPU's queue is waited for each time."""
    for param in student.parameters():
        if param.grad is not None:
            scale = max_norm / (param.grad.norm().item() + 1e-6)
            if scale < 1:
                param.grad.mul_(scale)


def plain_optimizer(student: nn.Module) -> Optimizer:
    """AdamW one tensor after the other, decaying what ours decays."""
    return AdamW(parameter_groups(student), lr=0.0, foreach=False, fused=False)


@torch.no_grad()
def plain_update_teacher(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """theta_t <- lambda theta_t + (1 - lambda) theta_s as it reads, with a copy of every weight."""
    for student_param, teacher_param in zip(student.parameters(), teacher.parameters(), strict=True):
        teacher_param.mul_(momentum).add_((1 - momentum) * student_param)


def plain_step(student: MultiCropNetwork, teacher: MultiCropNetwork, dino_loss: PlainLoss, optimizer: Optimizer,
               crops: list[Tensor], values: Schedules, clip_grad: float, world: World) -> float:
    """Algorithm 1 from the plain parts: V crops (B, 3, S, S) -> loss in nats."""
    with world.autocast():
        with torch.no_grad():
            teacher_logits = teacher(crops[:2])
        student_logits = student(crops)
    loss = dino_loss(student_logits, teacher_logits, values.teacher_temp)
    loss.backward()
    plain_clip_gradients(student, clip_grad)
    for group in optimizer.param_groups:
        group.update(lr=values.lr, weight_decay=values.weight_decay * group["decays"])
    optimizer.step()
    optimizer.zero_grad()
    plain_update_teacher(student, teacher, values.teacher_momentum)
    dino_loss.update_center(teacher_logits)
    return loss.item()


def plain_knn(train_features: Tensor, train_labels: Tensor, test_features: Tensor, num_classes: int) -> Tensor:
    """The votes of the 20 nearest, through a one-hot vector for each neighbour, a hundredth at a time.

    features (m, D) and labels (m,) of those that vote, features (n, D) of those asked -> (n, num_classes).
    """
    train_features, votes = F.normalize(train_features, dim=1), []
    for rows in F.normalize(test_features, dim=1).chunk(100):
        cosines, nearest = (rows @ train_features.T).topk(20, dim=1)
        one_hot = F.one_hot(train_labels[nearest], num_classes)
        votes.append((one_hot * (cosines / 0.07).exp().unsqueeze(-1)).sum(dim=1))
    return torch.cat(votes)
