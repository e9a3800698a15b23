"""Classes as points in the plane (appendix H, Fig. 11): t-SNE of frozen features.

Neighbours in the features stay neighbours in the plane; larger distances mean nothing. The paper
draws one point a class of ImageNet, the mean feature of its validation images. Here that is so
beyond 100 classes; fewer have one point an image. The same network untrained stands beside it.
paper: PCA to 30, perplexity 20, learning rate 200, 5,000 iterations. Ours: each feature of length 1
before PCA, and a start at the first two components.

    python -m evals.tsne --pretrained_weights runs/demo/checkpoint.pth
    python -m evals.tsne --pretrained dino_vits16 --data_path photos/ --thumbnails

--data_path: a folder of class folders, or with train/ and val/ in it. If there is a test
part, it is drawn. --most limits the images. It needs scikit-learn. OUT/tsne.png is written.

Shapes: n points, D numbers a feature, C classes.
"""
from argparse import Namespace
from inspect import signature
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from data import Images, at_most
from features import extract_features
from runtime.commandline import InputError, write_whole
from runtime.hardware import World
from training import evaluation

MANY_CLASSES = 100  # beyond, one point is a class
COMPONENTS = 30  # Fig. 11: of PCA before t-SNE
PERPLEXITY = 20  # Fig. 11: neighbours of a point, softly
LEARNING_RATE = 200.0  # Fig. 11
ITERATIONS = 5000  # Fig. 11
THUMBNAIL = 24  # pixels
MOST_THUMBNAILS = 300  # more would hide one another


def load_tsne() -> type:
    """Return scikit-learn's TSNE, an optional package's."""
    try:
        from sklearn.manifold import TSNE  # optional: only this figure needs it
    except ImportError:
        raise InputError(
            "evals.tsne needs scikit-learn, which is not installed: pip install scikit-learn"
        ) from None
    if "max_iter" not in signature(TSNE).parameters:  # before 1.5 it had another name
        raise InputError("evals.tsne needs scikit-learn 1.5 or newer: pip install -U scikit-learn")
    return TSNE


def class_means(features: Tensor, labels: Tensor) -> Tensor:
    """Return the mean feature of each class that has images: (N, D), (N,) -> (C, D)."""
    means = [features[labels == label].mean(dim=0) for label in labels.unique()]
    return torch.stack(means)


def to_plane(tsne: type, features: Tensor, seed: int) -> Tensor:
    """Return t-SNE's places of features by their directions: (n, D) -> (n, 2).

    paper: PCA, perplexity, learning rate and iterations. Ours: the directions, and where it begins.
    """
    directions = F.normalize(features, dim=1)
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)  # few points have few neighbours
    fit = tsne(
        perplexity=perplexity,
        learning_rate=LEARNING_RATE,
        max_iter=ITERATIONS,
        init="pca",  # the same figure each time
        random_state=seed,
    )
    places = fit.fit_transform(principal_components(directions).numpy())
    return torch.from_numpy(places)


def principal_components(features: Tensor) -> Tensor:
    """Return the features along their 30 directions of largest variance: (n, D) -> (n, 30).

    Of fewer numbers or points fewer.
    """
    centred = features - features.mean(dim=0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)  # of falling variance
    return centred @ directions[:COMPONENTS].T


def class_colours(number: int) -> Tensor:
    """Return as many hues, evenly spaced: (C, 3) in 0 ... 1."""
    hues = torch.arange(number) / number
    constant = torch.full_like(hues, 0.8)
    return torch.from_numpy(hsv_to_rgb(torch.stack([hues, constant, constant], dim=1).numpy()))


def draw_thumbnails(axes: Axes, places: Tensor, images: Images, colours: Tensor) -> None:
    """Draw images at their places (n, 2), framed in their colours (n, 3)."""
    for i, place in enumerate(places.tolist()):
        image, _ = images[i]
        small = resize(image, [THUMBNAIL, THUMBNAIL], antialias=True)
        thumbnail = OffsetImage(small.movedim(0, -1).numpy())
        frame = {"edgecolor": colours[i].tolist(), "linewidth": 1.5}
        axes.add_artist(AnnotationBbox(thumbnail, place, pad=0.1, bboxprops=frame))


