"""Which images a step sees, and which crops of them: functions of (seed, epoch, image) and of nothing else.

So neither the number of workers, nor that of processes, nor where a run was resumed changes what is learnt from.
"""
import zlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from runtime import hardware
from runtime.hardware import World


def seed_of(*numbers: int) -> int:
    """A seed below 2^32, all that torch's CPU generator uses, that differs for neighbouring numbers."""
    return zlib.crc32(" ".join(map(str, numbers)).encode())


class CropsDataset(Dataset):
    """What crop, a MultiCrop or another random view, makes of an image: dataset[epoch, index] -> crop(image)."""

    def __init__(self, images: Dataset, crop: Callable[[Tensor], list[Tensor] | Tensor], seed: int):
        self.images, self.crop, self.seed = images, crop, seed

    def __getitem__(self, key: tuple[int, int]) -> list[Tensor] | Tensor:
        epoch, index = key
        image, _ = self.images[index]
        torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
        return self.crop(image)


class EpochBatches(Sampler):
    """The micro-batches of one process for one epoch, as lists of (epoch, index), from step `first_step` on.

    A step takes the same images however many processes share it: process r of R takes its R-th part. The last,
    incomplete step of an epoch is dropped.
    """

    def __init__(self, images: int, batch_size: int, accumulate: int, rank: int, world_size: int, seed: int):
        self.images, self.batch_size, self.accumulate, self.seed = images, batch_size, accumulate, seed
        self.rank, self.world_size = rank, world_size
        self.images_per_step = batch_size * accumulate * world_size
        self.steps = images // self.images_per_step
        self.epoch = self.first_step = 0

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
        order = torch.randperm(self.images, generator=generator)
        for step in range(self.first_step, self.steps):
            this_step = order[step * self.images_per_step:(step + 1) * self.images_per_step]
            for batch in this_step.view(self.accumulate, self.world_size, self.batch_size)[:, self.rank].tolist():
                yield [(self.epoch, index) for index in batch]


def make_loader(dataset: CropsDataset, batches: EpochBatches, num_workers: int, world: World) -> DataLoader:
    """The dataset in this order, epoch after epoch, by workers that stay; num_workers as share_cores takes it."""
    workers = hardware.share_cores(num_workers, world.device)
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, pin_memory=world.device.type == "cuda",
                      persistent_workers=workers > 0, worker_init_fn=hardware.leave_signals_to_training)
