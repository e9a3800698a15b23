"""Linear classification of frozen features (Table 2; Sec. 3.2, appendix F.2).

Protocol: SGD with momentum 0.9, no weight decay, 100 epochs, batch 1024 (eight processes of
--batch_size 128), learning rate lr * batch / 256 on a cosine to 0. Random crops and flips to train
on, the centre to test on. ViT-S gives the [CLS] of its last 4 blocks, ViT-B its last [CLS] and mean
patch token, a convnet its pooled features. ViT-S/16 after DINO: 77.0 % on ImageNet.

Each --lr gets a head of its own, and one pass trains them all. The best is picked by its test
accuracy, as paper and release do, which flatters it a little. Departures: the release trains one lr
a run and reports its best epoch, here the last counts; an epoch's incomplete last batch is left
out; the release's [CLS] and mean patch token alternate number by number, here one follows the
other.

--cached learns from centre views. The paper's logistic regressions on frozen features (Tables 10
and 12) come near: ViT-S/16 has 75.7 % with all labels, 72.2 with 10 % and 64.5 with 1 %. Of few
images the same network untrained is evaluated beside it. The paper's number is printed where it is
of the same protocol: ImageNet, 224 pixels, 100 epochs, and these blocks, or this --fraction.

    python -m evals.linear --pretrained_weights runs/demo/checkpoint.pth       # embedded images
    python -m evals.linear --pretrained_weights runs/a/checkpoint.pth --data_path photos/ --cached
    python -m evals.linear --pretrained dino_vits16 --data_path imagenet/ --cached --fraction 0.01
    torchrun --nproc_per_node=8 -m evals.linear --pretrained dino_vits16 --data_path imagenet/ \\
        --output_dir runs/linear

--data_path: class folders (every fifth image is a test image), or train/ and val/ with such. A
stopped run starts again from the beginning. --output_dir keeps the heads for programs of your own.

Shapes: B images, S pixels, D width, d of the joined features, C classes, H heads (one for each lr),
n test images.
"""
import copy
import math
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2.functional import resized_crop
from tqdm import tqdm

from data import Images
from evals import common
from features import EvaluationView, extract_features, normalise, top_accuracy
from optimizer import cosine
from runtime.commandline import InputError, bar_style, true_or_false
from runtime.hardware import World
from runtime.sampling import EpochBatches
from training import evaluation
from training.checkpoint import save_checkpoint

# Table 2 and appendix F.2: top-1 on ImageNet in %, by blocks and mean patch token
PAPER = {
    ("vit_small", 16): {(1, False): 76.1, (2, False): 76.6, (4, False): 77.0, (6, False): 77.0},
    ("vit_small", 8): {(4, False): 79.7},
    ("vit_base", 16): {(1, True): 78.2, (1, False): 78.0},
    ("vit_base", 8): {(1, True): 80.1},
    ("resnet50", 1): {(1, False): 75.3},
}
# Tables 10 and 12: by the fraction of the labels; a logistic regression, without augmentation
LOGISTIC = {("vit_small", 16): {1.0: 75.7, 0.1: 72.2, 0.01: 64.5}}
EPOCHS = 100
UNTRAINED = "untrained"
# the release's default for ViTs is 0.001
SWEEP = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]

# calling one gives an epoch's batches of features (B, d) and labels (B,)
Source = Callable[[], Iterable[tuple[Tensor, Tensor]]]


class FrozenFeatures(nn.Module):
    """[CLS] of the last blocks, joined, then the last mean patch token if avgpool.

    (B, 3, S, S) -> (B, d), where d, here width, is D * (n_last_blocks + avgpool). A convnet
    gives its pooled features.
    """

    def __init__(self, backbone: nn.Module, n_last_blocks: int, avgpool: bool):
        super().__init__()
        self.backbone = backbone
        self.n_last_blocks = n_last_blocks
        self.avgpool = avgpool
        self.width = backbone.embed_dim * n_last_blocks
        if avgpool:
            self.width += backbone.embed_dim

    def forward(self, images: Tensor) -> Tensor:
        if not hasattr(self.backbone, "get_intermediate_layers"):
            return self.backbone(images)
        layers = self.backbone.get_intermediate_layers(images, self.n_last_blocks)
        parts = [tokens[:, 0] for tokens in layers]  # [CLS] of each block
        if self.avgpool:
            parts.append(layers[-1][:, 1:].mean(dim=1))
        return torch.cat(parts, dim=1)