def draw_plane(
    axes: Axes,
    places: Tensor,
    labels: Tensor,
    classes: list[str],
    thumbnails: Images | None,
) -> None:
    """Draw points (n, 2) in their classes' colours, or as thumbnails, and the classes' names."""
    hues = class_colours(len(classes))
    colours = hues[labels]
    axes.set_xticks([])  # distances have no unit
    axes.set_yticks([])
    axes.scatter(*places.T.numpy(), s=8, c=colours.numpy())
    if thumbnails is not None:
        draw_thumbnails(axes, places, thumbnails, colours)
    size = 9 if len(classes) <= MANY_CLASSES else 4
    for label in labels.unique().tolist():
        x, y = places[labels == label].median(dim=0).values.tolist()
        style = {
            "color": (0.8 * hues[label]).tolist(),  # a little darker than the points
            "zorder": 10,  # above the thumbnails
            "bbox": {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1},
        }
        axes.text(x, y, classes[label], fontsize=size, ha="center", va="center", **style)


def draw_tsne(flags: Namespace, world: World) -> None:
    """Extract the features of both networks, place them, and write the figure."""
    evaluation.require(flags, "most", flags.most >= 4, "at least 4, such as 1000")
    tsne = load_tsne()
    backbone, args = evaluation.load_backbone(flags, world)
    images = evaluation.load_test_or_train(flags, world, args)
    by_class = len(images.labels.unique()) > MANY_CLASSES
    if not by_class:
        images = at_most(images, flags.most)
    if len(images) < 4:
        raise InputError(f"{len(images)} labelled images are too few to draw: add some")
    labels = images.labels
    shown = torch.arange(len(images))
    if by_class:
        shown = torch.stack([(labels == label).nonzero()[0, 0] for label in labels.unique()])
    if flags.thumbnails and len(shown) > MOST_THUMBNAILS:
        fix = "leave --thumbnails out"
        if not by_class:
            fix = f"take --most {MOST_THUMBNAILS}, or {fix}"
        raise InputError(f"{len(shown)} thumbnails would hide one another: {fix}")

    view = evaluation.evaluation_view(flags, args)
    networks = {"untrained": evaluation.untrained(args, world), args["arch"]: backbone}
    features = {}
    for name, network in networks.items():
        features[name] = extract_features(
            network, images, view, world, **evaluation.loading(flags, world)
        )
    if not world.is_main:
        return

    if by_class:
        features = {name: class_means(kept, labels) for name, kept in features.items()}
        labels = labels.unique()
    thumbnails = None
    if flags.thumbnails:
        thumbnails = images.subset(shown)
    figure = Figure((14, 7), dpi=110, layout="constrained")
    for axes, (name, kept) in zip(figure.subplots(1, 2), features.items(), strict=True):
        axes.set_title(name)
        places = to_plane(tsne, kept, flags.seed)
        draw_plane(axes, places, labels, images.classes, thumbnails)
    path = Path(flags.output_dir) / "tsne.png"
    write_whole(path, figure.savefig)
    points = "classes" if by_class else "images"
    print(
        f"t-SNE (Fig. 11) of {evaluation.data_name(flags)}: {len(labels)} {points}, "
        f"{len(images.classes)} classes\nwrote {path}"
    )


def main(argv: list[str] | None = None) -> None:
    parser = evaluation.command_line(__doc__)
    add = parser.add_argument
    add("--most", type=int, default=1000, help="images at most, the same ones each time [1000]")
    add("--thumbnails", action="store_true", help="draw each point's image")
    add("--seed", type=int, default=0, help="of t-SNE [0]")
    add("--output_dir", default="runs/tsne", metavar="OUT", help="gets tsne.png [runs/tsne]")
    flags = parser.parse_args(argv)
    with evaluation.start(flags) as world:
        draw_tsne(flags, world)


if __name__ == "__main__":
    main()
