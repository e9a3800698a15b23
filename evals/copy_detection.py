"""Copy detection with frozen features (Sec. 4.2.1, Table 4): find the image that a distorted one was made from.

The descriptor is [CLS] joined with the patch tokens' generalised mean (GeM, p = 4), whitened on other images. Each
copy ranks the originals among distractors; mAP over the copies. On Copydays' strong copies with 10,000 distractors
DINO reaches 81.7 with ViT-B/16, 85.5 with ViT-B/8 at 320 pixels; supervised ViT-B/16 76.4. As in the release images
are stretched to squares. Departures: the release ranks the first 20 only, and its covariance is not around the mean.

    python -m evals.copy_detection --pretrained_weights runs/demo/checkpoint.pth
    python -m evals.copy_detection --pretrained dino_vitb16 --data_path copydays/ --distractors yfcc/a/ --whiten yfcc/b/
    python -m evals.copy_detection --make copies/ --data_path photos/

--data_path: Copydays' layout, original/NNNN00.jpg and strong/NNNN01.jpg ..., jpegqual/Q/NNNN00.jpg, crops/P/NNNN00.jpg
(Q, P: quality, percent cut off) as far as they are there; a copy's original has the same name but for the last two
digits. --make writes original/ and strong/ of any images: each blurred, set on a mottled ground, as if printed and
scanned, cut, and compressed.

Shapes: B images, n of any set, N patches, D width.
"""
import io
import tempfile
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
from tqdm import tqdm

from data import Images, find_images, open_folder
from evals.retrieval import average_precisions, gem, learn_whitening
from features import EvaluationView, extract_features
from runtime.commandline import InputError, brief
from runtime.hardware import World
from training import evaluation as common
from vit import VisionTransformer

PAPER = {("vit_base", 16, 224): 81.7, ("vit_base", 8, 320): 85.5}  # Table 4, strong, with the images' size in pixels
Random = np.random.Generator


class Descriptor(nn.Module):
    """[CLS] joined with GeM of the last block's patch tokens: (B, 3, H, W) -> (B, 2 D).

    Not in the paper: of a ResNet, the pooled feature joined with GeM of the last feature map.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> Tensor:
        whole, patches = (self.map_tokens if isinstance(self.backbone, ResNet) else self.vit_tokens)(images)
        return torch.cat([whole.float(), gem(patches.float())], dim=1)

    def vit_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.backbone.get_intermediate_layers(images)[0]
        return tokens[:, 0], tokens[:, 1:]  # (B, D), (B, N, D)

    def map_tokens(self, images: Tensor) -> tuple[Tensor, Tensor]:
        seen = []
        hook = self.backbone.avgpool.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        pooled = self.backbone(images)
        hook.remove()
        return pooled, seen[0].flatten(2).transpose(1, 2)  # (B, D), (B, N, D)


class SquareView(EvaluationView):
    """The whole image stretched to S x S: uint8 (3, H, W) -> float (3, S, S)."""

    def __call__(self, image: Tensor) -> Tensor:
        return super().__call__(resize(image, [self.size, self.size], InterpolationMode.BICUBIC, antialias=True))


def blur(image: Image.Image, random: Random) -> Image.Image:
    """Gaussian blur, sigma 1.5 to 4 % of the short side."""
    return image.filter(ImageFilter.GaussianBlur(min(image.size) * random.uniform(0.015, 0.04)))


def insert(image: Image.Image, random: Random) -> Image.Image:
    """The image, shrunk to 40 to 70 % of its sides, anywhere on a mottled ground."""
    ground = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize(image.size, Image.BICUBIC)
    share = random.uniform(0.4, 0.7)
    small = image.resize([max(1, round(side * share)) for side in image.size], Image.LANCZOS)
    ground.paste(small, [int(random.integers(0, 1 + all_ - part)) for all_, part in zip(ground.size, small.size)])
    return ground


def print_and_scan(image: Image.Image, random: Random) -> Image.Image:
    """Turned by up to 8 degrees on white paper, paler, a little out of focus, with the scanner's noise."""
    turned = image.rotate(random.uniform(-8, 8), Image.BICUBIC, expand=True, fillcolor="white")
    values = np.asarray(turned.filter(ImageFilter.GaussianBlur(min(image.size) / 200)), dtype=float)
    ink = random.uniform(0.5, 0.75, size=3)  # of each colour's contrast
    values = 240 - ink * (255 - values) + random.normal(0, 10, values.shape[:2])[..., None]
    return Image.fromarray(values.clip(0, 255).round().astype(np.uint8))


