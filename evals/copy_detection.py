"""Copy detection with frozen features (Sec. 4.2.1, Table 4): find what a copy was made from.

The descriptor is [CLS] joined with the patch tokens' generalised mean (GeM, p = 4), whitened on
other images. Each distorted copy ranks the originals among distractors; mAP over the copies. On
Copydays' strong copies with 10,000 distractors DINO reaches 81.7 with ViT-B/16, 85.5 with ViT-B/8
at 320 pixels; supervised ViT-B/16 76.4. As in the release images are stretched to squares.
Departures: the release ranks the first 20 only. Its whitening subtracts the mean, but scales by
moments around 0 and keeps all directions: --uncentred does that. The paper whitens on 20,000 images
of YFCC100M. Its number is printed beside Copydays' 157 originals among 10,000 distractors alone.

    python -m evals.copy_detection --pretrained_weights runs/demo/checkpoint.pth
    python -m evals.copy_detection --pretrained dino_vitb16 --data_path copydays/ \\
        --distractors yfcc/a/ --whiten yfcc/b/

--data_path: Copydays' layout, original/NNNN00.jpg and strong/NNNN01.jpg ..., jpegqual/Q/NNNN00.jpg,
crops/P/NNNN00.jpg (Q, P: quality, percent cut off) as far as they are there. A copy's original has
the same name but for the last two digits. Of class folders, of --dataset, or of embedded images,
five kinds of strong copies of test images are made in memory: blurred, set on a mottled ground, as
if printed and scanned, cut, and compressed. Beside these the same network untrained and raw pixels
are measured.

Shapes: B images, n of any set, N patches, D width.
"""
import io
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torchvision.models import ResNet
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import pil_to_tensor, resize, to_pil_image

from data import Images, at_most, evenly_spaced, find_images, knn_split, open_folder
from evals.retrieval import (
    Whitening,
    average_precisions,
    gem,
    learn_release_whitening,
    learn_whitening,
)
from features import EvaluationView, Pixels, extract_features
from runtime.commandline import InputError, true_or_false
from runtime.hardware import World
from training import evaluation
from vit import VisionTransformer

ORIGINALS = 157  # Copydays'
DISTRACTORS = 10_000  # at least: the paper's
PAPER = {  # Table 4, strong copies, by the images' size in pixels too
    ("vit_base", 16, 224): 81.7,
    ("vit_base", 8, 320): 85.5,
}
Random = np.random.Generator