class TrainingView:
    """A random crop of 8 to 100 % of the area, resized, flipped half the time.

    uint8 (3, H, W) -> float (3, S, S).
    """

    def __init__(self, centre: EvaluationView):
        self.size = centre.size
        self.mean = centre.mean
        self.std = centre.std

    def __call__(self, image: Tensor) -> Tensor:
        box = RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
        size = [self.size, self.size]
        image = resized_crop(image, *box, size, InterpolationMode.BILINEAR, antialias=True)
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        return normalise(image, self.mean, self.std)


def make_heads(width: int, classes: int, number: int, seed: int = 0) -> nn.ModuleList:
    """Return so many classifiers (B, d) -> (B, C), with weights from N(0, 0.01) and no bias.

    All start alike, so that only the learning rate differs.
    """
    head = nn.Linear(width, classes)
    nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    return nn.ModuleList(copy.deepcopy(head) for _ in range(number))


def make_optimizer(
    heads: nn.ModuleList, lrs: list[float], images_per_step: int
) -> torch.optim.SGD:
    """Return SGD with one group a head, since heads differ in their rate: lr * batch / 256."""
    groups = []
    for head, lr in zip(heads, lrs, strict=True):
        groups.append({"params": list(head.parameters()), "peak_lr": lr * images_per_step / 256})
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9)


def set_lr(optimizer: torch.optim.SGD, epoch: int, epochs: int) -> None:
    """Set lr = peak / 2 * (1 + cos(pi * epoch / epochs)), once an epoch as in the release."""
    for group in optimizer.param_groups:
        group["lr"] = cosine(epoch, epochs, group["peak_lr"], 0.0)


def train_epoch(
    heads: nn.ModuleList,
    optimizer: torch.optim.SGD,
    batches: Iterable[tuple[Tensor, Tensor]],
    world: World,
) -> Tensor:
    """Train the heads on batches of features (B, d) and labels (B,).

    Return each head's mean cross-entropy (H,) in nats.
    """
    epoch_losses = []
    for features, labels in batches:
        features = features.to(world.device)
        labels = labels.to(world.device)
        losses = torch.stack([F.cross_entropy(head(features), labels) for head in heads])
        optimizer.zero_grad()
        # the heads share no weight: each gets the gradient of its own loss
        losses.sum().backward()
        for param in heads.parameters():
            param.grad = world.mean(param.grad)
        optimizer.step()
        epoch_losses.append(losses.detach())
    return world.mean(torch.stack(epoch_losses).mean(dim=0))


@torch.no_grad()
def accuracies(
    heads: nn.ModuleList, features: Tensor, labels: Tensor
) -> list[tuple[float, float]]:
    """Return (top-1, top-5) in % of each head: features (n, d), labels (n,)."""
    scores = []
    for head in heads:
        logits = head(features.to(head.weight.device)).cpu()
        if logits.isfinite().all():
            scores.append((top_accuracy(logits, labels), top_accuracy(logits, labels, 5)))
        else:  # it diverged, and topk would take NaN for the largest number of all
            scores.append((0.0, 0.0))
    return scores


def blocks_to_read(flags: Namespace, backbone: nn.Module, arch: str) -> tuple[int, bool]:
    """Return --n_last_blocks and --avgpool_patchtokens, or what the paper takes for this arch."""
    blocks = len(getattr(backbone, "blocks", []))
    if blocks == 0:
        if flags.n_last_blocks or flags.avgpool_patchtokens:
            raise InputError(
                f"--n_last_blocks and --avgpool_patchtokens are for ViTs: leave them out for {arch}"
            )
        return 1, False
    n_last_blocks, avgpool = 4, False
    if arch == "vit_base":
        n_last_blocks, avgpool = 1, True
    if flags.n_last_blocks:
        n_last_blocks = flags.n_last_blocks
    if flags.avgpool_patchtokens is not None:
        avgpool = flags.avgpool_patchtokens
    if n_last_blocks > blocks:
        raise InputError(
            f"--n_last_blocks {n_last_blocks} is more than the {blocks} blocks of {arch}: lower it"
        )
    return n_last_blocks, avgpool


