"""What a training reads: its images, and their crops in the order of the run."""

from pathlib import Path

from torch.utils.data import DataLoader

from data import Images, open_images, without_unreadable
from multicrop import MultiCrop
from runtime import sampling
from runtime.commandline import InputError
from runtime.hardware import World
from runtime.sampling import CropsDataset, EpochBatches
from settings import Settings, written
from training.checkpoint import checkpoint_args, read_checkpoint


def read_images(settings: Settings, world: World) -> tuple[Images, Images | None]:
    """Return the train images, and those to evaluate on where the source has them.

    Sets --levels to the black and white of high-range images, so that the checkpoint keeps them.
    With --skip_bad_images, what cannot be read is left out, and printed.
    """
    source = (settings.data_path, settings.dataset, settings.download)
    with world.main_first(settings.download):
        train, val = open_images(*source, levels=settings.levels)
    if train.levels:  # images of more than 8 bits
        keep_levels(train, val, settings)
    if world.is_main:
        for note in train.notes:
            print(note)
    if settings.skip_bad_images:
        train, messages = without_unreadable(train)
        if val:
            val, more = without_unreadable(val)
            messages += more
        if world.is_main:
            print(*messages, f"skipped {len(messages)} images that cannot be read", sep="\n")
    return train, val


def keep_levels(train: Images, val: Images | None, settings: Settings) -> None:
    """Set --levels: to those of the run to continue, so that it reads its images as before."""
    checkpoint = Path(settings.output_dir, "checkpoint.pth")
    if not any(settings.levels) and checkpoint.exists():
        args = checkpoint_args(read_checkpoint(checkpoint), checkpoint)
        kept = tuple(args.get("levels", settings.levels))
        if any(kept) and kept != train.levels:
            train.notes.append(f"kept from this run's start: --levels {written(kept)}")
            train.levels = kept
    settings.levels = train.levels
    if val is not None:
        val.levels = train.levels


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
