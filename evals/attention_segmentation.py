"""[CLS]'s attention as a segmentation (Sec. 4.2.2, Fig. 4): the Jaccard of its masks with objects.

Of each head the heaviest patches are kept, up to a fraction of its attention. For each object of an
image the best head's Jaccard counts; the mean is taken over the objects of an image, then over
images (the authors' public answer). ViT-S/16 on VOC12: random weights 22.0, supervised 27.3, DINO
45.9. The property is shared: appendix D has BYOL 47.8, SwAV 46.8, MoCo-v2 46.3 and DINO without
multi-crop 45.1. 60 % of the attention are kept in the main text, 80 % in appendix D, with the same
numbers, so both are reported. The best of several heads flatters diffuse maps: the mask of the
heads' mean and the fraction of the attention on the objects stand below. Then the AUC of figure
against ground, also where the object is dark: evals/figure_ground.py says how. Each number has its
95 % interval over images.

    python -m evals.attention_segmentation --pretrained_weights runs/demo/checkpoint.pth \\
        --supervised_weights runs/supervised/checkpoint.pth
    python -m evals.attention_segmentation --pretrained dino_vits16 --images photos/ --masks masks/
    python -m evals.attention_segmentation --pretrained dino_vits16 --data_path VOCdevkit/VOC2012
    python -m evals.attention_segmentation --pretrained dino_vits16 --dataset oxford_pets

--images and --masks: folders in which an image and its mask have the same name, such as cat.jpg
and cat.png. Where every mask has at most two values, the larger one is the object. Where any has
more, 0 is the ground and every other number an object, in all of them; 255 is void if a mask of
three or more values has it. A line says which.

--data_path: a folder laid out as VOC12 (JPEGImages, SegmentationObject,
ImageSets/Segmentation/val.txt), or the folder of --dataset. The supervised network must have the
same architecture; evals.transfer --from_scratch trains it. The short side becomes --eval_size
pixels, 480 unless said (the embedded images: as in training), and both sides multiples of the
patch; the masks keep the image's own resolution. Pixels that VOC12 (255) and Oxford Pets (the
borders) leave open count nowhere, but for the mass. The paper gives neither size nor treatment of
these pixels.

Shapes: O objects, h heads, r x c patches, H x W pixels.
"""
from argparse import Namespace
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from attention import cls_attention, object_scores
from evals.figure_ground import (
    PRIOR,
    bootstrap,
    figure_ground_scores,
    patch_rows,
    to_patches,
)
from evals.masked_images import MaskedImages, open_masked
from features import mean_and_std, normalise
from runtime import hardware
from runtime.commandline import InputError, bar_style
from runtime.hardware import World
from runtime.threads import share_cores
from training import checkpoint, evaluation

PAPER = {  # Fig. 4: VOC12
    ("vit_small", 16): {"random": 22.0, "supervised": 27.3, "DINO": 45.9},
    ("vit_small", 8): {"random": 21.8, "supervised": 23.7, "DINO": 44.7},
}
# the scores of attention.object_scores: one, and two for every fraction that is kept
MASS = "mass_on_object"
JACCARDS = {"jaccard_best_head": "best head", "jaccard_head_mean": "heads' mean"}


def score_names(percents: Sequence[float]) -> list[str]:
    """Return the names of object_scores' scores, in its order."""
    names = [MASS]
    for percent in percents:
        for score in JACCARDS:
            names.append(f"{score}_{percent:g}")
    return names


class Measured(NamedTuple):
    """One network's scores on the images with objects.

    values: name -> every image's score (n,). head_aucs: of each head, means over images (h,).
    images, objects, resized: how many there are; resized: masks of another size than their image.
    """

    values: dict[str, Tensor]
    head_aucs: Tensor
    images: int
    objects: int
    resized: int