class Descriptor(nn.Module):
    """[CLS] joined with GeM of the last block's patch tokens: (B, 3, H, W) -> (B, 2 D).

    Not in the paper: of a ResNet, the pooled feature joined with GeM of the last feature map.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        if isinstance(self.backbone, ResNet):
            whole, patches = self.resnet_features(images)
        else:
            whole, patches = self.vit_features(images)
        return torch.cat([whole.float(), gem(patches.float())], dim=1)

    def vit_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return [CLS] (B, D) and the patch tokens (B, N, D)."""
        tokens = self.backbone.get_intermediate_layers(images, 1)[0]
        return tokens[:, 0], tokens[:, 1:]

    def resnet_features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pooled feature (B, D), and the map that it is the mean of, as (B, N, D)."""
        maps = []

        def keep(pool: nn.Module, inputs: tuple[Tensor]) -> None:
            maps.append(inputs[0])

        hook = self.backbone.avgpool.register_forward_pre_hook(keep)
        pooled = self.backbone(images)
        hook.remove()
        return pooled, maps[0].flatten(2).transpose(1, 2)


class SquareView(EvaluationView):
    """The whole image stretched to S x S: uint8 (3, H, W) -> float (3, S, S)."""

    def __call__(self, image: Tensor) -> Tensor:
        size = [self.size, self.size]
        return super().__call__(resize(image, size, InterpolationMode.BICUBIC, antialias=True))


def blur(image: Image.Image, random: Random) -> Image.Image:
    """Gaussian blur, sigma 1.5 to 4 % of the short side."""
    sigma = min(image.size) * random.uniform(0.015, 0.04)
    return image.filter(ImageFilter.GaussianBlur(sigma))


def somewhere(outer: tuple[int, int], inner: tuple[int, int], random: Random) -> tuple[int, int]:
    """Return where the left upper corner of a box (width, height) stands in a larger one."""
    left = int(random.integers(0, 1 + outer[0] - inner[0]))
    top = int(random.integers(0, 1 + outer[1] - inner[1]))
    return left, top


def scaled(size: tuple[int, int], factor: float) -> tuple[int, int]:
    """Return width and height times the factor, at least 1 pixel."""
    width, height = size
    return max(1, round(width * factor)), max(1, round(height * factor))


def insert(image: Image.Image, random: Random) -> Image.Image:
    """The image, shrunk to 40 to 70 % of its sides, anywhere on a mottled ground."""
    mottles = random.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    ground = Image.fromarray(mottles).resize(image.size, Image.BICUBIC)
    small = image.resize(scaled(image.size, random.uniform(0.4, 0.7)), Image.LANCZOS)
    ground.paste(small, somewhere(ground.size, small.size, random))
    return ground


def print_and_scan(image: Image.Image, random: Random) -> Image.Image:
    """Turned by up to 8 degrees on white paper, paler, out of focus, with a scanner's noise."""
    angle = random.uniform(-8, 8)
    turned = image.rotate(angle, Image.BICUBIC, expand=True, fillcolor="white")
    unsharp = turned.filter(ImageFilter.GaussianBlur(min(image.size) / 200))
    values = np.asarray(unsharp, dtype=float)
    ink = random.uniform(0.5, 0.75, size=3)  # of each colour's contrast
    noise = random.normal(0, 10, values.shape[:2])
    values = 240 - ink * (255 - values) + noise[..., None]
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))


def crop(image: Image.Image, random: Random) -> Image.Image:
    """20 to 50 % of the area, anywhere, of the same shape."""
    width, height = scaled(image.size, random.uniform(0.2, 0.5) ** 0.5)
    left, top = somewhere(image.size, (width, height), random)
    return image.crop((left, top, left + width, top + height))


def jpeg(image: Image.Image, random: Random) -> Image.Image:
    """Compressed with quality 3 to 8."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(random.integers(3, 9)))
    return Image.open(file).convert("RGB")


DISTORTIONS: dict[str, Callable[[Image.Image, Random], Image.Image]] = {
    "blur": blur,
    "insertion": insert,
    "print and scan": print_and_scan,
    "crop": crop,
    "JPEG": jpeg,
}


def distorted(image: Tensor, number: int) -> list[Image.Image]:
    """Return all DISTORTIONS of an image, uint8 (3, H, W); the same for the same number."""
    copies = []
    for i, distort in enumerate(DISTORTIONS.values()):
        copies.append(distort(to_pil_image(image), np.random.default_rng([number, i])))
    return copies


class Copies(NamedTuple):
    """What is searched. The labels of originals and copies are the number of the original."""

    originals: Images
    blocks: dict[str, Images]  # copies by the way they were made
    distractors: Images | None
    whitening: Images | None


def made_copies(train: Images, test: Images) -> Copies:
    """Return strong copies of 100 test images, evenly spaced, among the others.

    2000 train images, drawn once for all, are for the whitening.
    """
    chosen = evenly_spaced(len(test), 100)
    number = len(chosen)
    originals = [test[i][0] for i in chosen.tolist()]
    blocks = {name: [] for name in DISTORTIONS}
    for i, image in enumerate(originals):
        for name, copy in zip(DISTORTIONS, distorted(image, i), strict=True):
            blocks[name].append(pil_to_tensor(copy))
    others = None
    if len(test) > number:
        is_other = torch.ones(len(test), dtype=torch.bool)
        is_other[chosen] = False
        others = test.subset(is_other.nonzero().squeeze(1))
    return Copies(
        Images(originals, range(number)),
        {f"strong, {name}": Images(copies, range(number)) for name, copies in blocks.items()},
        others,
        at_most(train, 2000),
    )


def open_copydays(folder: Path) -> tuple[Images, dict[str, Images]]:
    """Open Copydays' layout: the originals, and the copies by block: strong, jpegqual/3 ..."""
    originals = find_images(folder / "original")
    places = [folder / "strong"]
    places += sorted(folder.glob("jpegqual/*")) + sorted(folder.glob("crops/*"))
    files = {}
    for place in places:
        if find_images(place):
            files[place.relative_to(folder).as_posix()] = find_images(place)
    if not originals or not files:
        raise InputError(
            f"--data_path {str(folder)!r} lacks images in original/, or copies in strong/, "
            "jpegqual/Q/ or crops/P/: lay it out as Copydays, or leave it out"
        )
    number = {file.stem[:-2]: i for i, file in enumerate(originals)}
    copies = [file for block in files.values() for file in block]
    strays = [file for file in copies if file.stem[:-2] not in number]
    if len(number) < len(originals):  # two originals share a name
        strays.append(originals[0])
    if strays:
        raise InputError(
            f"{str(strays[0])!r} is not named as Copydays' images are: the original NNNN00.jpg, "
            "its copies NNNN01.jpg ..."
        )
    blocks = {}
    for name, block in files.items():
        blocks[name] = Images(block, [number[file.stem[:-2]] for file in block])
    return Images(originals, range(len(originals))), blocks


