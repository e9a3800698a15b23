"""Linear classification of frozen features (Table 2; Sec. 3.2, appendix F.2): what one matrix can read out of them.

Protocol: SGD with momentum 0.9, no weight decay, 100 epochs, batch 1024 (eight processes of --batch_size 128), learning
rate lr * batch / 256 on a cosine to 0, random crops and flips to train on, the centre to evaluate on. ViT-S gives the
[CLS] of its last 4 blocks, ViT-B its last [CLS] and mean patch token, a convnet its pooled features. Each --lr gets a
head of its own, and one pass trains them all; the best is picked by its validation accuracy, as paper and release do,
which flatters it a little. Departures: the release trains one lr a run and tells its best epoch, here the last counts;
an epoch's incomplete last batch is left out; the release's [CLS] and mean patch token alternate number by number, here
one follows the other. --cached learns from centre views, as Tables 10 and 12 do, which solve a logistic regression.
ViT-S/16 after DINO: 77.0 % on ImageNet, with 1 % of the labels 64.5 % (Table 12).

    python -m evals.linear --pretrained_weights runs/demo/checkpoint.pth                 # embedded images, --cached
    python -m evals.linear --pretrained_weights runs/mine/checkpoint.pth --data_path photos/ --cached
    python -m evals.linear --pretrained dino_vits16 --data_path imagenet/ --cached --fraction 0.01       # few labels
    torchrun --nproc_per_node=8 -m evals.linear --pretrained dino_vits16 --data_path imagenet/ --output_dir runs/linear
    (the last command again goes on where it was stopped; with --evaluate it only evaluates what is there)

--data_path: class folders (every fifth image is asked, the others are learnt from), or train/ and val/ with such.

Shapes: B images, S pixels, D width, d of the joined features, C classes, H heads (one for each lr), n images asked.
"""
import copy
import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2.functional import resized_crop
from tqdm import tqdm

from data import Images
from features import EvaluationView, extract_features, normalise, top_accuracy
from optimizer import cosine
from runtime.commandline import InputError, true_or_false
from runtime.hardware import World
from runtime.sampling import EpochBatches
from training import evaluation as common
from training.evaluation import Progress

PAPER = {("vit_small", 16): 77.0, ("vit_small", 8): 79.7, ("vit_base", 16): 78.2, ("vit_base", 8): 80.1,
         ("resnet50", 1): 75.3}  # Table 2: top-1 on ImageNet
SWEEP = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]  # the release's default for ViTs is 0.001


class FrozenFeatures(nn.Module):
    """[CLS] of the last blocks, joined, then the last mean patch token if avgpool: (B, 3, S, S) -> (B, d).

    d, here width, is D * (n_last_blocks + avgpool); of a convnet come its pooled features.
    """

    def __init__(self, backbone: nn.Module, n_last_blocks: int, avgpool: bool):
        super().__init__()
        self.backbone, self.n_last_blocks, self.avgpool = backbone, n_last_blocks, avgpool
        self.width = backbone.embed_dim * (n_last_blocks + avgpool)

    def forward(self, images: Tensor) -> Tensor:
        if not hasattr(self.backbone, "get_intermediate_layers"):
            return self.backbone(images)
        layers = self.backbone.get_intermediate_layers(images, self.n_last_blocks)
        mean_patch = [layers[-1][:, 1:].mean(dim=1)] if self.avgpool else []
        return torch.cat([layer[:, 0] for layer in layers] + mean_patch, dim=1)


class TrainingView:
    """Random crop of 8 to 100 % of the area, resized, flipped half the time: uint8 (3, H, W) -> float (3, S, S)."""

    def __init__(self, centre: EvaluationView):
        self.size, self.mean, self.std = centre.size, centre.mean, centre.std

    def __call__(self, image: Tensor) -> Tensor:
        box = RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
        image = resized_crop(image, *box, [self.size] * 2, InterpolationMode.BILINEAR, antialias=True)
        image = image.flip(-1) if torch.rand(()) < 0.5 else image
        return normalise(image, self.mean, self.std)


def make_heads(width: int, classes: int, number: int, seed: int = 0) -> nn.ModuleList:
    """So many classifiers (B, d) -> (B, C), N(0, 0.01) with zero bias; all start alike, so that only lr differs."""
    head = nn.Linear(width, classes)
    nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    return nn.ModuleList(copy.deepcopy(head) for _ in range(number))


def make_optimizer(heads: nn.ModuleList, lrs: list[float], images_per_step: int) -> torch.optim.SGD:
    """SGD with one group a head, whose peak is its lr * batch / 256."""
    groups = [{"params": list(head.parameters()), "peak_lr": lr * images_per_step / 256}
              for head, lr in zip(heads, lrs, strict=True)]
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9)


