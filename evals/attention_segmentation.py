"""[CLS]'s attention as a segmentation (Sec. 4.2.2, Fig. 4): the Jaccard of its masks with the objects'.

Of each head the heaviest patches are kept, up to a share of its mass. For each object of an image the best head's
Jaccard counts; the mean is taken over the objects of an image, then over images (the authors' public answer).
ViT-S/16 on VOC12: random weights 22.0, supervised 27.3, DINO 45.9; 60 % of the mass are kept in the main text, 80 %
in appendix D, with the same numbers, so both are told. The best of several heads flatters diffuse maps: the mask of
the heads' mean and the share of the attention on the objects stand below.

    python -m evals.attention_segmentation --pretrained_weights runs/demo/checkpoint.pth \\
        --supervised_weights runs/supervised/checkpoint.pth
    python -m evals.attention_segmentation --pretrained dino_vits16 --data_path VOCdevkit/VOC2012
    python -m evals.attention_segmentation --pretrained dino_vits16 --dataset oxford_pets --data_path data/

--data_path: a folder laid out as VOC12 (JPEGImages, SegmentationObject, ImageSets/Segmentation/val.txt). Of the
supervised network the same architecture must be trained, with evals.transfer --from_scratch. The short side becomes
--eval_size pixels, 480 unless said (the embedded images: as in training), and both sides multiples of the patch; the
masks keep their own resolution. Pixels that VOC12 (255) and Oxford Pets (the borders) leave open count nowhere in the
Jaccard. The paper gives neither size nor treatment of these pixels.

Shapes: O objects, h heads, r x c patches, H x W pixels.
"""
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from attention import cls_attention, object_scores
from data import UNREADABLE, decode, open_images, to_rgb, torchvision_part
from features import fit_to_patches, mean_and_std, normalise
from runtime import hardware
from runtime.commandline import InputError, brief
from runtime.hardware import World
from training import checkpoint
from training import evaluation as common

PAPER = {("vit_small", 16): {"random": 22.0, "supervised": 27.3, "DINO": 45.9},
         ("vit_small", 8): {"random": 21.8, "supervised": 23.7, "DINO": 44.7}}  # Fig. 4: VOC12


class MaskedImages(Dataset):
    """read(items[i]) of each image: uint8 (3, H, W), objects bool (O, H, W), void bool (H, W)."""

    def __init__(self, items: Sequence, read: Callable[..., tuple[Tensor, Tensor, Tensor]]):
        self.items, self.read = items, read

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        try:
            return self.read(self.items[index])
        except (OSError, SyntaxError, EOFError) as error:  # torchvision's datasets open their files here
            raise InputError(f"cannot read image {index} or its mask ({brief(error)}): mend it") from None