def crop(image: Image.Image, random: Random) -> Image.Image:
    """20 to 50 % of the area, anywhere, of the same shape."""
    share = random.uniform(0.2, 0.5) ** 0.5
    width, height = (max(1, round(side * share)) for side in image.size)
    left, top = (int(random.integers(0, 1 + all_ - part)) for all_, part in zip(image.size, (width, height)))
    return image.crop((left, top, left + width, top + height))


def jpeg(image: Image.Image, random: Random) -> Image.Image:
    """Compressed with quality 3 to 8."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(random.integers(3, 9)))
    return Image.open(file).convert("RGB")


DISTORTIONS: dict[str, Callable[[Image.Image, Random], Image.Image]] = {
    "blur": blur, "insertion": insert, "print and scan": print_and_scan, "crop": crop, "JPEG": jpeg}


def distorted(image: Tensor, number: int) -> list[Image.Image]:
    """All DISTORTIONS of an image (3, H, W) uint8; the same for the same number."""
    return [distort(to_pil_image(image), np.random.default_rng([number, i]))
            for i, distort in enumerate(DISTORTIONS.values())]


class Copies(NamedTuple):
    """What is searched: the labels of originals and copies say which original it is; the others have none."""

    originals: Images
    blocks: dict[str, Images]
    distractors: Images | None
    whitening: Images | None


def made_copies(train: Images, val: Images) -> Copies:
    """Strong copies of the first 100 of val, the others of val as distractors, 2000 of train to whiten on."""
    rows = torch.arange(len(val))
    originals = [val[i][0] for i in range(min(100, len(val)))]
    copies = zip(*(distorted(image, number) for number, image in enumerate(originals)))
    blocks = {f"strong, {name}": Images([pil_to_tensor(copy) for copy in some], range(len(originals)))
              for name, some in zip(DISTORTIONS, copies)}
    return Copies(Images(originals, range(len(originals))), blocks, val.subset(rows[len(originals):]),
                  train.subset(torch.arange(min(2000, len(train)))))


def open_copydays(folder: Path) -> tuple[Images, dict[str, Images]]:
    """Copydays' layout -> the originals, and the copies by block: strong, jpegqual/3 ..., numbered as the originals."""
    places = [folder / "strong", *sorted(folder.glob("jpegqual/*")), *sorted(folder.glob("crops/*"))]
    blocks = {place.relative_to(folder).as_posix(): find_images(place) for place in places}
    blocks, originals = {name: files for name, files in blocks.items() if files}, find_images(folder / "original")
    number = {file.stem[:-2]: i for i, file in enumerate(originals)}
    if not originals or not blocks:
        raise InputError(f"--data_path {str(folder)!r} lacks images in original/, or copies in strong/, jpegqual/Q/ "
                         "or crops/P/: --make writes them from any images")
    strays = [file for files in blocks.values() for file in files if file.stem[:-2] not in number]
    if strays or len(number) < len(originals):
        raise InputError(f"{str(strays[0] if strays else originals[0])!r} is not named as Copydays' images are: the "
                         "original NNNN00.jpg, its copies NNNN01.jpg ...")
    return Images(originals, range(len(originals))), {
        name: Images(files, [number[file.stem[:-2]] for file in files]) for name, files in blocks.items()}


def open_copies(flags: Namespace, world: World) -> Copies:
    """Copydays' layout with the folders that the flags name, or copies made in memory."""
    if not flags.data_path or flags.dataset:
        if flags.distractors or flags.whiten:
            raise InputError("--distractors and --whiten go with a --data_path in Copydays' layout: --make writes one")
        train, val = common.load_images(flags, world)
        if val is None:
            raise InputError(f"--dataset {flags.dataset} has no test part to copy: write copies with --make")
        return made_copies(train, val)
    readable = lambda images: common.readable(flags, images)
    originals, blocks = open_copydays(Path(flags.data_path))
    others = [readable(open_folder(Path(path))) if path else None for path in (flags.distractors, flags.whiten)]
    return Copies(readable(originals), {name: readable(block) for name, block in blocks.items()}, *others)