def set_lr(optimizer: torch.optim.SGD, epoch: int, epochs: int) -> None:
    """lr(epoch) = peak / 2 * (1 + cos(pi * epoch / epochs)), one step an epoch as in the release."""
    for group in optimizer.param_groups:
        group["lr"] = cosine(epoch, epochs, group["peak_lr"], 0.0)


def train_epoch(heads: nn.ModuleList, optimizer: torch.optim.SGD, batches: Iterable[tuple[Tensor, Tensor]],
                world: World) -> Tensor:
    """One pass over batches of features (B, d) and labels (B,) -> each head's mean cross-entropy (H,) in nats.

    The heads share no weight, so the gradient of the summed losses is, in each head, that of its own.
    """
    epoch_losses = []
    for features, labels in batches:
        features, labels = features.to(world.device), labels.to(world.device)
        losses = torch.stack([F.cross_entropy(head(features), labels) for head in heads])
        optimizer.zero_grad()
        losses.sum().backward()
        for param in heads.parameters():
            param.grad = world.mean(param.grad)
        optimizer.step()
        epoch_losses.append(losses.detach())
    return world.mean(torch.stack(epoch_losses).mean(dim=0))


@torch.no_grad()
def accuracies(heads: nn.ModuleList, features: Tensor, labels: Tensor) -> list[tuple[float, float]]:
    """(top-1, top-5) in % of each head, 0 where it diverged: features (n, d), labels (n,)."""
    logits = (head(features.to(head.weight.device)).cpu() for head in heads)
    return [(top_accuracy(one, labels), top_accuracy(one, labels, 5)) if one.isfinite().all() else (0.0, 0.0)
            for one in logits]  # topk takes NaN for the largest number of all


def blocks_to_read(flags: Namespace, backbone: nn.Module, arch: str) -> tuple[int, bool]:
    """(--n_last_blocks, --avgpool_patchtokens), where not given the paper's for this arch; checked against it."""
    blocks = len(getattr(backbone, "blocks", []))
    if not blocks:
        if flags.n_last_blocks or flags.avgpool_patchtokens:
            raise InputError(f"--n_last_blocks and --avgpool_patchtokens are for ViTs: leave them out for {arch}")
        return 1, False
    n_last_blocks, avgpool = (1, True) if arch == "vit_base" else (4, False)
    n_last_blocks = flags.n_last_blocks or n_last_blocks
    if n_last_blocks > blocks:
        raise InputError(f"--n_last_blocks {n_last_blocks} is more than the {blocks} blocks of {arch}: lower it")
    return n_last_blocks, avgpool if flags.avgpool_patchtokens is None else flags.avgpool_patchtokens


def make_source(network: FrozenFeatures, images: Images, view: EvaluationView, batches: EpochBatches,
                flags: Namespace, world: World) -> Callable[[], Iterable[tuple[Tensor, Tensor]]]:
    """What gives an epoch's batches of features (B, d) and labels (B,): of augmented views, or with --cached of the
    centre views, whose features are taken once."""
    if flags.cached:
        kept = extract_features(network, images, view, world, **common.loading(flags, world))
        return lambda: ((kept[rows], images.labels[rows])
                        for rows in ([index for _, index in keys] for keys in batches))
    loader = common.training_loader(images, TrainingView(view), batches, flags, world)

    def augmented() -> Iterator[tuple[Tensor, Tensor]]:
        for views, labels in loader:
            with world.autocast():
                features = network(views.to(world.device, non_blocking=True))
            yield features.float(), labels

    return augmented


def recipe_of(network: FrozenFeatures, images: Images, view: EvaluationView, batches: EpochBatches, classes: int,
              flags: Namespace) -> dict:
    """What must agree for heads to be evaluated, and besides for their training to go on."""
    recipe = {"weights": common.fingerprint(network.backbone), "n_last_blocks": network.n_last_blocks,
              "avgpool_patchtokens": network.avgpool, "eval_size": view.size, "classes": classes, "lr": flags.lr}
    return recipe if flags.evaluate else recipe | {
        "set of images": common.fingerprint_of_images(images), "number of images": len(images),
        "batch": batches.images_per_step, "epochs": flags.epochs, "cached": flags.cached, "seed": flags.seed}


