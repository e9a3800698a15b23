"""Transfer (Sec. 4.2.3, Table 6): all weights are trained with labels, from DINO's or from scratch.

A linear classifier stands on the [CLS] feature, and DeiT's recipe (Touvron et al. 2021) trains both: RandAugment,
mixup or cutmix, erasing, label smoothing, drop path, AdamW with one learning rate for all layers, warm-up, cosine.
From scratch it is the paper's supervised baseline, whose attention Fig. 4 compares with DINO's. ViT-S/16 on ImageNet:
79.9 % from scratch, 81.5 % from DINO's weights; ViT-B/16: 81.8 and 82.8 %, in Table 11 beside other pretrainings.
Told is the last epoch, not the best one.

    python -m evals.transfer --from_scratch
    python -m evals.transfer --pretrained_weights runs/demo/checkpoint.pth --fraction 0.01 0.1 1
    python -m evals.transfer --pretrained dino_vits16 --dataset cifar10 --download --epochs 1000 --lr 1e-5
    torchrun --nproc_per_node=8 -m evals.transfer --from_scratch --data_path imagenet/ --batch_size 128

--data_path: a folder of class folders (every fifth image is asked, the others train), or with train/ and val/ in it.
--epochs and --lr are DeiT's for ImageNet from scratch; good weights on small data want a smaller lr, and longer. A
--fraction of the labels is shown 1 / fraction times an epoch. The same command goes on from the last whole epoch;
every other script reads the checkpoint's backbone. Departures from DeiT: no repeated augmentation, no average of the
weights; from the paper: of Flowers torchvision's train part alone, and with a --fraction too all weights are trained.
The paper's "Low-shot" (Table 12) is a logistic regression on frozen features, without fine-tuning and augmentation:
evals.linear --cached --fraction comes near it.

Shapes: B images, S pixels, D width, C classes.
"""
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

from data import Images
from features import extract_features, top_accuracy
from optimizer import cosine, make_optimizer
from runtime import batch_norm, hardware
from runtime.commandline import InputError
from runtime.hardware import World
from runtime.sampling import seed_of
from settings import PRESETS, Settings
from training import evaluation as common
from training.backbone import VITS, build_backbone
from training.checkpoint import load_strictly
from training.evaluation import Progress

PAPER = {  # Table 6, top-1; of its row "supervised" ImageNet alone: the other columns are of those weights, fine-tuned
    ("vit_small", 16): {"from scratch": {"imagenet": 79.9},
                        "fine-tuned": {"cifar10": 99.0, "cifar100": 90.5, "flowers102": 98.5, "stanford_cars": 93.0,
                                       "imagenet": 81.5}},
    ("vit_base", 16): {"from scratch": {"imagenet": 81.8},
                       "fine-tuned": {"cifar10": 99.1, "cifar100": 91.7, "flowers102": 98.8, "stanford_cars": 93.0,
                                      "imagenet": 82.8}}}
DEIT = {"epochs": 300, "warmup_epochs": 5.0, "lr": 5e-4, "drop_path_rate": 0.1, "crop_scale": 0.08,
        "train_size": 0}  # lr per 512 images of a step; size in pixels, 0: that of the evaluation
EMBEDDED = {"epochs": 8, "warmup_epochs": 1.0, "lr": 0.008, "drop_path_rate": 0.0, "crop_scale": 0.5,
            "train_size": 48}  # two minutes on two cores
FRESH = ("patch_size", "num_heads", "init_std")  # what a network that starts from scratch may be told, beside its arch
REGULARISED = {"weight_decay": 0.05, "smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0, "erasing": 0.25}


class Classifier(nn.Module):
    """A backbone and a linear classifier on its feature: (B, 3, S, S) -> logits (B, C)."""

    def __init__(self, backbone: nn.Module, classes: int):
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.embed_dim, classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.backbone(images))


def augmentation(size: int, crop_scale: float, erasing: float, mean: tuple, std: tuple) -> v2.Compose:
    """DeiT's, by torchvision: uint8 (3, H, W) -> normalised float (3, S, S)."""
    grey = [round(255 * value) for value in mean]
    return v2.Compose([
        v2.RandomResizedCrop(size, (crop_scale, 1.0), interpolation=InterpolationMode.BICUBIC, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandAugment(num_ops=2, magnitude=9, interpolation=InterpolationMode.BILINEAR, fill=grey),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean, std),
        v2.RandomErasing(erasing, value="random")])