def make_source(
    network: nn.Module,
    images: Images,
    view: EvaluationView,
    batches: EpochBatches,
    flags: Namespace,
    world: World,
) -> Source:
    """Return what gives an epoch's batches of features (B, d) and labels (B,).

    They are of augmented views. With --cached they are of centre views, extracted once.
    """
    if flags.cached:
        loading = evaluation.loading(flags, world)
        cached = extract_features(network, images, view, world, **loading)

        def centre_views() -> Iterator[tuple[Tensor, Tensor]]:
            for keys in batches:
                rows = [index for _, index in keys]
                yield cached[rows], images.labels[rows]

        return centre_views

    loader = common.training_loader(images, TrainingView(view), batches, flags, world)

    def augmented_views() -> Iterator[tuple[Tensor, Tensor]]:
        for views, labels in loader:
            with torch.no_grad(), world.autocast():
                features = network(views.to(world.device, non_blocking=True))
            yield features.float(), labels

    return augmented_views


def train_heads(
    heads: nn.ModuleList,
    source: Source,
    batches: EpochBatches,
    test_accuracies: Callable[[], list[tuple[float, float]]],
    flags: Namespace,
    world: World,
) -> None:
    """Train the heads for --epochs, and print ten times how far they are.

    test_accuracies: returns (top-1, top-5) in % of each head.
    """
    optimizer = make_optimizer(heads, flags.lr, batches.images_per_step)
    for epoch in range(flags.epochs):
        batches.epoch = epoch  # another order, and other crops
        set_lr(optimizer, epoch, flags.epochs)
        title = f"epoch {epoch + 1} of {flags.epochs}"
        hidden = not world.is_main
        bar = tqdm(
            source(), title, batches.steps, leave=False, disable=hidden, **bar_style()
        )
        losses = train_epoch(heads, optimizer, bar, world)
        if world.is_main and (epoch + 1) % math.ceil(flags.epochs / 10) == 0:
            scores = test_accuracies()
            best = scores.index(max(scores))
            print(
                f"{title}: top-1 {scores[best][0]:.2f} % at lr {flags.lr[best]:g}, "
                f"loss {losses[best]:.3f}"
            )


def best_row(name: str, scores: list[tuple[float, float]], lrs: list[float]) -> str:
    """Return the name of the row of a network's best head."""
    return f"{name}, best (lr {lrs[scores.index(max(scores))]:g})"


def sweep_table(
    scores: dict[str, list[tuple[float, float]]], lrs: list[float], arch: str
) -> dict[str, float]:
    """Return the whole sweep by the rows' names, and last each network's best.

    scores: (top-1, top-5) in % of each head, by network: arch and, of few images, UNTRAINED.
    """
    rows = {f"lr {lr:g}": score for lr, score in zip(lrs, scores[arch], strict=True)}
    for name, of_network in scores.items():
        rows[best_row(name, of_network, lrs)] = max(of_network)
    measured = {}
    for row, (top1, top5) in rows.items():
        measured[f"{row}, top-1 %"] = top1
        measured[f"{row}, top-5 %"] = top5
    return measured


def paper_number(
    flags: Namespace, args: dict, classes: int, size: int, read: tuple[int, bool]
) -> float | None:
    """Return the paper's top-1 in % of this network, on these images and by this protocol.

    None where the paper has no such number. size: pixels of the view. read: blocks_to_read's.
    """
    network = (args["arch"], args["patch_size"])
    if not evaluation.is_imagenet(flags, classes) or size != 224 or flags.epochs != EPOCHS:
        return None
    if flags.cached:  # the paper does not say which blocks its logistic regression reads
        return LOGISTIC.get(network, {}).get(flags.fraction)
    if flags.fraction < 1:
        return None
    return PAPER.get(network, {}).get(read)