def make(images: Images, folder: Path) -> None:
    """Write every image and its strong copies to the folder, in Copydays' layout."""
    if (folder / "original").exists() or (folder / "strong").exists():
        raise InputError(f"--make {str(folder)!r} has original/ or strong/ already: choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:  # which an image that cannot be read leaves empty
            parts = [Path(unfinished, name) for name in ("original", "strong")]
            for part in parts:
                part.mkdir()
            for number in tqdm(range(len(images)), "copies", leave=False):
                image, _ = images[number]
                to_pil_image(image).save(parts[0] / f"{number:04}00.jpg", quality=95)
                for i, copy in enumerate(distorted(image, number), start=1):
                    copy.save(parts[1] / f"{number:04}{i:02}.jpg", quality=95)
            for part in parts:
                part.rename(folder / part.name)
    except OSError as error:
        raise InputError(f"cannot write to --make {str(folder)!r} ({brief(error)}): choose another folder") from None
    print(f"wrote {len(images)} originals and {len(DISTORTIONS) * len(images)} copies to {folder}")


def main(argv: list[str] | None = None) -> None:
    parser = common.command_line(__doc__)
    add = parser.add_argument
    add("--distractors", default="", metavar="FOLDER", help="images that are searched beside the originals")
    add("--whiten", default="", metavar="FOLDER", help="other images, to learn the whitening on; more than 2 D")
    add("--make", default="", metavar="FOLDER", help="write strong copies of the images there; needs no weights")
    common.run(parser, evaluate, argv)


def evaluate(flags: Namespace, world: World) -> None:
    """Make copies, or find them: a table of mAPs by block, whitened and not."""
    if flags.make:
        train, val = common.load_images(flags, world)
        return make(train if val is None else val, Path(flags.make)) if world.is_main else None
    backbone, args = common.load_backbone(flags, world)
    if not isinstance(backbone, (VisionTransformer, ResNet)):
        raise InputError(f"{args['arch']} has no patch tokens: take the weights of a ViT or a ResNet")
    copies = open_copies(flags, world)
    view = common.evaluation_view(flags, args | {"eval_crop": 1}, SquareView)
    found = find_copies(copies, lambda images: extract_features(
        Descriptor(backbone), images, view, world, **common.loading(flags, world)))
    counts = [0 if part is None else len(part) for part in (copies.originals, copies.distractors, copies.whitening)]
    paper = PAPER.get((args["arch"], args["patch_size"], view.size))
    strong = PAPER["vit_base", 16, 224]
    common.tell(flags, world, f"copy detection (Table 4: ViT-B/16 has mAP {strong} on Copydays, strong)", args,
                "{}: {} originals among {} distractors, whitening from {} images, {size} x {size} pixels".format(
                        common.source(flags), *counts, size=view.size),
                found, {"strong, whitened, mAP %": paper} if paper else {})


def find_copies(copies: Copies, describe: Callable[[Images], Tensor]) -> dict[str, float]:
    """mAP in % of every block and of all strong copies; of whitened descriptors too, if there are images for it.

    describe: n images -> their descriptors (n, 2 D).
    """
    database = torch.cat([describe(part) for part in (copies.originals, copies.distractors) if part is not None])
    labels = torch.full((len(database),), -1)
    labels[:len(copies.originals)] = copies.originals.labels
    queries, measured = {name: describe(block) for name, block in copies.blocks.items()}, {}
    steps = {"not whitened": lambda descriptors: descriptors}
    if copies.whitening is not None:
        if len(copies.whitening) < 2:
            raise InputError("--whiten holds one image: the whitening is learnt on many, more than 2 D")
        steps = {"whitened": learn_whitening(describe(copies.whitening))} | steps
    for step, apply in steps.items():
        found = {name: average_precisions(apply(descriptors), apply(database),
                                          copies.blocks[name].labels[:, None] == labels)
                 for name, descriptors in queries.items()}
        strong = [precisions for name, precisions in found.items() if name.startswith("strong")]
        found = ({"strong": torch.cat(strong)} if strong else {}) | found
        measured |= {f"{name}, {step}, mAP %": 100 * precisions.nanmean().item() for name, precisions in found.items()}
    return measured


if __name__ == "__main__":
    main()