def mixing(mixup: float, cutmix: float, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Mixup or cutmix, each half of the time, as far as their alphas are above 0.

    (B, 3, S, S), labels (B,) -> images, targets (B, C) whose rows sum to 1.
    """
    ways = [way(alpha=alpha, num_classes=classes) for way, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
    return v2.RandomChoice(ways) if ways else lambda images, labels: (images, F.one_hot(labels, classes).float())


def train_step(ddp_network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, targets: Tensor, lr: float,
               weight_decay: float, smoothing: float, world: World) -> Tensor:
    """One step on -sum_c t_c log softmax(logits)_c with t = (1 - smoothing) targets + smoothing / C -> it, in nats."""
    with world.autocast():
        logits = ddp_network(images)
    loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
    loss.backward()
    for group in optimizer.param_groups:
        group.update(lr=lr, weight_decay=weight_decay * group["decays"])
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def build_network(flags: Namespace, start: tuple[nn.Module, dict] | None, classes: int,
                  world: World) -> tuple[Classifier, dict]:
    """The classifier, on a fresh backbone or with the weights of start (backbone, flags it was made with); and what a
    reader of it must know."""
    fresh = Settings(**PRESETS["vits16" if flags.data_path or flags.dataset else "demo"])
    given = ("arch", "eval_size", *FRESH)
    args = {name: getattr(flags, name) for name in given if getattr(flags, name)}
    if start:
        pretrained, args = start
    about = {name: args.get(name, getattr(fresh, name)) for name in (
        "arch", "patch_size", "num_heads", "init_std", "eval_size", "eval_crop", "mean", "std")}
    about["patch_size"] = about["patch_size"] if about["arch"] in VITS else 1
    about["eval_size"] = common.view_size(flags, about)
    about["train_size"] = flags.train_size or about["eval_size"]
    if about["train_size"] % about["patch_size"]:
        raise InputError(f"--train_size {flags.train_size} must be a multiple of the patch size {about['patch_size']}")
    torch.manual_seed(flags.seed)
    backbone = build_backbone(about["arch"], about["patch_size"], args.get("img_size", about["train_size"]),
                              about["num_heads"], drop_path_rate=flags.drop_path_rate, init_std=about["init_std"])
    if start:
        load_strictly(backbone, pretrained.state_dict(), flags.pretrained_weights or flags.pretrained)
    return batch_norm.synchronise_batch_norms(Classifier(backbone, classes), world).to(world.device), about


def recipe_of(images: Images, start: tuple[nn.Module, dict] | None, about: dict, classes: int, flags: Namespace,
              world: World) -> dict:
    """What must agree for a training to go on."""
    return {name: getattr(flags, name) for name in (*DEIT, *REGULARISED, "batch_size", "seed")} | about | {
        "set of weights": common.fingerprint(start[0]) if start else "none", "number of classes": classes,
        "number of images": len(images), "set of images": common.fingerprint_of_images(images),
        "number of processes": world.size}


def fine_tune(network: Classifier, images: Images, about: dict, run: Progress, flags: Namespace,
              world: World) -> None:
    """All epochs that are still to do, each with its checkpoint."""
    if world.all_see(run.path):
        run.load()
    view = augmentation(about["train_size"], flags.crop_scale, flags.erasing, about["mean"], about["std"])
    batches = common.epoch_batches(images, flags, world)
    loader = common.training_loader(images, view, batches, flags, world)
    mix = mixing(flags.mixup, flags.cutmix, network.classifier.out_features)
    hardware.compile_hot_path([network.backbone], "auto", world)
    ddp_network = hardware.average_gradients(network.train(), world)
    peak, total = flags.lr * batches.images_per_step / 512, flags.epochs * batches.steps
    bar = tqdm(total=total, initial=run.epoch * batches.steps, unit="step", disable=not world.is_main, leave=False)
    for batches.epoch in range(run.epoch, flags.epochs):
        losses = []
        for step, (images, labels) in enumerate(loader, start=batches.epoch * batches.steps):
            torch.manual_seed(seed_of(flags.seed, step, world.rank))  # of the mixing and the dropped paths
            images, targets = mix(images.to(world.device), labels.to(world.device))
            lr = cosine(step, total, peak, peak / 100, flags.warmup_epochs * batches.steps)  # DeiT: 1e-3 to 1e-5
            losses.append(train_step(ddp_network, run.parts["optimizer"], images, targets, lr, flags.weight_decay,
                                     flags.smoothing, world))
            bar.update()
        loss = world.mean(torch.stack(losses).mean()).item()
        if not math.isfinite(loss):
            raise InputError(f"the loss is {loss} in epoch {batches.epoch + 1}: take a lower --lr, or --precision fp32")
        bar.set_postfix(epoch=batches.epoch + 1, loss=f"{loss:.3f}")
        run.epoch += 1
        if world.is_main:
            weights = network.state_dict()
            run.save(student=weights, teacher=weights, args=about)  # so that every script finds them; stored only once
        world.wait()
    bar.close()


def main(argv: list[str] | None = None) -> None:
    parser = common.command_line(__doc__, batch_size=64)
    parser.set_defaults(precision="auto")
    add = parser.add_argument
    add("--from_scratch", action="store_true", help="fresh weights instead: the supervised baseline")
    add("--fraction", type=float, nargs="+", default=[1.0], help="shares of each class's labels, a training each [1]")
    for name in FRESH:
        add(f"--{name}", type=type(getattr(Settings, name)), default=0, help="as in train.py, for --from_scratch")
    for name, value in DEIT.items():
        add(f"--{name}", type=type(value), help=f"[{value}; embedded images: {EMBEDDED[name]}]")
    for name, value in REGULARISED.items():
        add(f"--{name}", type=type(value), default=value, help=f"[{value}]")
    add("--seed", type=int, default=0, help="of weights, shares, order and augmentation [0]")
    add("--output_dir", default="", help="gets checkpoint.pth [runs/transfer, or runs/supervised from scratch]")
    common.run(parser, evaluate, argv)


def check(flags: Namespace) -> None:
    """Fill in the defaults that depend on the data and the start; raises InputError on what is out of range."""
    embedded = not (flags.data_path or flags.dataset)
    for name, value in (EMBEDDED if embedded else DEIT).items():
        setattr(flags, name, value if getattr(flags, name) is None else getattr(flags, name))
    flags.output_dir = flags.output_dir or ("runs/supervised" if flags.from_scratch else "runs/transfer")
    at_least_0 = ("train_size", "weight_decay", "mixup", "cutmix", *FRESH)
    common.require(
        flags, epochs=flags.epochs >= 1, warmup_epochs=0 <= flags.warmup_epochs <= flags.epochs, lr=flags.lr > 0,
        drop_path_rate=0 <= flags.drop_path_rate < 1, crop_scale=0 < flags.crop_scale <= 1,
        fraction=all(0 < share <= 1 for share in flags.fraction), smoothing=0 <= flags.smoothing < 1,
        erasing=0 <= flags.erasing <= 1, batch_size=flags.batch_size >= 2,
        **{name: getattr(flags, name) >= 0 for name in at_least_0})
    if flags.from_scratch and (flags.pretrained_weights or flags.pretrained):
        raise InputError("--from_scratch takes no weights: leave out it, or --pretrained_weights and --pretrained")
    if not flags.from_scratch and any(getattr(flags, name) for name in FRESH):
        raise InputError(f"--{', --'.join(FRESH)} are for --from_scratch: leave them out where weights are given")


def paper_number(args: dict, how: str, dataset: str) -> float | None:
    """Table 6's top-1 in % on --dataset, or without it on ImageNet, of the network with these flags; or None."""
    return PAPER.get((args["arch"], args["patch_size"]), {}).get(how, {}).get(dataset or "imagenet")


def evaluate(flags: Namespace, world: World) -> None:
    """Train with each share of the labels, then a table of top-1 and top-5."""
    check(flags)
    start = None if flags.from_scratch else common.load_backbone(flags, world)
    train, val, asked = common.load_labelled(flags, world)
    classes = 1 + int(torch.cat([train.labels, val.labels]).max())
    how, measured = "fine-tuned" if start else "from scratch", {}
    for share in flags.fraction:
        few = common.balanced_share(train.labels, share, flags.seed)
        shown = train.subset(few.repeat(round(1 / share)))  # so that an epoch of any share is equally many steps
        network, about = build_network(flags, start, classes, world)
        path = Path(flags.output_dir, "" if share == 1 else f"{share:g}", "checkpoint.pth")
        run = Progress(path, recipe_of(shown, start, about, classes, flags, world), network=network,
                       optimizer=make_optimizer("adamw", network))
        fine_tune(network, shown, about, run, flags, world)
        logits = extract_features(network, val, common.evaluation_view(flags, about), world,
                                  **common.loading(flags, world))
        row = f"{how}, {len(few)} labels" if share < 1 else how
        measured |= {f"{row}, top-{k} %": top_accuracy(logits, val.labels, k) for k in (1, 5)}
    number = paper_number(about, how, flags.dataset)
    data = (f"{common.source(flags)}: {len(train)} images train, {len(val)} asked ({asked}), {classes} classes, "
            f"{about['eval_size']} pixels, {flags.epochs} epochs"
            + f"; the paper's: {flags.dataset or 'imagenet'}" * bool(number))
    small = ", ".join(f"{name} {values['imagenet']}" for name, values in PAPER["vit_small", 16].items())
    common.tell(flags, world, f"Transfer (Table 6: ViT-S/16 has {small} % on ImageNet)", about, data, measured,
                {f"{how}, top-1 %": number} if number else {})


if __name__ == "__main__":
    main()