def measure_linear(flags: Namespace, world: World) -> None:
    """Train the heads, and report the sweep."""
    require = evaluation.require
    require(flags, "n_last_blocks", flags.n_last_blocks >= 0, "at least 1, such as 4")
    require(flags, "epochs", flags.epochs >= 1, "at least 1, such as 100")
    require(flags, "lr", min(flags.lr) > 0, "above 0, such as 0.001")
    require(flags, "fraction", 0 < flags.fraction <= 1, "above 0 and at most 1, such as 0.1")
    if flags.cached is None:
        flags.cached = not (flags.data_path or flags.dataset)

    backbone, args = evaluation.load_backbone(flags, world)
    arch = args["arch"]
    read = blocks_to_read(flags, backbone, arch)
    view = evaluation.evaluation_view(flags, args)
    train, test, which = evaluation.load_labelled(flags, world, args)
    train = train.subset(common.balanced_fraction(train.labels, flags.fraction, flags.seed))
    classes = 1 + int(torch.cat([train.labels, test.labels]).max())
    batches = common.epoch_batches(train, flags, world)

    backbones = {arch: backbone}
    if flags.cached and len(train) + len(test) <= evaluation.FEW:
        backbones[UNTRAINED] = evaluation.untrained(args, world)
    loading = evaluation.loading(flags, world)
    scores, heads = {}, {}
    for name, one in backbones.items():
        network = FrozenFeatures(one, *read)
        source = make_source(network, train, view, batches, flags, world)
        test_features = extract_features(network, test, view, world, **loading)
        made = make_heads(network.width, classes, len(flags.lr), flags.seed)
        heads[name] = made.to(world.device)
        test_accuracies = partial(accuracies, heads[name], test_features, test.labels)
        if world.is_main:
            print(f"linear layers on {name}")
        train_heads(heads[name], source, batches, test_accuracies, flags, world)
        scores[name] = test_accuracies()
    if flags.output_dir and world.is_main:
        save_checkpoint(
            Path(flags.output_dir, "linear.pth"),
            {"heads": heads[arch].state_dict(), "lr": flags.lr},
        )

    data = (
        f"{evaluation.data_name(flags)}: {len(train)} images train, {len(test)} test ({which}), "
        f"{classes} classes, {view.size} pixels; {flags.epochs} epochs"
    )
    if flags.cached:
        data += " of centre views"
    paper = {}
    number = paper_number(flags, args, classes, view.size, read)
    if number is not None and which == "the test part":  # as the paper has
        paper[f"{best_row(arch, scores[arch], flags.lr)}, top-1 %"] = number
    title = title_of(flags)
    measured = sweep_table(scores, flags.lr, arch)
    evaluation.report(flags, world, title, args, data, measured, paper)


def title_of(flags: Namespace) -> str:
    """Return the table's title: the task, and what the paper has by the nearest protocol."""
    if not flags.cached:
        return "linear (Table 2: ViT-S/16 has 77.0 % on ImageNet)"
    logistic = LOGISTIC["vit_small", 16].get(flags.fraction)
    if logistic is None:
        return "linear, centre views (Table 12 has other fractions of the labels)"
    table = "Table 10" if flags.fraction == 1 else "Table 12"
    return (
        f"linear, centre views ({table}: logistic regression, ViT-S/16 has {logistic} % on "
        "ImageNet)"
    )


def main(argv: list[str] | None = None) -> None:
    parser = evaluation.command_line(__doc__, batch_size=128)
    add = parser.add_argument
    add("--epochs", type=int, default=EPOCHS, help=f"[{EPOCHS}]")
    add("--lr", type=float, nargs="+", default=SWEEP,
        help=f"per 256 images, each for a head of its own {SWEEP}")
    add("--n_last_blocks", type=int, default=0,
        help="how many blocks' [CLS] are joined; default: ViT-B 1, other ViTs 4")
    add("--avgpool_patchtokens", type=true_or_false,
        help="join the mean patch token; default: true for ViT-B alone")
    add("--cached", type=true_or_false, nargs="?", const=True,
        help="train on the centre views' features, extracted once: seconds instead of hours, "
        "without augmentation; default: for the embedded images alone")
    add("--fraction", type=float, default=1.0,
        help="fraction of each class's labels to learn from [1]")
    add("--output_dir", default="", help="keep the heads there, in linear.pth")
    add("--seed", type=int, default=0, help="of the heads, the fraction, order and crops [0]")
    flags = parser.parse_args(argv)
    with evaluation.start(flags) as world:
        measure_linear(flags, world)


if __name__ == "__main__":
    main()
