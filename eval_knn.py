"""k-NN classification with frozen features (Table 2; Sec. 3.2, appendix F.1).

The quickest measure of what was learnt: nothing is trained and nothing is augmented. The k train
images nearest to a test image, by the cosine of their features, vote for their labels, each with
exp(cosine / 0.07). ViT-S/16 after DINO: 74.5 % on ImageNet at k = 20; 89.1 % on Flowers (Table 10).

    python eval_knn.py --pretrained_weights runs/mine/checkpoint.pth --data_path photos/
    python eval_knn.py --pretrained dino_vits16 --data_path imagenet/ --dump_features vits16.pth

--data_path: a folder of class folders (every fifth image is a test image), or with train/ and val/
in it. --dump_features keeps features and labels for programs of your own: torch.load reads them.

Shapes: N train images, n test images, D numbers a feature, C classes.
"""
from argparse import Namespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Images
from features import EvaluationView, Pixels, among_first, extract_features
from runtime.hardware import World
from training.checkpoint import save_checkpoint

PAPER = {  # Table 2: top-1 on ImageNet in %, k = 20
    ("vit_small", 16): 74.5,
    ("vit_small", 8): 78.3,
    ("vit_base", 16): 76.1,
    ("vit_base", 8): 77.4,
    ("resnet50", 1): 67.5,
}
ALONE = World(0, 1, torch.device("cpu"), torch.float32)  # one process
ROWS = 1000  # test images at a time, so that no n x N or n x C numbers stand in memory


class LabelledFeatures(NamedTuple):
    """Features (N, D) and labels (N,) of the train images, (n, D) and (n,) of the test images."""

    train_features: Tensor
    train_labels: Tensor
    test_features: Tensor
    test_labels: Tensor


def extract(
    network: nn.Module,
    split: tuple[Images, Images],
    view: EvaluationView,
    world: World,
    **loading,
) -> LabelledFeatures:
    """Return the network's features of the train and the test images."""
    train, test = split
    train_features = extract_features(network, train, view, world, **loading)
    test_features = extract_features(network, test, view, world, **loading)
    return LabelledFeatures(train_features, train.labels, test_features, test.labels)


def nearest_neighbours(
    train_features: Tensor, test_features: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Return the k largest cosines of each test image, falling, and the train images they are with.

    (N, D), (n, D) -> (n, k), (n, k).
    """
    train_features = F.normalize(train_features, dim=1)
    test_features = F.normalize(test_features, dim=1)
    k = min(k, len(train_features))
    found = []
    for rows in test_features.split(ROWS):
        found.append((rows @ train_features.T).topk(k, dim=1))
    cosines, nearest = zip(*found)
    return torch.cat(cosines), torch.cat(nearest)


def knn_votes(
    cosines: Tensor, labels: Tensor, num_classes: int, temperature: float = 0.07
) -> Tensor:
    """Return votes[i, c] = sum of exp(cosine / T) over the neighbours with label c.

    Each row may have a factor of its own: (n, k), (n, k) -> (n, C).
    """
    # without its largest cosine, a row's votes neither overflow nor all vanish at a low T
    largest = cosines.max(dim=1, keepdim=True).values
    weights = ((cosines - largest) / temperature).exp()
    votes = torch.zeros(len(cosines), num_classes)
    return votes.scatter_add_(1, labels, weights)


def count_right(
    data: LabelledFeatures, tests: Tensor, ks: tuple[int, ...], temperature: float
) -> Tensor:
    """Return how many of these test images get the right label, first and among five.

    tests: their indices. -> double (number of ks, 2).
    """
    test_features = data.test_features[tests]
    test_labels = data.test_labels[tests]
    cosines, nearest = nearest_neighbours(data.train_features, test_features, max(ks))
    labels = data.train_labels[nearest]
    num_classes = 1 + int(torch.cat([data.train_labels, data.test_labels]).max())
    right = torch.zeros(len(ks), 2, dtype=torch.double)
    for rows in torch.arange(len(tests)).split(ROWS):
        for i, k in enumerate(ks):  # the k nearest stand in the first k columns
            votes = knn_votes(cosines[rows, :k], labels[rows, :k], num_classes, temperature)
            right[i, 0] += among_first(votes, test_labels[rows], 1).sum()
            right[i, 1] += among_first(votes, test_labels[rows], 5).sum()
    return right


def knn_accuracies(
    data: LabelledFeatures,
    ks: tuple[int, ...] = (20,),
    temperature: float = 0.07,
    world: World = ALONE,
) -> dict[int, list[float]]:
    """Return k -> [top-1, top-5] in %. The processes share the test images."""
    number = len(data.test_labels)
    mine = torch.arange(number).tensor_split(world.size)[world.rank]
    right = world.total(count_right(data, mine, ks, temperature))
    accuracies = (100 * right / number).tolist()
    return dict(zip(ks, accuracies))


def measure_knn(flags: Namespace, world: World) -> None:
    """Extract the features, and report top-1 and top-5 for every k."""
    from training import evaluation

    evaluation.require(flags, "nb_knn", min(flags.nb_knn) >= 1, "at least 1, such as 20")
    evaluation.require(flags, "temperature", flags.temperature > 0, "above 0, such as 0.07")

    backbone, args = evaluation.load_backbone(flags, world)
    train, test, which = evaluation.load_labelled(flags, world)
    view = evaluation.evaluation_view(flags, args)
    networks = {args["arch"]: backbone}
    if len(train) + len(test) <= 20_000:  # the pixels of more images fill the memory
        networks["raw pixels"] = Pixels()
    loading = evaluation.loading(flags, world)
    features = {}
    for name, network in networks.items():
        features[name] = extract(network, (train, test), view, world, **loading)

    data = (
        f"{evaluation.data_name(flags)}: {len(train)} images train, {len(test)} test ({which}), "
        f"{len(train.classes)} classes, {view.size} pixels"
    )
    if flags.dump_features and world.is_main:
        save_checkpoint(flags.dump_features, {
            "features": {name: kept._asdict() for name, kept in features.items()},
            "args": args,
            "data": data,
            "weights": flags.pretrained_weights or flags.pretrained,
        })

    # a k beyond the number of train images is left out; if all are, all train images vote
    ks = tuple(k for k in flags.nb_knn if k <= len(train))
    if not ks:
        ks = (len(train),)
    measured = {}
    for name, kept in features.items():
        for k, (top1, top5) in knn_accuracies(kept, ks, flags.temperature, world).items():
            measured[f"{name}, k = {k}, top-1 %"] = top1
            measured[f"{name}, k = {k}, top-5 %"] = top5
    paper = {}
    if (args["arch"], args["patch_size"]) in PAPER:
        paper[f"{args['arch']}, k = 20, top-1 %"] = PAPER[args["arch"], args["patch_size"]]
    title = f"k-NN (Table 2: ViT-S/16 has {PAPER['vit_small', 16]} % on ImageNet)"
    evaluation.report(flags, world, title, args, data, measured, paper)


def main(argv: list[str] | None = None) -> None:
    # here and not above: train.py takes the vote from this file, and needs no evaluation's flags
    from training import evaluation

    parser = evaluation.command_line(__doc__)
    add = parser.add_argument
    add("--nb_knn", type=int, nargs="+", default=[10, 20, 100, 200],
        help="k, how many neighbours vote [10 20 100 200]")
    add("--temperature", type=float, default=0.07, help="of the votes [0.07]")
    add("--dump_features", default="", metavar="FILE", help="keep features and labels there")
    flags = parser.parse_args(argv)
    with evaluation.start(flags) as world:
        measure_knn(flags, world)


if __name__ == "__main__":
    main()
