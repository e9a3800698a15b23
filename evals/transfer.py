"""Transfer (Sec. 4.2.3, Table 6): all weights are trained with labels, from DINO's or from scratch.

A linear classifier stands on the [CLS] feature, and DeiT's recipe (Touvron et al. 2021) trains
both: RandAugment, mixup or cutmix, erasing, label smoothing, drop path, AdamW with one learning
rate for all layers, warm-up, cosine. From scratch it is the paper's supervised baseline, whose
attention Fig. 4 compares with DINO's. ViT-S/16 on ImageNet: 79.9 % from scratch, 81.5 % from DINO's
weights; ViT-B/16: 81.8 and 82.8 %, in Table 11 beside other pretrainings. The last epoch is
reported, not the best.

    python -m evals.transfer --from_scratch
    python -m evals.transfer --pretrained_weights runs/demo/checkpoint.pth --fraction 0.01 0.1 1
    python -m evals.transfer --pretrained dino_vits16 --dataset cifar10 --download \\
        --epochs 1000 --lr 1e-5
    torchrun --nproc_per_node=8 -m evals.transfer --from_scratch --data_path imagenet/ \\
        --batch_size 128

--data_path: a folder of class folders (every fifth image is a test image), or with train/ and val/
in it. --epochs and --lr are DeiT's for ImageNet from scratch; good weights on small data want a
smaller lr, and longer. A --fraction of the labels is repeated until an epoch has as many images as
with all. After each epoch the network is in checkpoint.pth, where every other script finds the
backbone. The same command continues a stopped training after its last epoch.

Departures from DeiT: no repeated augmentation, which the authors used, and no average of the
weights; torchvision's RandAugment, weaker than timm's at the same magnitude; positions and [CLS]
decay, as in DINO. Fine-tuned classifiers start from smaller weights, as the authors' did. The
embedded images have a recipe of their own, without mixing and erasing. Departures from the paper:
of Flowers torchvision's train part alone, and with a --fraction too all weights are trained. The
paper's "Low-shot" (Table 12) is a logistic regression on frozen features, without fine-tuning and
augmentation: evals.linear --cached --fraction comes near it.

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
from evals import common
from features import extract_features, top_accuracy
from optimizer import cosine, make_optimizer
from runtime import batch_norm, hardware
from runtime.commandline import InputError, bar_style, brief
from runtime.hardware import World
from runtime.sampling import seed_of
from settings import PRESETS, Settings, default_preset
from training import evaluation
from training.averages import load_averages
from training.backbone import VITS, build_backbone
from training.checkpoint import load_strictly, read_checkpoint, save_checkpoint
from training.run_state import claimed, same_setting

# Table 6, top-1 in %. Of its row "supervised" ImageNet alone is trained from scratch: the other
# columns are of those weights, fine-tuned
PAPER = {
    ("vit_small", 16): {
        "from scratch": {"imagenet": 79.9},
        "fine-tuned": {
            "cifar10": 99.0,
            "cifar100": 90.5,
            "flowers102": 98.5,
            "stanford_cars": 93.0,
            "imagenet": 81.5,
        },
    },
    ("vit_base", 16): {
        "from scratch": {"imagenet": 81.8},
        "fine-tuned": {
            "cifar10": 99.1,
            "cifar100": 91.7,
            "flowers102": 98.8,
            "stanford_cars": 93.0,
            "imagenet": 82.8,
        },
    },
}
# The standard deviation of the classifier's first weights. DeiT: 0.02. The authors fine-tuned with
# smaller ones, as their tracker says; a user with plain DeiT got 81.34 % where Table 6 has 82.8
# (ViT-B). How much smaller is our choice.
CLASSIFIER_STD = {"from scratch": 0.02, "fine-tuned": 0.0002}
DEIT = {
    "epochs": 300,
    "warmup_epochs": 5.0,
    "lr": 5e-4,  # per 512 images of a step
    "drop_path_rate": 0.1,
    "crop_scale": 0.08,
    "train_size": 0,  # pixels; 0: those of the evaluation
    "mixup": 0.8,
    "cutmix": 1.0,
    "erasing": 0.25,
    "batch_size": 64,
}
# Two minutes on two cores. Without mixing and erasing, which cost 8 points in so short a run: a
# baseline gets its best recipe (docs/log.md).
EMBEDDED = {
    "epochs": 8,
    "warmup_epochs": 1.0,
    "lr": 0.016,
    "drop_path_rate": 0.0,
    "crop_scale": 0.5,
    "train_size": 48,
    "mixup": 0.0,
    "cutmix": 0.0,
    "erasing": 0.0,
    "batch_size": 32,
}
REGULARISED = {"weight_decay": 0.05, "smoothing": 0.1}
# flags that may change when a stopped training continues; those of other fractions among them
QUIET = ("output_dir", "results", "fraction", "device", "precision", "num_workers", "download")


class Classifier(nn.Module):
    """A backbone and a linear classifier on its feature: (B, 3, S, S) -> logits (B, C).

    std: of the classifier's first weights.
    """

    def __init__(self, backbone: nn.Module, classes: int, std: float = 0.02):
        super().__init__()
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.embed_dim, classes)
        nn.init.trunc_normal_(self.classifier.weight, std=std)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.backbone(images))


def augmentation(
    size: int, crop_scale: float, erasing: float, mean: tuple, std: tuple
) -> v2.Compose:
    """Return DeiT's augmentation: uint8 (3, H, W) -> normalised float (3, S, S)."""
    grey = [round(255 * value) for value in mean]  # fills the corners of turned images
    bicubic, bilinear = InterpolationMode.BICUBIC, InterpolationMode.BILINEAR
    return v2.Compose([
        v2.RandomResizedCrop(size, (crop_scale, 1.0), interpolation=bicubic, antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandAugment(num_ops=2, magnitude=9, interpolation=bilinear, fill=grey),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean, std),
        v2.RandomErasing(erasing, value="random"),
    ])


