"""What a training reads: its images, and their crops in the order of the run."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from tqdm import tqdm

from data import Images, open_images, without_unreadable
from features import EvaluationView
from multicrop import MultiCrop
from runtime import hardware, sampling
from runtime.commandline import InputError, bar_style
from runtime.crops import padded, shrunk
from runtime.hardware import World
from runtime.sampling import (
    CropsDataset,
    CropsInMemory,
    CropsOnDevice,
    EpochBatches,
    ImagesAndDraws,
    together,
)
from runtime.threads import share_cores
from settings import MANY_IMAGES, Settings

FEW_IMAGES = 2000


def read_images(settings: Settings, world: World) -> tuple[Images, Images | None]:
    """Return the train images, and those to evaluate on where the source has them.

    Sets --levels to the black and white of high-range images, so that the checkpoint keeps them.
    With --skip_bad_images, what cannot be read is left out, and printed.
    """
    source = (settings.data_path, settings.dataset, settings.download)
    if world.is_main and not any(source):
        print("drawing the embedded images")
    with world.main_first(settings.download):
        train, val = open_images(*source, levels=settings.levels)
    if train.levels:  # images of more than 8 bits
        settings.levels = train.levels
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


def advice(number: int, settings: Settings) -> list[str]:
    """Return the lines that say which recipe so many images get, and what to expect of few."""
    lines = []
    if settings.preset == "photos":
        lines.append("--preset photos, the default for fewer than "
                     f"{MANY_IMAGES:,} images; the paper's recipe: --preset vits16")
    if settings.preset == "vits16" and settings.init_from:
        lines.append(f"--preset vits16, the paper's recipe, for --init_from {settings.init_from}")
    if settings.preset != "demo" and number < FEW_IMAGES and not settings.init_from:
        lines.append(f"{number} images are few to learn from, so expect little; --init_from "
                     "dino_vits16 starts from the authors' weights, by the paper's recipe")
    return lines


def make_multicrop(settings: Settings) -> MultiCrop:
    """Return what turns an image into its views."""
    return MultiCrop(
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


def make_loader(
    images: Images, settings: Settings, world: World, make_multicrop=make_multicrop
) -> tuple[Iterable[list[Tensor]], EpochBatches]:
    """Return a loader of this process's micro-batches of crops, and the order that it follows.

    Images in memory are cropped in batches, on the device, and a GPU crops all others so too.
    For a CPU the workers crop them one by one.
    """
    passes = max(1, round(settings.epoch_images / max(1, len(images))))
    batches = EpochBatches(
        len(images),
        settings.batch_size_per_gpu,
        settings.accumulate,
        world.rank,
        world.size,
        settings.seed,
        passes,
    )
    if not batches.steps:
        raise InputError(
            f"{len(images)} images are fewer than one step of {batches.images_per_step}: lower "
            "--batch_size_per_gpu, or add images"
        )
    multicrop = make_multicrop(settings)
    side = 2 * settings.global_crops_size
    in_memory = images.in_memory
    if not in_memory:
        in_memory = fits_in_memory(len(images), side, settings.in_memory, world)
        settings.in_memory = str(in_memory).lower()  # auto is decided now, and kept
        if in_memory and world.is_main:
            print(f"the images are kept in memory, at most {side} pixels a side")
    if not in_memory and world.device.type == "cuda":
        return device_crops(images, multicrop, batches, side, settings, world), batches
    if not in_memory:
        crops = CropsDataset(images, multicrop, settings.seed)
        return sampling.make_loader(crops, batches, settings.num_workers, world), batches
    share_cores(settings.num_workers, world.device, most=0)  # no workers
    pixels, sides = stored(images, side, quiet=not world.is_main)
    pixels = pixels.to(world.device)
    return CropsInMemory(pixels, sides, multicrop, batches, settings.seed), batches


def device_crops(
    images: Images,
    multicrop: MultiCrop,
    batches: EpochBatches,
    side: int,
    settings: Settings,
    world: World,
) -> CropsOnDevice:
    """Return crops that the device makes of what workers decode and shrink."""
    small = ImagesAndDraws(images, multicrop, settings.seed, side)
    loader = sampling.make_loader(small, batches, settings.num_workers, world, together)
    return CropsOnDevice(loader, multicrop, world.device)


def fits_in_memory(number: int, side: int, wanted: str, world: World) -> bool:
    """Return whether to keep so many images, uint8 (3, side, side), in memory.

    wanted: true, false, or auto, which takes a quarter of the free memory at most.
    """
    fits = wanted == "true"
    if wanted == "auto":
        # they stand on the host first, then on the device
        free = min(hardware.free_memory(device) for device in (torch.device("cpu"), world.device))
        fits = number * 3 * side**2 <= free / 4
    # All processes or none. All vote: a host that lacks the checkpoint has another `wanted`, and a
    # process that did not vote would take the answer to a later question for its own.
    return not world.any(not fits)


def stored(images: Images, side: int, quiet: bool = True) -> tuple[Tensor, Tensor]:
    """Return all images as one uint8 tensor (n, 3, H, W), and their heights and widths (n, 2).

    Images longer than `side` pixels are shrunk to that. quiet: without a bar.
    """
    if images.in_memory:
        sides = torch.tensor([images.source.shape[-2:]])
        return images.source, sides.expand(len(images), -1)

    return padded(read_all(images, lambda image: shrunk(image, side), quiet))


def read_all(images: Images, change: Callable[[Tensor], Tensor], quiet: bool) -> list[Tensor]:
    """Return all images, changed one by one. quiet: without a bar."""

    def read(index: int) -> Tensor:
        image, _ = images[index]
        return change(image)

    with ThreadPoolExecutor() as pool:
        changed = pool.map(read, range(len(images)))
        bar = tqdm(changed, "reading", len(images), leave=False, disable=quiet, **bar_style())
        return list(bar)


def views_in_memory(
    split: tuple[Images, Images], view: EvaluationView, quiet: bool = True
) -> tuple[tuple[Images, Images], EvaluationView]:
    """Return the centres that the view sees, in memory, and a view that sees these whole.

    So no evaluation decodes them again. quiet: without a bar.
    """
    centres = []
    for images in split:
        pixels = torch.stack(read_all(images, view.centre, quiet))
        centres.append(Images(pixels, images.labels, images.classes))
    mean, std = view.mean.flatten().tolist(), view.std.flatten().tolist()
    whole = EvaluationView(view.size, crop=1.0, mean=mean, std=std)
    return tuple(centres), whole
