"""Frozen features of images, and the k-NN vote on them (Sec. 3.2; appendix F; Table 2).

Every evaluation reads frozen features. The vote is the quickest measure of what was learnt, and
training makes it on the way.

Shapes: N train images, n test images (or images of any part), H x W pixels, S the side of a view,
D numbers a feature, C classes.
"""
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize
from tqdm import tqdm

from data import Images
from runtime.augment import IMAGENET_MEAN, IMAGENET_STD
from runtime.commandline import bar_style
from runtime.hardware import World, leave_signals_to_training

ALONE = World(0, 1, torch.device("cpu"), torch.float32)  # one process
ROWS = 1000  # test images at a time, so that no n x N or n x C numbers stand in memory


def normalise(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (image / 255 - mean) / std for each colour: uint8 (3, H, W) -> float (3, H, W)."""
    mean = torch.as_tensor(mean).view(3, 1, 1)
    std = torch.as_tensor(std).view(3, 1, 1)
    return (image.float() / 255 - mean) / std


def mean_and_std(args: dict) -> tuple[Sequence[float], Sequence[float]]:
    """Return a checkpoint's mean and standard deviation of the pixels, or ImageNet's."""
    return args.get("mean", IMAGENET_MEAN), args.get("std", IMAGENET_STD)


class EvaluationView:
    """The centre of an image, as the evaluations see it: uint8 (3, H, W) -> float (3, S, S).

    The short side is resized to S / crop pixels, then the centre is cut out. S = 224 and
    crop = 0.875 are the release's 256 and 224 pixels. crop = 1 keeps square images whole.
    """

    def __init__(
        self,
        size: int = 224,
        crop: float = 0.875,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ):
        self.size = size
        self.short_side = round(size / crop)
        self.mean = torch.tensor(mean).view(3, 1, 1)
        self.std = torch.tensor(std).view(3, 1, 1)

    def __call__(self, image: Tensor) -> Tensor:
        return normalise(self.centre(image), self.mean, self.std)

    def centre(self, image: Tensor) -> Tensor:
        """Return what the view sees, as bytes: uint8 (3, H, W) -> uint8 (3, S, S)."""
        height, width = image.shape[-2:]
        # a strip of 1 x 20,000 pixels would grow beyond the memory, and its ends are cut off anyway
        longest = 50 * min(height, width)
        if max(height, width) > longest:
            image = center_crop(image, [min(height, longest), min(width, longest)])
        if min(height, width) != self.short_side:
            image = resize(image, self.short_side, InterpolationMode.BICUBIC, antialias=True)
        return center_crop(image, [self.size, self.size])


class ViewsDataset(Dataset):
    """The view of each image: dataset[i] -> float (3, S, S)."""

    def __init__(self, images: Images, view: EvaluationView):
        self.images = images
        self.view = view

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        image, _ = self.images[index]
        return self.view(image)


@torch.no_grad()
def extract_features(
    network: nn.Module,
    images: Images,
    view: EvaluationView,
    world: World,
    batch_size: int = 100,
    num_workers: int = 0,
    progress: str = "",
) -> Tensor:
    """Return the network's output for the view of every image, in their order: (n, D) fp32.

    The processes share the images, and each gets all features, on the CPU. progress: a bar's title.
    """
    mine = torch.arange(len(images)).tensor_split(world.size)[world.rank]
    if images.in_memory:
        num_workers = 0  # there is nothing to decode
    loader = DataLoader(
        ViewsDataset(images.subset(mine), view),
        batch_size,
        num_workers=num_workers,
        worker_init_fn=leave_signals_to_training,
    )
    # a training calls this too: afterwards every module is in the mode it was in
    modes = {module: module.training for module in network.modules()}
    network.eval()
    batches = []
    hidden = not (progress and world.is_main)
    for views in tqdm(loader, progress, disable=hidden, leave=False, **bar_style()):
        with world.autocast():
            features = network(views.to(world.device))
        batches.append(features.float())
    for module, mode in modes.items():
        module.training = mode
    features = torch.cat(batches) if batches else torch.empty(0, 0)  # fewer images than processes
    return world.gather_rows(features)


class Pixels(nn.Module):
    """The image itself as its feature, at most 64 pixels a side. A network has to beat it."""

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-1] > 64:
            images = F.interpolate(images, 64, mode="bilinear", antialias=True)
        return images.flatten(1)


def among_first(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return where the right label is among the k highest scores: (n, C), (n,) -> bool (n,)."""
    first = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return (first == labels[:, None]).any(dim=1)


def top_accuracy(scores: Tensor, labels: Tensor, k: int = 1) -> float:
    """Return the top-k accuracy in %: scores (n, C), labels (n,)."""
    return 100 * among_first(scores, labels, k).float().mean().item()


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
    test_features = train_features[:0]
    if len(test):
        test_features = extract_features(network, test, view, world, **loading)
    return LabelledFeatures(train_features, train.labels, test_features, test.labels)


def nearest_neighbours(
    train_features: Tensor, test_features: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Return the k largest cosines of each test image, largest first, and the train images.

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

    A row may be off by a positive factor: no ranking changes.
    (n, k), (n, k) -> (n, C).
    """
    # without its largest cosine, a row's votes neither overflow nor all vanish at a low T
    largest = cosines.max(dim=1, keepdim=True).values
    weights = ((cosines - largest) / temperature).exp()
    votes = torch.zeros(len(cosines), num_classes)
    return votes.scatter_add_(1, labels, weights)


def count_right(
    data: LabelledFeatures, tests: Tensor, ks: tuple[int, ...], temperature: float
) -> Tensor:
    """Return how many of these test images get the right label: top-1 and top-5.

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
            # fewer than five classes may have votes: the others that topk takes do not count here
            voted = (labels[rows, :k] == test_labels[rows, None]).any(dim=1)
            right[i, 1] += (among_first(votes, test_labels[rows], 5) & voted).sum()
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