def makes_copies(flags: Namespace) -> bool:
    """Return whether the copies are made: not of a folder with a part of Copydays' layout."""
    if flags.dataset or not flags.data_path:
        return True
    parts = ("original", "strong", "jpegqual", "crops")
    return not any(Path(flags.data_path, part).is_dir() for part in parts)


def open_copies(flags: Namespace, world: World, args: dict) -> Copies:
    """Open Copydays' layout and the folders that the flags name, or make copies in memory.

    args: of the checkpoint that is evaluated.
    """
    if makes_copies(flags):
        if flags.distractors or flags.whiten:
            raise InputError(
                "--distractors and --whiten go with a --data_path in Copydays' layout: give one"
            )
        split = knn_split(*evaluation.load_images(flags, world, args))
        if split is None and flags.dataset:
            said = "lacks labelled train or test images: take one with classes"
            raise InputError(f"--dataset {flags.dataset} {said}")
        if split is None:
            raise InputError(
                f"--data_path {flags.data_path!r} has neither class folders nor Copydays' layout "
                "(original/ and strong/): lay it out as one of them"
            )
        return made_copies(*split)

    originals, blocks = open_copydays(Path(flags.data_path))
    distractors = open_folder(Path(flags.distractors)) if flags.distractors else None
    whitening = open_folder(Path(flags.whiten)) if flags.whiten else None
    parts = [originals, *blocks.values()]
    parts += [part for part in (distractors, whitening) if part is not None]
    files = [file for part in parts for file in part.source]
    levels, notes = evaluation.shared_levels(files, flags, args)
    for part in parts:
        part.levels = levels
    if world.is_main:
        for note in notes:
            print(note)

    def readable(part: Images | None) -> Images | None:
        return None if part is None else evaluation.readable(flags, part)

    blocks = {name: readable(block) for name, block in blocks.items()}
    return Copies(readable(originals), blocks, readable(distractors), readable(whitening))


