"""How fast each part is, beside a plain textbook version of it, in this machine's own numbers.

    python bench.py                                      # ViT-S/16, 2 x 224 + 8 x 96, K = 65536, batch 4
    python bench.py --parts step --arch vit_nano --patch_size 8 --precision bf16

Both versions of a part take turns in one process, so that a drifting machine treats them alike; the ratio is the
median of the turns' ratios. The plain versions below are how one writes the part without thinking of speed; they
compute the same (the blur and the random draws of the crops apart), and the tests compare them.
"""
import argparse
import io
import json
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms.functional import to_pil_image

import hardware
from backbone import VITS, build_backbone
from commandline import CommandLine, InputError, errors_in_one_line
from creatures import make_creatures
from data import decode
from eval_knn import knn_votes, nearest_neighbours
from hardware import Hardware
from head import DINOHead
from loss import DINOLoss
from multicrop import IMAGENET_MEAN, IMAGENET_STD, MultiCrop, MultiCropNetwork
from optimizer import clip_gradients, make_optimizer, parameter_groups
from teacher import make_teacher, update_teacher
from train import StepValues, train_step

VALUES = StepValues(lr=1e-4, weight_decay=0.04, teacher_momentum=0.996, teacher_temp=0.04)


class PlainCrops:
    """Multi-crop by torchvision's and Pillow's own operations, on Pillow pictures."""

    def __init__(self, local_number: int = 8):
        recolour = [transforms.RandomHorizontalFlip(),
                    transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                    transforms.RandomGrayscale(0.2)]
        finish = [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
        blur = lambda chance: [lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
                               if random.random() < chance else image]
        crop = lambda size, scale: transforms.RandomResizedCrop(
            size, scale, interpolation=transforms.InterpolationMode.BICUBIC)
        solarize = [lambda image: ImageOps.solarize(image) if random.random() < 0.2 else image]
        local = transforms.Compose([crop(96, (0.05, 0.4)), *recolour, *blur(0.5), *finish])
        self.views = [transforms.Compose([crop(224, (0.4, 1.0)), *recolour, *blur(1.0), *finish]),
                      transforms.Compose([crop(224, (0.4, 1.0)), *recolour, *blur(0.1), *solarize, *finish]),
                      *[local] * local_number]

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [view(image) for view in self.views]


class PlainLoss(DINOLoss):
    """Eq. 3 as a double loop over the pairs of views."""

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        B = len(teacher_logits) // 2
        students = (student_logits.float() / self.student_temp).split(B)
        teachers = ((teacher_logits.detach().float() - self.center) / teacher_temp).softmax(dim=-1).split(B)
        losses = [-(teacher * student.log_softmax(dim=-1)).sum(dim=-1).mean()
                  for t, teacher in enumerate(teachers) for v, student in enumerate(students) if t != v]
        return sum(losses) / len(losses)


class PlainBackbone(nn.Module):
    """A ViT that computes all tokens in all blocks, and then takes the first."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone.get_intermediate_layers(images)[0][:, 0]


@torch.no_grad()
def plain_update_teacher(student: nn.Module, teacher: nn.Module, momentum: float) -> None:
    """The teacher's average as the formula reads."""
    for student_param, teacher_param in zip(student.parameters(), teacher.parameters(), strict=True):
        teacher_param.copy_(momentum * teacher_param + (1 - momentum) * student_param)


def plain_knn(train_features: Tensor, train_labels: Tensor, test_features: Tensor, num_classes: int) -> Tensor:
    """The votes of the 20 nearest, through a one-hot vector for each neighbour, 100 pictures at a time."""
    train_features, votes = F.normalize(train_features, dim=1), []
    for rows in F.normalize(test_features, dim=1).chunk(100):
        cosines, nearest = (rows @ train_features.T).topk(20, dim=1)
        one_hot = F.one_hot(train_labels[nearest], num_classes)
        votes.append((one_hot * (cosines / 0.07).exp().unsqueeze(-1)).sum(dim=1))
    return torch.cat(votes)


def plain_step(student: MultiCropNetwork, teacher: MultiCropNetwork, dino_loss: PlainLoss,
               optimizer: torch.optim.Optimizer, crops: list[Tensor], where: Hardware) -> None:
    """Algorithm 1 from the plain parts."""
    with where.autocast():
        with torch.no_grad():
            teacher_logits = teacher(crops[:2])
        student_logits = student(crops)
    dino_loss(student_logits, teacher_logits, VALUES.teacher_temp).backward()
    clip_gradients(student, 3.0)
    optimizer.step()
    optimizer.zero_grad()
    plain_update_teacher(student, teacher, VALUES.teacher_momentum)
    dino_loss.update_center(teacher_logits)


def make_crops(flags: argparse.Namespace, where: Hardware) -> tuple[Callable, Callable]:
    """Decode a JPEG of 400 x 533 pixels (or --image_path) and make its crops: pictures."""
    if flags.image_path:
        jpeg = decode(flags.image_path)
    else:
        jpeg = make_creatures(4, side=533).images[3][:, :400]
    file = io.BytesIO()
    to_pil_image(jpeg).save(file, "JPEG", quality=90)
    crops, plain_crops = MultiCrop(), PlainCrops()
    return (lambda: crops(decode(file.getvalue()))), (lambda: plain_crops(Image.open(file).convert("RGB")))


def make_loss(flags: argparse.Namespace, where: Hardware) -> tuple[Callable, Callable]:
    """Forward and backward of the loss for batch_size pictures."""
    crops = 2 + flags.local_crops_number
    student = torch.randn(crops * flags.batch_size, flags.out_dim, device=where.device).requires_grad_()
    teacher = torch.randn(2 * flags.batch_size, flags.out_dim, device=where.device) / 10
    losses = [kind(flags.out_dim).to(where.device) for kind in (DINOLoss, PlainLoss)]
    if flags.compile:
        hardware.compile_hot_path(losses[:1], "true", where)

    def forward_and_backward(dino_loss: nn.Module) -> None:
        student.grad = None
        dino_loss(student, teacher, VALUES.teacher_temp).backward()

    return tuple(lambda each=each: forward_and_backward(each) for each in losses)


def make_network(flags: argparse.Namespace) -> MultiCropNetwork:
    """The same weights at each call."""
    torch.manual_seed(0)
    backbone = build_backbone(flags.arch, flags.patch_size, flags.global_crops_size)
    return MultiCropNetwork(backbone, DINOHead(backbone.embed_dim, flags.out_dim))


def plain_optimizer(student: nn.Module) -> torch.optim.Optimizer:
    """AdamW one tensor after the other, decaying what ours decays."""
    decaying, others = parameter_groups(student)
    decaying["weight_decay"] = VALUES.weight_decay
    return torch.optim.AdamW([decaying, others], lr=VALUES.lr, foreach=False)


def make_ema(flags: argparse.Namespace, where: Hardware) -> tuple[Callable, Callable]:
    """The teacher's average over backbone and head."""
    student = make_network(flags).to(where.device)
    teacher = make_teacher(student)
    momentum = VALUES.teacher_momentum
    return lambda: update_teacher(student, teacher, momentum), lambda: plain_update_teacher(student, teacher, momentum)


def make_knn(flags: argparse.Namespace, where: Hardware) -> tuple[Callable, Callable]:
    """Votes for 2,000 pictures among 50,000 of 1,000 classes, 384 features each."""
    train_features, test_features = torch.randn(50_000, 384), torch.randn(2_000, 384)
    labels = torch.randint(1000, (50_000,))

    def ours() -> Tensor:
        cosines, nearest = nearest_neighbours(train_features, test_features, 20)
        return knn_votes(cosines, labels[nearest], 1000)

    return ours, lambda: plain_knn(train_features, labels, test_features, 1000)


def make_step(flags: argparse.Namespace, where: Hardware) -> tuple[Callable, Callable]:
    """A whole training step on crops that are there already."""
    sizes = [flags.global_crops_size] * 2 + [flags.local_crops_size] * flags.local_crops_number
    crops = [torch.randn(flags.batch_size, 3, size, size, device=where.device) for size in sizes]
    student, plain_student = (make_network(flags).to(where.device) for _ in range(2))
    plain_student.backbone = PlainBackbone(plain_student.backbone)
    teacher, plain_teacher = make_teacher(student), make_teacher(plain_student)
    dino_loss, plain_loss = DINOLoss(flags.out_dim).to(where.device), PlainLoss(flags.out_dim).to(where.device)
    optimizers = make_optimizer("adamw", student), plain_optimizer(plain_student)
    if flags.compile:
        hardware.compile_hot_path([student.backbone, teacher.backbone, dino_loss], "true", where)
    return (lambda: train_step(student, student, teacher, dino_loss, optimizers[0], [crops], VALUES, 3.0, False, where),
            lambda: plain_step(plain_student, plain_teacher, plain_loss, optimizers[1], crops, where))


PARTS = {"crops": make_crops, "loss": make_loss, "ema": make_ema, "knn": make_knn, "step": make_step}


def seconds(work: Callable, where: Hardware) -> float:
    """The wall-clock time of one call, the device's queue included."""
    if where.device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if where.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(ours: Callable, plain: Callable, turns: int, where: Hardware) -> dict[str, float]:
    """Both in turn after two warm-ups -> medians in ms, and the median ratio plain / ours."""
    times = [(seconds(ours, where), seconds(plain, where)) for _ in range(turns + 2)][2:]
    return {"ms": 1000 * statistics.median(ours for ours, _ in times),
            "plain_ms": 1000 * statistics.median(plain for _, plain in times),
            "ratio": statistics.median(plain / ours for ours, plain in times)}


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line -> checked flags."""
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    add("--arch", default="vit_small", help="[vit_small]")
    add("--patch_size", type=int, default=16, help="[16]")
    add("--batch_size", type=int, default=4, help="pictures, in step and loss [4]")
    add("--out_dim", type=int, default=65536, help="K [65536]")
    add("--global_crops_size", type=int, default=224, help="of the step, pixels [224]")
    add("--local_crops_size", type=int, default=96, help="of the step, pixels [96]")
    add("--local_crops_number", type=int, default=8, help="of step and loss [8]")
    add("--turns", type=int, default=7, help="measured calls of each version [7]")
    add("--threads", type=int, default=0, help="of the CPU; 0: as many as torch takes [0]")
    add("--image_path", default="", help="the picture to crop instead of a drawn one")
    add("--compile", action="store_true", help="our step's blocks and our loss through torch.compile")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    add("--precision", default="fp32", choices=("auto", "fp32", "bf16"))
    add("--json", action="store_true", help="one JSON line for each part instead of the table")
    flags = parser.parse_args(argv)
    for name in ("patch_size", "batch_size", "out_dim", "global_crops_size", "local_crops_size", "turns"):
        if getattr(flags, name) < 1:
            raise InputError(f"--{name} must be at least 1")
    for name in ("global_crops_size", "local_crops_size"):
        if getattr(flags, name) % flags.patch_size:
            raise InputError(f"--{name} {getattr(flags, name)} must be a multiple of --patch_size {flags.patch_size}")
    if min(flags.local_crops_number, flags.threads) < 0:
        raise InputError("--local_crops_number and --threads must not be negative")
    if flags.arch not in VITS:
        raise InputError(f"--arch {flags.arch}: the bench knows {', '.join(VITS)}")
    return flags


def main(argv: list[str] | None = None) -> None:
    with errors_in_one_line():
        flags = parse_flags(argv)
        if flags.threads:
            torch.set_num_threads(flags.threads)
        with hardware.start(flags.device, flags.precision) as where:
            if not flags.json:
                print(f"{where.device.type}, {where.dtype}, {torch.get_num_threads()} threads, torch "
                      f"{torch.__version__}\n{'part':>6} {'ours':>11} {'plain':>11}   plain / ours")
            for part in flags.parts:
                found = compare(*PARTS[part](flags, where), flags.turns, where)
                if flags.json:
                    print(json.dumps({"part": part, **vars(flags), **found}))
                else:
                    print(f"{part:>6} {found['ms']:8.1f} ms {found['plain_ms']:8.1f} ms   {found['ratio']:.2f}")


if __name__ == "__main__":
    main()
