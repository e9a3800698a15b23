"""Which files of a folder are images, and what else lies there."""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".tga", ".avif", ".jfif", ".apng", ".dib", ".pcx",
    ".j2k", ".jpx", ".jpf", ".pfm", ".psd", ".qoi", ".sgi", ".dds", ".fits",
)  # fmt: skip
with suppress(ImportError):  # an optional package reads an iPhone's images
    from pillow_heif import register_heif_opener

    register_heif_opener()
    EXTENSIONS += (".heic", ".heif")
# what a training writes: beside its checkpoint these are no data
OF_A_RUN = ("checkpoint.pth", "log.txt", "curves.png", "attention.png")
HIDDEN = (".", "__MACOSX")  # what systems leave behind
WANTED = f"wanted {' '.join(EXTENSIONS[:6])} ... files there, or in class folders below it"


def walk(folder: Path) -> Iterator[Path]:
    """Give the files in the folder and below it, without hidden ones and a run's own."""
    for here, below, names in os.walk(folder, followlinks=True):
        if os.path.dirname(here) == str(folder):
            visited = {os.path.realpath(folder)}  # two of its folders may be links to the same
        elif here == str(folder):
            visited = set()
        if os.path.realpath(here) in visited:  # a link that leads back up would never end
            below.clear()
            continue
        visited.add(os.path.realpath(here))
        below[:] = sorted(name for name in below if not name.startswith(HIDDEN))
        if "checkpoint.pth" in names:
            names = [name for name in names if name not in OF_A_RUN]
        for name in names:
            if not name.startswith(HIDDEN) and name.lower() not in ("thumbs.db", "desktop.ini"):
                yield Path(here, name)


def find_files(folder: Path) -> list[Path]:
    """Return all files in the folder and below it, sorted, without hidden ones and a run's own."""
    return sorted(walk(folder))


def is_image(file: Path) -> bool:
    """Return whether the file's name is an image's."""
    return file.name.lower().endswith(EXTENSIONS)


def find_images(folder: Path) -> list[Path]:
    """Return all image files in the folder and below it, sorted."""
    return [file for file in find_files(folder) if is_image(file)]


def has_images(folder: Path, number: int) -> bool:
    """Return whether the folder and those below it have so many images; look no further."""
    images = filter(is_image, walk(folder))
    return len(list(islice(images, number))) == number


def listed(names: Iterable[str]) -> str:
    """Return the first five names as one text."""
    names = list(names)
    if len(names) > 5:
        names[5:] = ["..."]
    return ", ".join(names)
