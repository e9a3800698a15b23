"""Which images a step sees, and which crops of them: functions of (seed, epoch, image) alone.

So the numbers of workers and processes change nothing, nor does the place where a run continues.
"""

import zlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from runtime import hardware
from runtime.crops import padded, shrunk
from runtime.hardware import World
from runtime.threads import share_cores


def seed_of(*numbers: int) -> int:
    """Return a seed below 2^32, which is all that torch's CPU generator uses.

    Neighbouring numbers have seeds far apart, and no two images of an epoch share one.
    """
    return zlib.crc32(" ".join(map(str, numbers)).encode())


def draws_of(crop, seed: int, epoch: int, index: int) -> Tensor:
    """Return the random numbers of an image's views in an epoch; crop: a MultiCrop."""
    torch.default_generator.manual_seed(seed_of(seed, epoch, index))
    return crop.draw()


class CropsDataset(Dataset):
    """Random views of images: dataset[epoch, index] -> crop(image), always the same ones."""

    def __init__(self, images: Dataset, crop: Callable[[Tensor], list[Tensor] | Tensor], seed: int):
        self.images = images
        self.crop = crop  # a MultiCrop, or another random view
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> list[Tensor] | Tensor:
        epoch, index = key
        image, _ = self.images[index]
        torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
        return self.crop(image)


class EpochBatches(Sampler):
    """The micro-batches of one process for one epoch, as lists of (epoch, index).

    They are those of `epoch`, from `first_step` on; whoever trains sets both.
    A step takes the same images however many processes divide it between them.
    An epoch's last step is dropped if it is incomplete.

    passes: an epoch goes over the images so many times. Each pass has a number of its own in the
    keys, so that an image's crops differ from pass to pass.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        accumulate: int,
        rank: int,
        world_size: int,
        seed: int,
        passes: int = 1,
    ):
        self.images = images
        self.passes = passes
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.images_per_step = batch_size * accumulate * world_size
        self.steps = passes * images // self.images_per_step
        self.epoch = 0
        self.first_step = 0

    def __len__(self) -> int:
        return (self.steps - self.first_step) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        first_pass = self.epoch * self.passes
        orders = [self.shuffled(first_pass + turn) for turn in range(self.passes)]
        order = torch.cat(orders)
        for step in range(self.first_step, self.steps):
            start = step * self.images_per_step
            places = torch.arange(start, start + self.images_per_step)
            places = places.view(self.accumulate, self.world_size, self.batch_size)
            for own in places[:, self.rank]:
                numbers = first_pass + own // self.images  # of the pass that a place lies in
                yield list(zip(numbers.tolist(), order[own].tolist(), strict=True))

    def shuffled(self, number: int) -> Tensor:
        """Return the images' order in the pass of this number, counted from the run's start."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, number))
        return torch.randperm(self.images, generator=generator)


class CropsInMemory:
    """The crops of an epoch from images in memory: a batch at once, on the images' device.

    They are the views that CropsDataset gives of these pixels, but for the rounding of bytes.
    pixels: uint8 (n, 3, H, W); sides (n, 2): the height and width that each image fills.
    """

    num_workers = 0  # as a DataLoader has them

    def __init__(self, pixels: Tensor, sides: Tensor, crop, batches: EpochBatches, seed: int):
        self.pixels = pixels
        self.sides = sides
        self.crop = crop  # a MultiCrop
        self.batches = batches
        self.seed = seed

    def __iter__(self) -> Iterator[list[Tensor]]:
        for keys in self.batches:
            draws = [draws_of(self.crop, self.seed, *key) for key in keys]
            numbers = torch.tensor([index for _, index in keys])
            images = self.pixels[numbers.to(self.pixels.device, non_blocking=True)]
            yield self.crop.batch_views(images, self.sides[numbers], torch.stack(draws))


class ImagesAndDraws(Dataset):
    """Images as bytes, and their views' random numbers: dataset[epoch, index] -> both.

    An image is shrunk to at most `side` pixels a side.
    """

    def __init__(self, images: Dataset, crop, seed: int, side: int):
        self.images = images
        self.crop = crop  # a MultiCrop
        self.seed = seed
        self.side = side

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        _, index = key
        image, _ = self.images[index]
        return shrunk(image, self.side), draws_of(self.crop, self.seed, *key)


def together(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return a batch of ImagesAndDraws as MultiCrop.batch_views takes it: pixels, sides, draws."""
    pixels, sides = padded([image for image, _ in items])
    return pixels, sides, torch.stack([draws for _, draws in items])


class CropsOnDevice:
    """The crops of an epoch: workers decode the images, and the device crops a batch at once.

    They are the views of CropsInMemory.
    loader: of ImagesAndDraws, together.
    """

    def __init__(self, loader: DataLoader, crop, device: torch.device):
        self.loader = loader
        self.crop = crop  # a MultiCrop
        self.device = device
        self.num_workers = loader.num_workers

    def __iter__(self) -> Iterator[list[Tensor]]:
        for pixels, sides, draws in self.loader:
            pixels = pixels.to(self.device, non_blocking=True)
            yield self.crop.batch_views(pixels, sides, draws)


def make_loader(
    dataset: Dataset,
    batches: EpochBatches,
    num_workers: int,
    world: World,
    collate: Callable | None = None,
) -> DataLoader:
    """Return a loader of the dataset in this order; its workers stay from epoch to epoch.

    num_workers: as share_cores takes it. collate: makes a batch of items; None: DataLoader's own.
    """
    workers = share_cores(num_workers, world.device)
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=world.device.type == "cuda",
        persistent_workers=workers > 0,
        worker_init_fn=hardware.leave_signals_to_training,
    )
