"""Which folders of a data set hold the train images and the test images, as people lay them out."""

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from runtime.commandline import InputError
from training.folders import HIDDEN, WANTED, is_image, listed

PART = re.compile("train(ing|val)?|valid(ation)?|val|dev|eval(uation)?|test(ing)?")
IMAGES = re.compile("(jpeg)?(images?|imgs?|photos?)")
MASKS = re.compile("(masks?|labels?|annotations?|segmentation\\w*|trimaps?|ground_?truth|gt)")


def count_others(files: Iterable[Path]) -> str:
    """Return how many files that are no images there are, such as "20 .heic, 1 .csv", or ""."""
    others = Counter()
    for file in files:
        if not is_image(file):
            others[file.suffix.lower() or "without an extension"] += 1
    return listed([f"{number} {extension}" for extension, number in others.most_common()])


def without_images(folder: Path, files: Iterable[Path]) -> list[str]:
    """Return a line about the folders in this one that hold no images; none if all do.

    files: all images.
    """
    depth = len(folder.parts)
    holding = {file.parts[depth] for file in files if file.parts[:depth] == folder.parts}
    _, names, _ = next(os.walk(folder))
    empty = [name for name in sorted(names) if name not in holding and not name.startswith(HIDDEN)]
    if not empty:
        return []
    return [f"no images in {folder}: {listed(empty)}"]


def named_parts(names: Iterable[str]) -> list[str]:
    """Return the folders that are parts: first one for training, then one or more for tests.

    Their names differ in the part alone: Train and Test; train2017 and val2017. [] if there are
    none, and if there are several, such as train_cat and val_cat, train_dog and val_dog.
    """
    found: dict[str, list[tuple[int, str]]] = {}  # by what stands around the part
    for name in names:
        word = PART.search(name.lower())
        if word:
            order = 1  # val before test
            if word[0].startswith("train"):
                order = 0
            elif word[0].startswith("test"):
                order = 2
            around = name.lower().replace(word[0], "*", 1)
            found.setdefault(around, []).append((order, name))
    pairs = {}
    for around, several in found.items():
        parts = sorted(several)
        tests = [name for order, name in parts if order > 0]
        if parts[0][0] == 0 and tests:
            pairs[around] = [parts[0][1], *tests]
    if len(pairs) == 1:
        return pairs.popitem()[1]
    return pairs.get("*", [])  # train and val themselves


def look_around(root: Path, found: list[Path]) -> tuple[Path, Path | None, list[str]]:
    """Return what find_parts does, with lines about all else that lies there.

    found: all files below root. Raises InputError if none is an image.
    """
    files = [file for file in found if is_image(file)]
    others = count_others(found)
    if not files:
        there = f"; {others} are there" if others else ""
        raise InputError(f"no images in {str(root)!r}: {WANTED}{there}")
    train, test, notes = find_parts(root, files)
    notes += without_images(train, files)
    if test:
        notes += without_images(test, files)
    if others:
        notes.append(f"also in {root}, not read: {others}")
    return train, test, notes


def find_parts(root: Path, files: list[Path]) -> tuple[Path, Path | None, list[str]]:
    """Return the folder of the train images, that of the test images or None, and lines to print.

    root: a folder of class folders, of images, or with parts such as train/ and val/, perhaps
    deeper. files: the images below it. Raises InputError if its folders may be parts or classes.
    """
    inside: dict[str, set[str]] = {}  # each folder's own folders
    loose = 0
    for file in files:
        folders = file.parts[len(root.parts) : -1]
        if folders:
            inside.setdefault(folders[0], set()).update(folders[1:2])
        else:
            loose += 1

    trains = [name for name in inside if re.fullmatch("train(ing)?", name.lower())]
    if len(inside) == 1 and (trains or not loose):
        folder = root / min(inside)
        notes = without_images(root, files)
        if trains:
            return folder, None, notes
        train, test, more = find_parts(folder, files)
        return train, test, notes + more

    parts = named_parts(inside)
    if parts:
        train, test, *others = parts
        others += sorted(inside.keys() - parts)
        if loose:
            others.append(f"{loose} images beside them")
        notes = without_images(root, files)
        if others:
            read = f"train images are in {train}, test images in {test}"
            notes.append(f"of {root}, {read}; left out: {listed(others)}")
        return root / train, root / test, notes

    common = set.intersection(*inside.values()) if len(inside) > 1 else set()
    names = sorted(inside)
    lower = [name.lower() for name in names]
    # val and test without train; train_cat, val_cat, train_dog, val_dog
    only_parts = len(names) > 1 and all(PART.match(name) for name in lower)
    masks = any(MASKS.fullmatch(name) for name in lower)
    beside_masks = masks and any(IMAGES.fullmatch(name) for name in lower)
    nested_train = any(len(inside[name]) > 1 for name in trains)
    one_beside_train = bool(trains) and len(names) == 2  # train and holdout
    if len(common) > 1 or only_parts or beside_masks or nested_train or one_beside_train:
        images = [name for name in names if IMAGES.fullmatch(name.lower())]
        one = (trains + images + names)[0]
        raise InputError(
            f"the folders of {str(root)!r}, {listed(names)}, may be parts or classes: name parts "
            f"train and val, or choose one with --data_path {str(root / one)!r}; put classes "
            "into a folder named train"
        )
    return root, None, []
