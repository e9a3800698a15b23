"""k-NN classification with frozen features (Sec. 4.1, Table 2): the paper's quickest measure of what was learnt.

The k pictures whose features have the largest cosine with a picture's vote for their label, each with
exp(cosine / 0.07). Nothing is trained and nothing is augmented. ViT-S/16 after DINO: 74.5 % on ImageNet at k = 20.

    python eval_knn.py --pretrained_weights runs/mine/checkpoint.pth --data_path photos/

Shapes: N pictures that vote, n pictures asked, D width, C classes.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
import hardware
from commandline import CommandLine, InputError, errors_in_one_line
from data import Pictures, knn_split, open_pictures, without_unreadable
from features import EvaluationView, Pixels, extract_features
from hardware import Hardware


def nearest_neighbours(train_features: Tensor, test_features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest cosines of each row and whose they are, falling: (N, D), (n, D) -> (n, k) twice."""
    train_features, k = F.normalize(train_features, dim=1), min(k, len(train_features))
    some = F.normalize(test_features, dim=1).split(1000)  # so that n x N never stands in memory
    found = [(rows @ train_features.T).topk(k, dim=1) for rows in some]
    return torch.cat([cosine for cosine, _ in found]), torch.cat([index for _, index in found])


def knn_votes(cosines: Tensor, labels: Tensor, num_classes: int, temperature: float = 0.07) -> Tensor:
    """votes[i, c] = sum of exp(cosine / T) over the neighbours of label c: (n, k), (n, k) -> (n, C)."""
    weights = ((cosines - 1) / temperature).exp()  # the - 1 changes no winner, and nothing overflows
    return torch.zeros(len(cosines), num_classes).scatter_add_(1, labels, weights)


def top_accuracy(votes: Tensor, labels: Tensor, among: int = 1) -> float:
    """How often the right label is among the first: votes (n, C), labels (n,) -> %."""
    first = votes.topk(min(among, votes.shape[1]), dim=1).indices
    return 100 * (first == labels[:, None]).any(dim=1).float().mean().item()


def knn_accuracies(network: nn.Module, split: tuple[Pictures, Pictures], view: EvaluationView, where: Hardware,
                   ks: tuple[int, ...] = (20,), temperature: float = 0.07, **loading) -> dict[int, tuple[float, float]]:
    """k -> (top-1, top-5) in % of the network's features, extracted by all processes."""
    train, test = split
    train_features, test_features = (extract_features(network, part, view, where, **loading) for part in split)
    cosines, nearest = nearest_neighbours(train_features, test_features, max(ks))
    votes = {k: knn_votes(cosines[:, :k], train.labels[nearest[:, :k]], len(train.classes), temperature) for k in ks}
    return {k: (top_accuracy(votes[k], test.labels), top_accuracy(votes[k], test.labels, 5)) for k in ks}


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--pretrained_weights", default="", metavar="FILE", help="a checkpoint of ours, of the release, or of timm")
    add("--checkpoint_key", default="teacher", choices=("teacher", "student"), help="whose weights to take")
    add("--pretrained", default="", metavar="NAME", help=f"the authors' weights: {', '.join(checkpoint.PRETRAINED)}")
    add("--arch", default="", help="only where the file does not say")
    add("--data_path", default="", help="a folder of class folders, or with train/ and val/; else embedded pictures")
    add("--dataset", default="", help="one of torchvision's instead: cifar10, flowers102 ...")
    add("--download", action="store_true", help="fetch --dataset over the network")
    add("--skip_bad_images", action="store_true", help="leave out what cannot be read")
    add("--nb_knn", type=int, nargs="+", default=[10, 20, 100, 200], help="k, how many neighbours vote [10 20 100 200]")
    add("--temperature", type=float, default=0.07, help="of the votes [0.07]")
    add("--eval_size", type=int, default=0, help="pixels of the centre crop; default: the checkpoint's, or 224")
    add("--batch_size", type=int, default=100)
    add("--num_workers", type=int, default=-1, help="that decode pictures; -1: one a core, on a CPU one in four cores")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    add("--precision", default="fp32", choices=("auto", "fp32", "bf16"))
    flags = parser.parse_args(argv)
    with errors_in_one_line(), hardware.start(flags.device, flags.precision) as where:
        evaluate(flags, where)


def evaluate(flags, where: Hardware) -> None:
    """Load, split, and print a table: k, top-1, top-5, and the same for raw pixels."""
    for flag, holds in (("nb_knn", min(flags.nb_knn) >= 1), ("temperature", flags.temperature > 0),
                        ("batch_size", flags.batch_size >= 1), ("eval_size", flags.eval_size >= 0),
                        ("num_workers", flags.num_workers >= -1)):
        if not holds:
            raise InputError(f"--{flag} {getattr(flags, flag)} is out of range")
    with where.main_first(flags.download or bool(flags.pretrained)):
        backbone, args = checkpoint.load_backbone(checkpoint.weights_path(flags), flags.checkpoint_key, flags.arch)
        train, val = open_pictures(flags.data_path, flags.dataset, flags.download)
    size = flags.eval_size or args.get("eval_size", 224)
    if size % args["patch_size"]:
        raise InputError(f"--eval_size {size} must be a multiple of the patch size {args['patch_size']}")
    if flags.skip_bad_images:
        train, val = (part and without_unreadable(part)[0] for part in (train, val))
    split = knn_split(train, val)
    if split is None:
        raise InputError(f"--data_path {flags.data_path!r} has no labels to vote, or fewer than 5 pictures: put "
                         "pictures into class folders")

    view = EvaluationView(size, *(args[name] for name in ("eval_crop", "mean", "std") if name in args))
    ks = tuple(k for k in flags.nb_knn if k <= len(split[0])) or (len(split[0]),)
    options = {"batch_size": flags.batch_size, "num_workers": hardware.share_cores(flags.num_workers, where.device),
               "progress": "features"}
    networks = {args["arch"]: backbone.to(where.device)}
    if len(split[0]) + len(split[1]) <= 20_000:  # more raw pixels than that fill the memory
        networks["raw pixels"] = Pixels()
    found = {name: knn_accuracies(network, split, view, where, ks, flags.temperature, **options)
             for name, network in networks.items()}
    if where.is_main:
        held_out = "the evaluation part" if val is not None else "every fifth picture"
        print(f"{len(split[0])} pictures vote, {len(split[1])} asked ({held_out}), {len(train.classes)} classes, "
              f"{args['arch']}, patches of {args['patch_size']}, {size} pixels")
        for name, by_k in found.items():
            for k, (top1, top5) in by_k.items():
                print(f"{name:>12}   k = {k:<4d}  top-1 {top1:6.2f} %   top-5 {top5:6.2f} %")


if __name__ == "__main__":
    main()