def to_size(objects: Tensor, void: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Resize masks by nearest neighbour: bool (O, H, W), (H, W) -> bool (O, *size), size."""
    masks = torch.cat([objects, void.unsqueeze(0)]).float()
    resized = F.interpolate(masks.unsqueeze(0), size, mode="nearest")[0].bool()
    return resized[:-1], resized[-1]


def measure_network(
    network: nn.Module,
    args: dict,
    images: MaskedImages,
    size: int,
    percents: Sequence[float],
    flags: Namespace,
    world: World,
) -> Measured:
    """Return the scores of the images with objects.

    The processes share the images. size: pixels of the short side.
    """
    mine = torch.arange(len(images)).tensor_split(world.size)[world.rank].tolist()
    loader = DataLoader(
        images,
        batch_size=None,  # each image has a size of its own
        sampler=mine,
        num_workers=share_cores(flags.num_workers, world.device),
        worker_init_fn=hardware.leave_signals_to_training,
    )
    mean, std = mean_and_std(args)
    names = score_names(percents)
    rows, patches = [], []
    hidden = not world.is_main
    bar = tqdm(loader, "attention", disable=hidden, leave=False, **bar_style())
    for number, (image, objects, void) in zip(mine, bar):
        resized = void.shape != image.shape[1:]
        if resized:
            objects, void = to_size(objects, void, tuple(image.shape[1:]))
        seen = (objects & ~void).any(dim=(1, 2))
        objects = objects[seen]  # one without a pixel would count as missed
        if len(objects) == 0:
            continue
        view = normalise(evaluation.fit_to_patches(image, size, network.patch_size), mean, std)
        with world.autocast():
            attention = cls_attention(network, view.unsqueeze(0).to(world.device))[0]
        attention = attention.float().cpu()
        scores = object_scores(attention, objects, void, percents)
        rows.append([*(scores[name] for name in names), len(objects), resized])
        patches.append(patch_rows(number, attention, objects, void))
    if not world.any(len(rows) > 0):
        raise InputError("no mask holds an object: check that the masks are those of the objects")
    table = world.gather_rows(torch.tensor(rows))
    patches = world.gather_rows(torch.cat(patches) if patches else torch.empty(0))
    *columns, objects, resized = table.unbind(dim=1)
    values = dict(zip(names, columns, strict=True))
    values[MASS] = 100 * values[MASS]  # in %
    figure_ground, head_aucs = figure_ground_scores(to_patches(patches))
    return Measured(
        values=values | figure_ground,
        head_aucs=head_aucs,
        images=len(table),
        objects=int(objects.sum()),
        resized=int(resized.sum()),
    )


def load_networks(flags: Namespace, world: World) -> dict[str, tuple[nn.Module, dict]]:
    """Return Fig. 4's columns: random weights, supervised ones if given, and DINO's."""
    dino, args = evaluation.load_backbone(flags, world)
    if not hasattr(dino, "get_last_selfattention"):
        raise InputError(f"{args['arch']} has no attention to segment with: take a ViT's weights")
    columns = {"random": (evaluation.untrained(args, world, flags.seed), args)}
    if flags.supervised_weights:
        supervised, supervised_args = checkpoint.load_backbone(
            flags.supervised_weights, "teacher", args["arch"], args["patch_size"],
            say=print if world.is_main else str,
        )
        columns["supervised"] = (supervised.to(world.device), supervised_args)
    columns["DINO"] = (dino, args)
    return columns


def measure_segmentation(flags: Namespace, world: World) -> None:
    """Score every column's network, and report the table, row by row."""
    in_range = all(0 < mass <= 1 for mass in flags.threshold)
    evaluation.require(flags, "threshold", in_range, "above 0 and at most 1, such as 0.6")
    if flags.skip_bad_images:
        raise InputError(
            "--skip_bad_images does not go with masks: fix the images, or take them away"
        )
    columns = load_networks(flags, world)
    _, args = columns["DINO"]
    images = open_masked(flags, world, args)
    if world.is_main:
        for note in images.notes:
            print(note)
    embedded = not (flags.data_path or flags.dataset or flags.images)
    size = flags.eval_size or 480
    if embedded and not flags.eval_size:
        size = args.get("eval_size", 64)
    percents = [round(100 * mass, 2) for mass in flags.threshold]
    found: dict[str, Measured] = {}
    for column, (network, its_args) in columns.items():
        found[column] = measure_network(network, its_args, images, size, percents, flags, world)

    rows = table_rows(found, percents)
    measured, intervals = {}, {}
    for row, values in rows.items():
        measured[row] = values.nanmean().item()
        intervals[row] = bootstrap(values, flags.seed)

    paper = {}
    if flags.data_path and not flags.dataset:  # laid out as VOC12
        for percent in (60, 80):  # of the main text and appendix D, with the same numbers
            for column, value in PAPER.get((args["arch"], args["patch_size"]), {}).items():
                paper[f"best head, {percent} % of the mass: {column}"] = value

    small = ", ".join(f"{name} {value}" for name, value in PAPER["vit_small", 16].items())
    title = (
        f"Jaccard of attention's masks (Fig. 4: ViT-S/16 has {small} on VOC12; BYOL 47.8, "
        "SwAV 46.8, MoCo-v2 46.3)"
    )
    data = describe(flags, found, size)
    evaluation.report(flags, world, title, args, data, measured, paper, intervals)


def table_rows(found: dict[str, Measured], percents: Sequence[float]) -> dict[str, Tensor]:
    """Return every image's score, (n,), of each row of the table: the measure, then the network."""
    names = {}
    for score, name in JACCARDS.items():
        for percent in percents:
            names[f"{score}_{percent:g}"] = f"{name}, {percent:g} % of the mass"
    names[MASS] = "mass on the objects %"
    first = next(iter(found.values()))
    rows = {}
    for score in [*names, *(name for name in first.values if name.startswith("AUC"))]:
        if score == PRIOR:
            rows[score] = first.values[score]
            continue
        for column, one in found.items():
            rows[f"{names.get(score, score)}: {column}"] = one.values[score]
    return rows


def describe(flags: Namespace, found: dict[str, Measured], size: int) -> str:
    """Return what was measured on, and the AUC of each network's heads; below 50 %: dark."""
    one = next(iter(found.values()))
    source = evaluation.data_name(flags)
    if flags.images:
        source = f"{flags.images} and {flags.masks}"
    data = f"{source}: {one.images} images, {one.objects} objects, short side {size} pixels"
    if one.resized:
        data += f"; {one.resized} masks resized to their image's size by nearest neighbour"
    with_auc = int((~one.values[PRIOR].isnan()).sum())
    if with_auc < one.images:
        whole = one.images - with_auc
        data += f"; AUC of {with_auc} images, since {whole} have no ground (all object or void)"
    data += "; AUC of each head"
    for column, measured in found.items():
        heads = " ".join(f"{value:.1f}" for value in measured.head_aucs.tolist())
        data += f", {column} {heads}"
    return data


def main(argv: list[str] | None = None) -> None:
    parser = evaluation.command_line(__doc__, batch_size=0)
    add = parser.add_argument
    add("--images", default="", metavar="FOLDER", help="of any images; goes with --masks")
    add("--masks", default="", metavar="FOLDER", help="of their masks, of the same names")
    add("--supervised_weights", default="", metavar="FILE",
        help="of evals.transfer --from_scratch, for the column")
    add("--threshold", type=float, nargs="+", default=[0.6, 0.8],
        help="fractions of the attention that are kept [0.6 0.8]")
    add("--seed", type=int, default=0, help="of the random weights and of the intervals [0]")
    flags = parser.parse_args(argv)
    with evaluation.start(flags) as world:
        measure_segmentation(flags, world)


if __name__ == "__main__":
    main()
