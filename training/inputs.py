"""What a training reads: its images, and their crops in the order of the run."""

from torch.utils.data import DataLoader

from data import Images, open_images, without_unreadable
from multicrop import MultiCrop
from runtime import sampling
from runtime.commandline import InputError
from runtime.hardware import World
from runtime.sampling import CropsDataset, EpochBatches
from settings import Settings


def read_images(settings: Settings, world: World) -> tuple[Images, Images | None]:
    """Return the train images, and those to evaluate on where the source has them.

    With --skip_bad_images, what cannot be read is left out, and printed.
    """
    with world.main_first(settings.download):
        train, val = open_images(settings.data_path, settings.dataset, settings.download)
    if settings.skip_bad_images:
        train, messages = without_unreadable(train)
        if val:
            val, more = without_unreadable(val)
            messages += more
        if world.is_main:
            print(*messages, f"skipped {len(messages)} images that cannot be read", sep="\n")
    return train, val


def make_loader(
    images: Images, settings: Settings, world: World
) -> tuple[DataLoader, EpochBatches]:
    """Return a loader of this process's micro-batches of crops, and the order that it follows."""
    batches = EpochBatches(
        len(images),
        settings.batch_size_per_gpu,
        settings.accumulate,
        world.rank,
        world.size,
        settings.seed,
    )
    if not batches.steps:
        raise InputError(
            f"{len(images)} images are fewer than one step of {batches.images_per_step}: lower "
            "--batch_size_per_gpu, or add images"
        )
    multicrop = MultiCrop(
        settings.global_crops_size,
        settings.local_crops_size,
        settings.global_crops_scale,
        settings.local_crops_scale,
        settings.local_crops_number,
        settings.mean,
        settings.std,
        settings.color_jitter,
        settings.blur,
        settings.solarize,
    )
    crops = CropsDataset(images, multicrop, settings.seed)
    return sampling.make_loader(crops, batches, settings.num_workers, world), batches