def find_copies(
    copies: Copies,
    describe: Callable[[Images], Tensor],
    learn: Callable[[Tensor], Whitening] = learn_whitening,
) -> dict[str, float]:
    """Return mAP in % of every block and of all strong copies, whitened and not.

    describe: n images -> their descriptors (n, 2 D). Without images for it, nothing is whitened.
    learn: descriptors (m, 2 D) -> their whitening.
    """
    database = describe(copies.originals)
    labels = copies.originals.labels
    if copies.distractors is not None:
        database = torch.cat([database, describe(copies.distractors)])
        nobodys = torch.full((len(copies.distractors),), -1)
        labels = torch.cat([labels, nobodys])
    queries = {name: describe(block) for name, block in copies.blocks.items()}

    steps = {}
    if copies.whitening is not None:
        if len(copies.whitening) < 2:
            raise InputError("--whiten holds one image: give many, more than 2 D")
        steps["whitened"] = learn(describe(copies.whitening))
    steps["not whitened"] = nn.Identity()

    measured = {}
    for step, apply in steps.items():
        found = {}
        for name, descriptors in queries.items():
            relevant = copies.blocks[name].labels[:, None] == labels
            found[name] = average_precisions(apply(descriptors), apply(database), relevant)
        strong = [precisions for name, precisions in found.items() if name.startswith("strong")]
        if strong:
            found = {"strong": torch.cat(strong)} | found
        for name, precisions in found.items():
            measured[f"{name}, {step}, mAP %"] = 100 * precisions.nanmean().item()
    return measured


def measure_copy_detection(flags: Namespace, world: World) -> None:
    """Find the copies, and report mAPs by block, whitened and not."""
    backbone, args = evaluation.load_backbone(flags, world)
    if not isinstance(backbone, (VisionTransformer, ResNet)):
        raise InputError(f"{args['arch']} has no patch tokens: take a ViT's or a ResNet's weights")
    copies = open_copies(flags, world, args)
    made = makes_copies(flags)
    view = evaluation.evaluation_view(flags, args | {"eval_crop": 1}, SquareView)
    loading = evaluation.loading(flags, world)
    learn = learn_release_whitening if flags.uncentred else learn_whitening

    def copies_found(network: nn.Module, among: Copies) -> dict[str, float]:
        def describe(images: Images) -> Tensor:
            return extract_features(network, images, view, world, **loading)

        return find_copies(among, describe, learn)

    measured = copies_found(Descriptor(backbone), copies)
    if made:
        untrained = Descriptor(evaluation.untrained(args, world))
        unwhitened = copies._replace(whitening=None)  # of so many pixels it would take minutes
        rivals = {
            "untrained": copies_found(untrained, copies),
            "raw pixels": copies_found(Pixels(), unwhitened),
        }
        for name, found in rivals.items():
            for row, value in found.items():
                measured[f"{name}, {row}"] = value
    distractors = 0 if copies.distractors is None else len(copies.distractors)
    whitening = 0 if copies.whitening is None else len(copies.whitening)
    data = (
        f"{evaluation.data_name(flags)}: {len(copies.originals)} originals among {distractors} "
        f"distractors, whitening from {whitening} images, {view.size} x {view.size} pixels"
    )
    paper = {}
    network = (args["arch"], args["patch_size"], view.size)
    copydays = not made and len(copies.originals) == ORIGINALS and distractors >= DISTRACTORS
    if copydays and network in PAPER:
        paper["strong, whitened, mAP %"] = PAPER[network]
    strong = PAPER["vit_base", 16, 224]
    title = f"copy detection (Table 4: ViT-B/16 has mAP {strong} on Copydays, strong)"
    evaluation.report(flags, world, title, args, data, measured, paper)


def main(argv: list[str] | None = None) -> None:
    parser = evaluation.command_line(__doc__)
    add = parser.add_argument
    add("--distractors", "--distractors_path", default="", metavar="FOLDER",
        help="images that are searched beside the originals")
    add("--whiten", "--whitening_path", default="", metavar="FOLDER",
        help="other images, to learn the whitening on; more than 2 D")
    add("--uncentred", type=true_or_false, nargs="?", const=True, default=False,
        help="scale by moments around 0 and keep all directions, as the release does [false]")
    flags = parser.parse_args(argv)
    with evaluation.start(flags) as world:
        measure_copy_detection(flags, world)


if __name__ == "__main__":
    main()
