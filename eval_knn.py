"""k-NN classification with frozen features (Table 2; Sec. 3.2, appendix F.1): the quickest measure of what was learnt.

The k images whose features have the largest cosine with an image's vote for their label, each with
exp(cosine / 0.07). Nothing is trained and nothing is augmented. ViT-S/16 after DINO: 74.5 % on ImageNet at k = 20;
89.1 % on Flowers (Table 10).

    python eval_knn.py --pretrained_weights runs/mine/checkpoint.pth --data_path photos/
    python eval_knn.py --pretrained dino_vits16 --data_path imagenet/ --dump_features vits16.pth
    python eval_knn.py --load_features vits16.pth --nb_knn 5 20

--data_path: a folder of class folders (every fifth image is asked, the others vote), or with train/ and val/ in it.

Shapes: N images that vote, n images asked, D width, C classes.
"""
from argparse import Namespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Images
from features import EvaluationView, Pixels, among_first, extract_features
from runtime.commandline import InputError
from runtime.hardware import World
from training import evaluation as common
from training.checkpoint import read_checkpoint, save_checkpoint

PAPER = {("vit_small", 16): 74.5, ("vit_small", 8): 78.3, ("vit_base", 16): 76.1, ("vit_base", 8): 77.4,
         ("resnet50", 1): 67.5}  # Table 2: top-1 on ImageNet, k = 20
ALONE = World(0, 1, torch.device("cpu"), torch.float32)  # where no other process shares the work