def mixing(
    mixup: float, cutmix: float, classes: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return mixup or cutmix, each half of the time, as far as their alphas are above 0.

    images (B, 3, S, S), labels (B,) -> images, targets (B, C) whose rows sum to 1.
    """

    def unmixed(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images, F.one_hot(labels, classes).float()

    ways = []
    if mixup > 0:
        ways.append(v2.MixUp(alpha=mixup, num_classes=classes))
    if cutmix > 0:
        ways.append(v2.CutMix(alpha=cutmix, num_classes=classes))
    return v2.RandomChoice(ways) if ways else unmixed


def train_step(
    ddp_network: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    targets: Tensor,
    lr: float,
    weight_decay: float,
    smoothing: float,
    world: World,
) -> Tensor:
    """Take one step on the cross-entropy with smoothed targets, and return it in nats.

    -sum_c t_c log softmax(logits)_c, with t = (1 - smoothing) targets + smoothing / C.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay * group["decays"]  # but biases and norms
    with world.autocast():
        logits = ddp_network(images)
    loss = F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def network_flags(flags: Namespace, start: tuple[nn.Module, dict] | None) -> dict:
    """Return what the checkpoint will say of its network: that of the weights to start from, or a
    fresh one as the flags say."""
    preset = default_preset(flags.data_path, flags.dataset, init_from="")
    if start:
        _, args = start
        if preset == "photos":  # what a file does not say is the release's, however few the images
            preset = "vits16"
    else:
        names = ("arch", "patch_size", "eval_size", "num_heads", "init_std")
        args = {name: getattr(flags, name) for name in names if getattr(flags, name)}
    fresh = Settings(**PRESETS[preset])
    about = {}
    sizes = ("arch", "patch_size", "num_heads", "init_std")
    for name in (*sizes, "eval_size", "eval_crop", "mean", "std"):
        about[name] = args.get(name, getattr(fresh, name))
    if about["arch"] not in VITS:
        about["patch_size"] = 1  # a convnet takes any size
    about["eval_size"] = evaluation.view_size(flags, about)
    about["train_size"] = flags.train_size or about["eval_size"]
    about["img_size"] = args.get("img_size", about["train_size"])
    if about["train_size"] % about["patch_size"]:
        raise InputError(
            f"--train_size {flags.train_size} must be a multiple of the patch size "
            f"{about['patch_size']}"
        )
    return about


def build_network(
    about: dict,
    start: tuple[nn.Module, dict] | None,
    classes: int,
    flags: Namespace,
    world: World,
) -> Classifier:
    """Return the classifier on a fresh backbone, or on one with the weights to start from."""
    torch.manual_seed(flags.seed)
    backbone = build_backbone(
        about["arch"],
        about["patch_size"],
        about["img_size"],
        about["num_heads"],
        drop_path_rate=flags.drop_path_rate,
        init_std=about["init_std"],
    )
    if start:
        pretrained, _ = start
        backbone.load_state_dict(pretrained.state_dict())
    network = Classifier(backbone, classes, flags.classifier_std)
    return batch_norm.synchronise_batch_norms(network, world).to(world.device)


def fine_tune(
    network: Classifier, images: Images, about: dict, path: Path, flags: Namespace, world: World
) -> None:
    """Train all weights of the network for --epochs, or for those that the file at path lacks.

    The file is written after each epoch.
    """
    view = augmentation(
        about["train_size"], flags.crop_scale, flags.erasing, about["mean"], about["std"]
    )
    batches = common.epoch_batches(images, flags, world)
    loader = common.training_loader(images, view, batches, flags, world)
    mix = mixing(flags.mixup, flags.cutmix, network.classifier.out_features)
    optimizer = make_optimizer("adamw", network)

    first_epoch = 0
    saved = saved_training(path, flags, world)
    if saved:
        load_training(network, optimizer, saved, path)
        first_epoch = saved["epoch"]
        if world.is_main:
            print(f"continuing {path} after {first_epoch} of {flags.epochs} epochs")
    hardware.compile_hot_path([network.backbone], "auto", world)
    ddp_network = hardware.average_gradients(network.train(), world)

    total_steps = flags.epochs * batches.steps
    warmup_steps = round(flags.warmup_epochs * batches.steps)  # epochs may be fractional
    peak = flags.lr * batches.images_per_step / 512
    step = first_epoch * batches.steps
    bar = tqdm(
        desc="training",
        total=total_steps,
        initial=step,
        unit="step",
        disable=not world.is_main,
        leave=False,
        **bar_style(),
    )
    for epoch in range(first_epoch, flags.epochs):
        batches.epoch = epoch
        losses = []
        for views, labels in loader:
            # mixing and dropped paths: a step's own seed, so that a stopped training repeats them
            torch.manual_seed(seed_of(flags.seed, step, world.rank))
            views, targets = mix(views.to(world.device), labels.to(world.device))
            lr = cosine(step, total_steps, peak, peak / 100, warmup_steps)  # DeiT: 1e-3 to 1e-5
            loss = train_step(
                ddp_network, optimizer, views, targets, lr, flags.weight_decay, flags.smoothing,
                world,
            )
            losses.append(loss)
            step += 1
            bar.update()
        mean_loss = world.mean(torch.stack(losses).mean()).item()
        if not math.isfinite(mean_loss):
            raise InputError(
                f"the loss is {mean_loss} in epoch {epoch + 1}: take a lower --lr, or "
                "--precision fp32"
            )
        bar.set_postfix(epoch=epoch + 1, loss=f"{mean_loss:.3f}", refresh=False)
        if world.is_main:
            save_training(path, network, optimizer, epoch + 1, about, flags)
    bar.close()


def training_flags(flags: Namespace) -> dict:
    """Return the flags that must be the same where a stopped training continues."""
    return {name: value for name, value in vars(flags).items() if name not in QUIET}


def save_training(
    path: Path,
    network: Classifier,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    about: dict,
    flags: Namespace,
) -> None:
    """Write a training after so many epochs; args: what other scripts read of its network."""
    weights = network.state_dict()
    save_checkpoint(path, {
        # under both names, so that every script finds the weights; stored only once
        "student": weights,
        "teacher": weights,
        "args": about,
        "optimizer": optimizer.state_dict(),
        "epoch": epoch,
        "transfer": training_flags(flags),
    })


def saved_training(path: Path, flags: Namespace, world: World) -> dict | None:
    """Return what save_training wrote, or None where no file is.

    Raises InputError if the file is of other flags or another program.
    """
    if not world.all_see(path):
        return None
    saved = read_checkpoint(path)
    if "transfer" not in saved:  # it may be a run of train.py, days of work
        raise InputError(
            f"the checkpoint at {str(path)!r} is none of evals.transfer: choose another "
            "--output_dir, or remove it"
        )
    for name, value in training_flags(flags).items():
        old = saved["transfer"].get(name, value)
        if not same_setting(name, old, value):
            raise InputError(
                f"{str(path)!r} was made with --{name} {brief(old)}, not {brief(value)}: choose "
                "another --output_dir, or the old value"
            )
    return saved


def load_training(
    network: Classifier, optimizer: torch.optim.Optimizer, saved: dict, path: Path
) -> None:
    """Give network and optimizer what saved_training read; raises InputError if it does not fit."""
    load_strictly(network, saved["student"], path)
    try:
        load_averages(optimizer, saved["optimizer"]["state"])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        raise InputError(
            f"the optimizer's averages in {str(path)!r} do not fit, or are not finite: choose "
            "another --output_dir, or remove it"
        ) from None


def fill_in(flags: Namespace) -> None:
    """Fill in the defaults that depend on the data and the start."""
    embedded = not (flags.data_path or flags.dataset)
    recipe = EMBEDDED if embedded else DEIT
    how = "from scratch" if flags.from_scratch else "fine-tuned"
    for name, value in (recipe | {"classifier_std": CLASSIFIER_STD[how]}).items():
        if getattr(flags, name) is None:
            setattr(flags, name, value)
    if not flags.output_dir:
        flags.output_dir = "runs/supervised" if flags.from_scratch else "runs/transfer"


def check(flags: Namespace) -> None:
    """Raise InputError for a flag that is out of range, or does not go with another."""

    def require(flag: str, holds: bool, bound: str) -> None:
        evaluation.require(flags, flag, holds, bound)

    require("epochs", flags.epochs >= 1, "at least 1, such as 300")
    in_the_run = 0 <= flags.warmup_epochs <= flags.epochs
    require("warmup_epochs", in_the_run, f"at least 0 and at most --epochs {flags.epochs}")
    require("lr", flags.lr > 0, "above 0, such as 0.0005")
    require("drop_path_rate", 0 <= flags.drop_path_rate < 1, "at least 0 and below 1, such as 0.1")
    require("crop_scale", 0 < flags.crop_scale <= 1, "above 0 and at most 1, such as 0.08")
    fractions = all(0 < fraction <= 1 for fraction in flags.fraction)
    require("fraction", fractions, "above 0 and at most 1, such as 0.1")
    require("smoothing", 0 <= flags.smoothing < 1, "at least 0 and below 1, such as 0.1")
    require("erasing", 0 <= flags.erasing <= 1, "at least 0 and at most 1, such as 0.25")
    require("batch_size", flags.batch_size >= 2, "at least 2: mixup mixes two images")
    require("train_size", 0 <= flags.train_size <= 4096, "at least 0 and at most 4096")
    sizes = ("patch_size", "num_heads", "init_std")
    for flag in (*sizes, "weight_decay", "mixup", "cutmix", "classifier_std"):
        require(flag, getattr(flags, flag) >= 0, "at least 0")
    if flags.precision == "fp16":
        raise InputError("--precision fp16 needs a scaled loss, which train.py has: take bf16")
    if flags.from_scratch and (flags.pretrained_weights or flags.pretrained):
        raise InputError(
            "--from_scratch takes no weights: leave it out, or --pretrained_weights and "
            "--pretrained"
        )
    if flags.init_std and not flags.from_scratch:
        raise InputError("--init_std is for --from_scratch: leave it out with weights")


def checkpoint_path(flags: Namespace, fraction: float) -> Path:
    """Return the file of the network that is trained with this fraction of the labels."""
    folder = Path(flags.output_dir)
    if fraction < 1:
        folder = folder / str(fraction)
    return folder / "checkpoint.pth"


def paper_number(args: dict, how: str, dataset: str) -> float | None:
    """Return Table 6's top-1 in % of this network on a data set, or None."""
    networks = PAPER.get((args["arch"], args["patch_size"]), {})
    return networks.get(how, {}).get(dataset)


def measure_transfer(flags: Namespace, world: World) -> None:
    """Train with each fraction of the labels, and report top-1 and top-5."""
    start, args, how = None, {}, "from scratch"
    if not flags.from_scratch:
        start, how = evaluation.load_backbone(flags, world), "fine-tuned"
        _, args = start
    train, test, which = evaluation.load_labelled(flags, world, args)
    classes = 1 + int(torch.cat([train.labels, test.labels]).max())
    about = network_flags(flags, start)
    if train.levels:  # for whoever evaluates the checkpoint
        about["levels"] = train.levels
    view = evaluation.evaluation_view(flags, about)

    for fraction in flags.fraction:  # a file in the way is reported before the first training
        saved_training(checkpoint_path(flags, fraction), flags, world)
    measured = {}
    for fraction in flags.fraction:
        some = common.balanced_fraction(train.labels, fraction, flags.seed)
        chosen = some
        if fraction < 1:  # repeated in a random order: no class is repeated more often
            order = torch.randperm(len(some), generator=torch.Generator().manual_seed(flags.seed))
            chosen = some[order[torch.arange(len(train)) % len(some)]]
        images = train.subset(chosen)
        row = how
        if fraction < 1:
            row = f"{how}, {len(some)} labels"
        network = build_network(about, start, classes, flags, world)
        fine_tune(network, images, about, checkpoint_path(flags, fraction), flags, world)
        loading = evaluation.loading(flags, world)
        logits = extract_features(network, test, view, world, **loading)
        measured[f"{row}, top-1 %"] = top_accuracy(logits, test.labels, 1)
        measured[f"{row}, top-5 %"] = top_accuracy(logits, test.labels, 5)

    data = (
        f"{evaluation.data_name(flags)}: {len(train)} images train, {len(test)} test ({which}), "
        f"{classes} classes, {about['eval_size']} pixels, {flags.epochs} epochs"
    )
    paper = {}
    dataset = flags.dataset
    if evaluation.is_imagenet(flags, classes):
        dataset = "imagenet"
    number = paper_number(about, how, dataset)
    as_in_the_paper = which == "the test part" and about["eval_size"] == 224
    if number is not None and as_in_the_paper:
        data += f"; the paper's: {dataset}"
        paper[f"{how}, top-1 %"] = number
    small = PAPER["vit_small", 16]
    title = (
        f"transfer (Table 6: ViT-S/16 has {small['from scratch']['imagenet']} from scratch, "
        f"{small['fine-tuned']['imagenet']} fine-tuned, % on ImageNet)"
    )
    evaluation.report(flags, world, title, about, data, measured, paper)


def main(argv: list[str] | None = None) -> None:
    parser = evaluation.command_line(__doc__, batch_size=0)  # it follows the data, as others do
    parser.set_defaults(precision="auto")
    add = parser.add_argument
    add("--from_scratch", action="store_true", help="fresh weights: the supervised baseline")
    add("--fraction", type=float, nargs="+", default=[1.0],
        help="fractions of each class's labels, a training each [1]")
    add("--init_std", type=float, default=0.0, help="as in train.py, for --from_scratch")
    for name, value in DEIT.items():
        add(f"--{name}", type=type(value), help=f"[{value}; embedded images: {EMBEDDED[name]}]")
    for name, value in REGULARISED.items():
        add(f"--{name}", type=type(value), default=value, help=f"[{value}]")
    add("--classifier_std", type=float,
        help=f"of the classifier's first weights [{CLASSIFIER_STD['fine-tuned']}; from scratch: "
        f"{CLASSIFIER_STD['from scratch']}]")
    add("--seed", type=int, default=0, help="of weights, fractions, order and augmentation [0]")
    add("--output_dir", default="",
        help="gets checkpoint.pth [runs/transfer, or runs/supervised from scratch]")
    flags = parser.parse_args(argv)
    fill_in(flags)
    with evaluation.start(flags) as world:
        check(flags)
        with claimed(Path(flags.output_dir), world):
            measure_transfer(flags, world)


if __name__ == "__main__":
    main()