def train(heads: nn.ModuleList, optimizer: torch.optim.SGD, run: Progress, batches: EpochBatches,
          source: Callable[[], Iterable[tuple[Tensor, Tensor]]], validate: Callable[[], list[tuple[float, float]]],
          flags: Namespace, world: World) -> None:
    """The epochs that are still to do, each kept in --output_dir; ten times on the way, how far it is.

    validate: -> (top-1, top-5) in % of each head.
    """
    while run.epoch < flags.epochs:
        batches.epoch = run.epoch
        set_lr(optimizer, run.epoch, flags.epochs)
        bar = tqdm(source(), f"epoch {run.epoch + 1} of {flags.epochs}", batches.steps, leave=False,
                   disable=not world.is_main)
        losses = train_epoch(heads, optimizer, bar, world)
        run.epoch += 1
        if world.is_main and flags.output_dir:
            run.save()
        if world.is_main and run.epoch % math.ceil(flags.epochs / 10) == 0:
            scores = validate()
            best = scores.index(max(scores))
            print(f"epoch {run.epoch} of {flags.epochs}: top-1 {scores[best][0]:.2f} % at lr {flags.lr[best]:g}, "
                  f"loss {losses[best]:.3f}")


def table(scores: list[tuple[float, float]], lrs: list[float], args: dict) -> tuple[dict[str, float], dict[str, float]]:
    """The whole sweep by the rows' names, its best at the end; and the paper's number for that one."""
    best = scores.index(max(scores))
    named = {f"lr {lr:g}": score for lr, score in zip(lrs, scores, strict=True)}
    named[f"{args['arch']}, best (lr {lrs[best]:g})"] = scores[best]
    paper = PAPER.get((args["arch"], args["patch_size"]))
    return ({f"{name}, top-{k} %": score[i] for name, score in named.items() for i, k in enumerate((1, 5))},
            {f"{args['arch']}, best (lr {lrs[best]:g}), top-1 %": paper} if paper else {})


def evaluate(flags: Namespace, world: World) -> None:
    """Train the heads, or with --evaluate take those of --output_dir; then a table of the sweep."""
    common.require(flags, n_last_blocks=flags.n_last_blocks >= 0, epochs=flags.epochs >= 1,
                   lr=min(flags.lr) > 0, fraction=0 < flags.fraction <= 1)
    if flags.evaluate and not flags.output_dir:
        raise InputError("--evaluate takes the heads of an earlier run: say where they are with --output_dir")
    if flags.cached is None:
        flags.cached = not (flags.data_path or flags.dataset)
    backbone, args = common.load_backbone(flags, world)
    network = FrozenFeatures(backbone, *blocks_to_read(flags, backbone, args["arch"]))
    view = common.evaluation_view(flags, args)
    images, val, asked = common.load_labelled(flags, world)
    images = images.subset(common.balanced_share(images.labels, flags.fraction, flags.seed))
    batches = common.epoch_batches(images, flags, world)
    classes = 1 + int(torch.cat([images.labels, val.labels]).max())
    heads = make_heads(network.width, classes, len(flags.lr), flags.seed).to(world.device)
    optimizer = make_optimizer(heads, flags.lr, batches.images_per_step)
    run = Progress(Path(flags.output_dir, "linear.pth"), recipe_of(network, images, view, batches, classes, flags),
                   heads=heads, optimizer=optimizer)
    if flags.evaluate or (flags.output_dir and world.all_see(run.path)):
        run.load()
    val_features = extract_features(network, val, view, world, **common.loading(flags, world))
    validate = lambda: accuracies(heads, val_features, val.labels)
    if run.epoch < flags.epochs and not flags.evaluate:
        source = make_source(network, images, view, batches, flags, world)
        train(heads, optimizer, run, batches, source, validate, flags, world)
    data = (f"{common.source(flags)}: {run.recipe['number of images']} images to learn from, {len(val)} asked "
            f"({asked}), {classes} classes, {view.size} pixels; {run.epoch} epochs"
            f"{' of centre views' * run.recipe['cached']}")
    common.tell(flags, world, f"linear (Table 2: ViT-S/16 has {PAPER['vit_small', 16]} % on ImageNet)", args, data,
                *table(validate(), flags.lr, args))


def main(argv: list[str] | None = None) -> None:
    parser = common.command_line(__doc__, batch_size=128)
    add = parser.add_argument
    add("--epochs", type=int, default=100, help="[100]")
    add("--lr", type=float, nargs="+", default=SWEEP, help=f"per 256 images, each for a head of its own {SWEEP}")
    add("--n_last_blocks", type=int, default=0, help="whose [CLS] are joined; default: ViT-B 1, other ViTs 4")
    add("--avgpool_patchtokens", type=true_or_false, help="join the mean patch token; default: true for ViT-B alone")
    add("--cached", type=true_or_false, nargs="?", const=True, help="train on the centre views' features, taken once: "
        "seconds instead of hours, without augmentation; default: for the embedded images alone")
    add("--fraction", type=float, default=1.0, help="share of each class's labels to learn from [1]")
    add("--output_dir", default="", help="keep the heads there after each epoch, and go on from them")
    add("--evaluate", action="store_true", help="only evaluate the heads in --output_dir")
    add("--seed", type=int, default=0, help="[0]")
    common.run(parser, evaluate, argv)


if __name__ == "__main__":
    main()