def nearest_neighbours(train_features: Tensor, test_features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest cosines of each row and whose they are, falling: (N, D), (n, D) -> (n, k) twice."""
    train_features, k = F.normalize(train_features, dim=1), min(k, len(train_features))
    some = F.normalize(test_features, dim=1).split(1000)  # so that n x N never stands in memory
    found = [(rows @ train_features.T).topk(k, dim=1) for rows in some]
    return torch.cat([cosine for cosine, _ in found]), torch.cat([index for _, index in found])


def knn_votes(cosines: Tensor, labels: Tensor, num_classes: int, temperature: float = 0.07) -> Tensor:
    """votes[i, c] = sum of exp(cosine / T) over the neighbours of label c, up to a factor of the row i.

    (n, k), (n, k) -> (n, C).
    """
    largest = cosines.max(dim=1, keepdim=True).values  # taken off, a row's votes neither overflow nor all vanish
    weights = ((cosines - largest) / temperature).exp()
    return torch.zeros(len(cosines), num_classes).scatter_add_(1, labels, weights)


class LabelledFeatures(NamedTuple):
    """Features (N, D) and labels (N,) that vote, features (n, D) and labels (n,) of the images asked."""

    train_features: Tensor
    train_labels: Tensor
    test_features: Tensor
    test_labels: Tensor


def extract(network: nn.Module, split: tuple[Images, Images], view: EvaluationView, world: World,
            **loading) -> LabelledFeatures:
    """The network's features of both parts, shared over the processes."""
    return LabelledFeatures(*(tensor for part in split for tensor in (
        extract_features(network, part, view, world, **loading), part.labels)))


def right_answers(data: LabelledFeatures, rows: Tensor, ks: tuple[int, ...], temperature: float) -> Tensor:
    """How many of these of the images asked get the right label, first and among five -> a row (2,) for each k."""
    cosines, nearest = nearest_neighbours(data.train_features, data.test_features[rows], max(ks))
    classes = 1 + int(torch.cat([data.train_labels, data.test_labels]).max())
    right = torch.zeros(len(ks), 2, dtype=torch.double)
    for some in torch.arange(len(rows)).split(1000):  # so that n x C never stands in memory
        labels, wanted = data.train_labels[nearest[some]], data.test_labels[rows[some]]
        for i, k in enumerate(ks):
            votes = knn_votes(cosines[some, :k], labels[:, :k], classes, temperature)
            right[i] += torch.stack([among_first(votes, wanted, among).sum() for among in (1, 5)])
    return right


def knn_accuracies(data: LabelledFeatures, ks: tuple[int, ...] = (20,), temperature: float = 0.07,
                   world: World = ALONE) -> dict[int, list[float]]:
    """k -> [top-1, top-5] in %; each process answers for its share of the images asked."""
    asked = len(data.test_labels)
    share = torch.arange(asked).tensor_split(world.size)[world.rank]
    right = world.total(right_answers(data, share, ks, temperature))
    return dict(zip(ks, (100 * right / asked).tolist()))


def main(argv: list[str] | None = None) -> None:
    parser = common.command_line(__doc__)
    add = parser.add_argument
    add("--nb_knn", type=int, nargs="+", default=[10, 20, 100, 200], help="k, how many neighbours vote [10 20 100 200]")
    add("--temperature", type=float, default=0.07, help="of the votes [0.07]")
    add("--dump_features", default="", metavar="FILE", help="keep the features there")
    add("--load_features", default="", metavar="FILE", help="and vote with them again, without weights and images")
    common.run(parser, evaluate, argv)


def evaluate(flags: Namespace, world: World) -> None:
    """Features from the network or from a file, then a table of top-1 and top-5 for every k."""
    common.require(flags, nb_knn=min(flags.nb_knn) >= 1, temperature=flags.temperature > 0)
    features, args, data = load_features(flags) if flags.load_features else features_of(flags, world)
    if flags.dump_features and world.is_main:
        save_checkpoint(flags.dump_features, {"features": {k: v._asdict() for k, v in features.items()}, "args": args,
                                              "data": data, "weights": flags.pretrained_weights or flags.pretrained})
    voters = min(len(one.train_labels) for one in features.values())
    ks = tuple(k for k in flags.nb_knn if k <= voters) or (voters,)
    measured = {}
    for name, one in features.items():
        for k, (top1, top5) in knn_accuracies(one, ks, flags.temperature, world).items():
            measured |= {f"{name}, k = {k}, top-1 %": top1, f"{name}, k = {k}, top-5 %": top5}
    paper = PAPER.get((args["arch"], args["patch_size"]))
    common.tell(flags, world, f"k-NN (Table 2: ViT-S/16 has {PAPER['vit_small', 16]} % on ImageNet)", args, data,
                measured, {f"{args['arch']}, k = 20, top-1 %": paper} if paper else {})


def features_of(flags: Namespace, world: World) -> tuple[dict[str, LabelledFeatures], dict, str]:
    """(features of the network and of raw pixels by name, the network's flags, what data it was)."""
    backbone, args = common.load_backbone(flags, world)
    *split, asked = common.load_labelled(flags, world)
    networks = {args["arch"]: backbone}
    if len(split[0]) + len(split[1]) <= 20_000:  # more raw pixels than that fill the memory
        networks["raw pixels"] = Pixels()
    view = common.evaluation_view(flags, args)
    features = {name: extract(network, split, view, world, **common.loading(flags, world))
                for name, network in networks.items()}
    return features, args, (f"{common.source(flags)}: {len(split[0])} images vote, {len(split[1])} asked "
                            f"({asked}), {len(split[0].classes)} classes, {view.size} pixels")


def load_features(flags: Namespace) -> tuple[dict[str, LabelledFeatures], dict, str]:
    """The same from a file that --dump_features wrote; --pretrained_weights becomes what it was then."""
    stored = read_checkpoint(flags.load_features)
    try:
        features = {name: LabelledFeatures(**one) for name, one in stored["features"].items()}
        pairs = [pair for one in features.values() for pair in (one[:2], one[2:])]
        if not pairs or not all(0 < len(rows) == len(labels) for rows, labels in pairs):
            raise ValueError
        args = {"arch": str(stored["args"]["arch"]), "patch_size": int(stored["args"]["patch_size"])}
        flags.pretrained_weights = str(stored.get("weights", ""))
        return features, args, stored["data"]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"--load_features {flags.load_features!r} was not written by --dump_features: make it with "
                         "that") from None


if __name__ == "__main__":
    main()
