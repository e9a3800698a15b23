"""What the evaluations that train share: a fraction of the labels, batches of random views."""
from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data import Images
from runtime.commandline import InputError
from runtime.hardware import World
from runtime.sampling import CropsDataset, EpochBatches, make_loader


def balanced_fraction(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """Return rising indices of `fraction` of each class, at least one image (Table 12's 1 %).

    labels: (n,). A smaller fraction is part of a larger one.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        number = max(1, round(fraction * len(members)))
        chosen.append(members[order[:number]])
    return torch.cat(chosen).sort().values


class LabelledCrops(CropsDataset):
    """A random view and the label of image `index` in epoch `epoch`: dataset[epoch, index]."""

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        _, index = key
        return super().__getitem__(key), self.images.labels[index]


def epoch_batches(images: Images, flags: Namespace, world: World) -> EpochBatches:
    """Return the order in which this process sees the images."""
    if len(images) < 2 * world.size:
        raise InputError(
            f"{len(images)} images are too few to learn from for {world.size} processes: take a "
            "larger --fraction, or add images"
        )
    # an epoch's incomplete last batch is left out: fewer images than a batch are one batch
    batch_size = min(flags.batch_size, len(images) // world.size)
    return EpochBatches(len(images), batch_size, 1, world.rank, world.size, flags.seed)


def training_loader(
    images: Images,
    view: Callable[[Tensor], Tensor],
    batches: EpochBatches,
    flags: Namespace,
    world: World,
) -> DataLoader:
    """Return a loader of random views (B, 3, S, S) and labels (B,), in the order of batches."""
    crops = LabelledCrops(images, view, flags.seed)
    return make_loader(crops, batches, flags.num_workers, world)
