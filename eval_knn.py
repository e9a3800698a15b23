"""k-NN classification with frozen features (Table 2; Sec. 3.2, appendix F.1).

The quickest measure of what was learnt: nothing is trained and nothing is augmented. The k train
images nearest to a test image, by the cosine of their features, vote for their labels, each with
exp(cosine / 0.07). ViT-S/16 after DINO: 74.5 % on ImageNet at k = 20; 89.1 % on Flowers (Table 10).
With at most 20,000 images the untrained network and raw pixels are measured too.

    python eval_knn.py --pretrained_weights runs/mine/checkpoint.pth --data_path photos/
    python eval_knn.py --pretrained dino_vits16 --data_path imagenet/ --dump_features vits16.pth

--data_path: a folder of class folders (every fifth image is a test image), or with train/ and val/
in it. --dump_features keeps features, labels and file names for programs of your own: torch.load
reads them. It takes any folder of images: without labels it is all that is done.

Shapes: N train images, n test images, D numbers a feature, C classes.
"""
from argparse import Namespace

import torch

from data import Images, knn_split
from features import LabelledFeatures, Pixels, extract, knn_accuracies
from runtime.hardware import World
from training import evaluation
from training.checkpoint import save_checkpoint

PAPER = {  # Table 2: top-1 on ImageNet in %, k = 20
    ("vit_small", 16): 74.5,
    ("vit_small", 8): 78.3,
    ("vit_base", 16): 76.1,
    ("vit_base", 8): 77.4,
    ("resnet50", 1): 67.5,
}
FLOWERS = {("vit_small", 16): 89.1}  # Table 10
UNTRAINED = "untrained"


def paper_number(flags: Namespace, args: dict, classes: int, size: int) -> float | None:
    """Return the paper's top-1 in % of this network, on these images and by this protocol.

    None where the paper has no such number. size: pixels of the view.
    """
    network = (args["arch"], args["patch_size"])
    if size != 224 or flags.temperature != 0.07:
        return None
    if flags.dataset == "flowers102":
        return FLOWERS.get(network)
    if evaluation.is_imagenet(flags, classes):
        return PAPER.get(network)
    return None


def without_labels(train: Images, test: Images | None) -> tuple[Images, Images]:
    """Return the images with the label -1 where they have none; no test part is an empty one."""
    if test is None:
        test = train.subset(torch.empty(0, dtype=torch.long))
    for images in (train, test):
        if images.labels is None:
            images.labels = torch.full((len(images),), -1)
    return train, test


def file_names(images: Images) -> list[str]:
    """Return the images' files; images that are no files have none."""
    if not isinstance(images.source, list):
        return []
    return [str(file) for file in images.source]


def measure_knn(flags: Namespace, world: World) -> None:
    """Extract the features, and report top-1 and top-5 for every k."""
    evaluation.require(flags, "nb_knn", min(flags.nb_knn) >= 1, "at least 1, such as 20")
    evaluation.require(flags, "temperature", flags.temperature > 0, "above 0, such as 0.07")

    backbone, args = evaluation.load_backbone(flags, world)
    images = evaluation.load_images(flags, world, args)
    only_features = bool(flags.dump_features) and knn_split(*images) is None
    if only_features:
        train, test = without_labels(*images)
        which = "no labels to test"
    else:
        train, test, which = evaluation.split_labelled(flags, *images)
    view = evaluation.evaluation_view(flags, args)
    networks = {args["arch"]: backbone}
    few = len(train) + len(test) <= evaluation.FEW
    if few and not only_features:
        networks[UNTRAINED] = evaluation.untrained(args, world)
        networks["raw pixels"] = Pixels()
    loading = evaluation.loading(flags, world)
    features: dict[str, LabelledFeatures] = {}
    for name, network in networks.items():
        features[name] = extract(network, (train, test), view, world, **loading)

    data = (
        f"{evaluation.data_name(flags)}: {len(train)} images train, {len(test)} test ({which}), "
        f"{len(train.classes)} classes, {view.size} pixels"
    )
    if flags.dump_features and world.is_main:
        save_checkpoint(flags.dump_features, {
            "features": {name: kept._asdict() for name, kept in features.items()},
            "train_files": file_names(train),
            "test_files": file_names(test),
            "classes": train.classes,
            "args": args,
            "data": data,
            "weights": flags.pretrained_weights or flags.pretrained,
        })

    if only_features:
        if world.is_main:
            print(f"{data}\nwritten: {flags.dump_features}")
        return

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
    number = paper_number(flags, args, len(train.classes), view.size)
    if number is not None and which == "the test part":  # as the paper has
        paper[f"{args['arch']}, k = 20, top-1 %"] = number
    title = f"k-NN (Table 2: ViT-S/16 has {PAPER['vit_small', 16]} % on ImageNet)"
    evaluation.report(flags, world, title, args, data, measured, paper)


def main(argv: list[str] | None = None) -> None:
    parser = evaluation.command_line(__doc__)
    add = parser.add_argument
    add("--nb_knn", type=int, nargs="+", default=[10, 20, 100, 200],
        help="k, how many neighbours vote [10 20 100 200]")
    add("--temperature", type=float, default=0.07, help="of the votes [0.07]")
    add("--dump_features", default="", metavar="FILE",
        help="keep features, labels and file names there")
    flags = parser.parse_args(argv)
    with evaluation.start(flags) as world:
        measure_knn(flags, world)


if __name__ == "__main__":
    main()