def read_embedded(item: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The embedded image and its mask (H, W): one object, and no pixel in doubt."""
    image, mask = item
    return image, mask.unsqueeze(0), torch.zeros_like(mask)


def read_pet(item: tuple[Image.Image, Image.Image]) -> tuple[Tensor, Tensor, Tensor]:
    """Oxford Pets' image and trimap: 1 the pet, 2 the ground, 3 the border between them, void."""
    trimap = pil_to_tensor(item[1])
    return pil_to_tensor(to_rgb(item[0])), trimap == 1, trimap[0] == 3


def read_voc(item: tuple[Path, Path]) -> tuple[Tensor, Tensor, Tensor]:
    """VOC12's image and mask, a palette image: 0 the ground, 255 void, any other number an object."""
    image, mask = item
    image = decode(image)
    try:
        with Image.open(mask) as file:
            numbers = torch.from_numpy(np.array(file))
    except UNREADABLE as error:
        raise InputError(f"cannot read the mask {str(mask)!r} ({brief(error)}): take another copy of it") from None
    if numbers.shape != image.shape[-2:]:
        raise InputError(f"the mask {str(mask)!r} is {tuple(numbers.shape)}, its image {tuple(image.shape[-2:])}: "
                         "a mask must be a palette image, one number a pixel, as large as its image")
    objects = [numbers == number for number in numbers.unique().tolist() if number not in (0, 255)]
    return image, torch.stack(objects) if objects else torch.zeros(0, *numbers.shape).bool(), numbers == 255


def open_voc(folder: Path) -> list[tuple[Path, Path]]:
    """The images and masks that VOC12's val.txt names; raises InputError for the first that is not there."""
    listed = folder / "ImageSets" / "Segmentation" / "val.txt"
    if not listed.is_file():
        raise InputError(f"no {str(listed)!r}: --data_path must be laid out as VOCdevkit/VOC2012, or leave it out")
    items = [(folder / "JPEGImages" / f"{name}.jpg", folder / "SegmentationObject" / f"{name}.png")
             for name in listed.read_text().split()]
    for path in (path for item in items for path in item):
        if not path.is_file():
            raise InputError(f"{str(listed)!r} names {path.stem!r}, but there is no {str(path)!r}: add it, or take the "
                             "name out")
    if not items:
        raise InputError(f"{str(listed)!r} names no images: fill it with names, one a line")
    return items


def open_masked(flags: Namespace, world: World) -> MaskedImages:
    """The images with masks that the flags name: VOC12's layout, Oxford Pets, or the embedded evaluation part."""
    if flags.dataset not in ("", "oxford_pets"):
        raise InputError(f"--dataset {flags.dataset} has no masks: take oxford_pets, or a --data_path as VOC12's")
    if flags.dataset:
        with world.main_first(flags.download):
            return MaskedImages(torchvision_part("oxford_pets", flags.data_path or "data", flags.download,
                                                   split="test", target_types="segmentation"), read_pet)
    if flags.data_path:
        return MaskedImages(open_voc(Path(flags.data_path)), read_voc)
    val = open_images()[1]
    return MaskedImages(list(zip(val.source, val.masks)), read_embedded)


@torch.no_grad()
def mean_scores(network: nn.Module, args: dict, images: MaskedImages, size: int, percents: Sequence[float],
                flags: Namespace, world: World) -> tuple[dict[str, float], int, int]:
    """Means over the images with objects, shared over the processes -> (scores, such images, their objects)."""
    mean, std = mean_and_std(args)
    share = torch.arange(len(images)).tensor_split(world.size)[world.rank].tolist()
    loader = DataLoader(images, batch_size=None, sampler=share, worker_init_fn=hardware.leave_signals_to_training,
                        num_workers=hardware.share_cores(flags.num_workers, world.device))
    one = torch.ones(1, 1, 1)
    names = object_scores(one, one.bool(), ~one[0].bool(), percents).keys()  # known to a process without objects too
    rows = []
    for image, objects, void in tqdm(loader, "attention", disable=not world.is_main, leave=False):
        if len(objects):
            pixels = normalise(fit_to_patches(image, size, network.patch_size), mean, std)
            with world.autocast():
                attention = cls_attention(network, pixels.unsqueeze(0).to(world.device))[0].float().cpu()
            scores = object_scores(attention, objects, void, percents)
            rows.append([*scores.values(), len(objects)])
    if not world.any(bool(rows)):
        raise InputError("no mask holds an object: check that the masks are those of the objects")
    table = world.gather_rows(torch.tensor(rows))
    return dict(zip(names, table.mean(dim=0).tolist())), len(table), int(table[:, -1].sum())


def networks(flags: Namespace, world: World) -> dict[str, tuple[nn.Module, dict]]:
    """Fig. 4's columns: the same architecture with random weights, supervised if given, and with DINO's."""
    dino, args = common.load_backbone(flags, world)
    if not hasattr(dino, "get_last_selfattention"):
        raise InputError(f"{args['arch']} has no attention to segment with: take a ViT's weights")
    columns = {"random": (common.untrained(args, world, flags.seed), args)}
    if flags.supervised_weights:
        supervised, its = checkpoint.load_backbone(flags.supervised_weights, "teacher", args["arch"],
                                                   args["patch_size"])
        columns["supervised"] = (supervised.to(world.device), its)
    return columns | {"DINO": (dino, args)}


def main(argv: list[str] | None = None) -> None:
    parser = common.command_line(__doc__, batch_size=0)
    add = parser.add_argument
    add("--supervised_weights", default="", metavar="FILE", help="of evals.transfer --from_scratch, for the column")
    add("--threshold", type=float, nargs="+", default=[0.6, 0.8], help="shares of the mass that are kept [0.6 0.8]")
    add("--seed", type=int, default=0, help="of the random weights [0]")
    common.run(parser, evaluate, argv)


def evaluate(flags: Namespace, world: World) -> None:
    """Every column's scores, then the table, row by row."""
    common.require(flags, threshold=all(0 < mass <= 1 for mass in flags.threshold))
    if flags.skip_bad_images:
        raise InputError("--skip_bad_images does not go with masks: mend the images, or take their names out of "
                         "val.txt")
    columns, images = networks(flags, world), open_masked(flags, world)
    embedded = not (flags.data_path or flags.dataset)
    percents = [round(100 * mass, 2) for mass in flags.threshold]
    found = {}
    for name, (network, args) in columns.items():
        size = flags.eval_size or (columns["DINO"][1].get("eval_size", 64) if embedded else 480)
        found[name], n, objects = mean_scores(network, args, images, size, percents, flags, world)
    rows = {f"best head, {percent:g} % of the mass": f"jaccard_best_head_{percent:g}" for percent in percents}
    paper = {f"{row}: {name}": value for row, key in rows.items() if key.endswith(("_60", "_80"))
             for name, value in PAPER.get((args["arch"], args["patch_size"]), {}).items() if name in columns}
    rows |= {f"heads' mean, {percent:g} % of the mass": f"jaccard_head_mean_{percent:g}" for percent in percents}
    measured = {f"{row}: {name}": found[name][key] for row, key in rows.items() for name in columns}
    measured |= {f"mass on the objects %: {name}": 100 * found[name]["mass_on_object"] for name in columns}
    small = ", ".join(f"{name} {value}" for name, value in PAPER["vit_small", 16].items())
    common.tell(flags, world, f"Jaccard of attention's masks (Fig. 4: ViT-S/16 has {small} on VOC12)", args,
                f"{common.source(flags)}: {n} images, {objects} objects, short side {size} pixels",
                measured, paper)


if __name__ == "__main__":
    main()
