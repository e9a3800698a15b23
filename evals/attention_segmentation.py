"""[CLS]'s attention as a segmentation (Sec. 4.2.2, Fig. 4): the Jaccard of its masks with objects.

Of each head the heaviest patches are kept, up to a fraction of its attention. For each object of an
image the best head's Jaccard counts; the mean is taken over the objects of an image, then over
images (the authors' public answer). ViT-S/16 on VOC12: random weights 22.0, supervised 27.3, DINO
45.9. The property is shared: appendix D has BYOL 47.8, SwAV 46.8, MoCo-v2 46.3 and DINO without
multi-crop 45.1. 60 % of the attention are kept in the main text, 80 % in appendix D, with the same
numbers, so both are reported. The best of several heads flatters diffuse maps: the mask of the
heads' mean and the fraction of the attention on the objects stand below.

    python -m evals.attention_segmentation --pretrained_weights runs/demo/checkpoint.pth \\
        --supervised_weights runs/supervised/checkpoint.pth
    python -m evals.attention_segmentation --pretrained dino_vits16 --data_path VOCdevkit/VOC2012
    python -m evals.attention_segmentation --pretrained dino_vits16 --dataset oxford_pets

--data_path: a folder laid out as VOC12 (JPEGImages, SegmentationObject,
ImageSets/Segmentation/val.txt), or the folder of --dataset. The supervised network must have the
same architecture; evals.transfer --from_scratch trains it. The short side becomes --eval_size
pixels, 480 unless said (the embedded images: as in training), and both sides multiples of the
patch; the masks keep their own resolution. Pixels that VOC12 (255) and Oxford Pets (the borders)
leave open count nowhere in the Jaccard. The paper gives neither size nor treatment of these pixels.

Shapes: O objects, h heads, r x c patches, H x W pixels.
"""
from argparse import Namespace
from collections.abc import Sequence

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from attention import cls_attention, object_scores
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


@torch.no_grad()
def mean_scores(
    network: nn.Module,
    args: dict,
    images: MaskedImages,
    size: int,
    percents: Sequence[float],
    flags: Namespace,
    world: World,
) -> tuple[dict[str, float], int, int]:
    """Return the mean scores of the images with objects, how many these are, and their objects.

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
    rows = []
    hidden = not world.is_main
    bar = tqdm(loader, "attention", disable=hidden, leave=False, **bar_style())
    for image, objects, void in bar:
        seen = (objects & ~void).any(dim=(1, 2))
        objects = objects[seen]  # one without a pixel would count as missed
        if len(objects) == 0:
            continue
        view = normalise(evaluation.fit_to_patches(image, size, network.patch_size), mean, std)
        with world.autocast():
            attention = cls_attention(network, view.unsqueeze(0).to(world.device))[0]
        scores = object_scores(attention.float().cpu(), objects, void, percents)
        rows.append([*(scores[name] for name in names), len(objects)])
    if not world.any(len(rows) > 0):
        raise InputError("no mask holds an object: check that the masks are those of the objects")
    table = world.gather_rows(torch.tensor(rows))
    means = table.mean(dim=0).tolist()
    return dict(zip(names, means)), len(table), int(table[:, -1].sum())


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
            "--skip_bad_images does not go with masks: fix the images, or take their names out of "
            "val.txt"
        )
    columns = load_networks(flags, world)
    images = open_masked(flags, world)
    _, args = columns["DINO"]
    size = flags.eval_size or 480
    if not (flags.eval_size or flags.data_path or flags.dataset):
        size = args.get("eval_size", 64)  # of the embedded images
    percents = [round(100 * mass, 2) for mass in flags.threshold]
    scores = {}
    for column, (network, its_args) in columns.items():
        scores[column], number, objects = mean_scores(
            network, its_args, images, size, percents, flags, world
        )

    measured = {}
    for score, name in JACCARDS.items():
        for percent in percents:
            for column in columns:
                row = f"{name}, {percent:g} % of the mass: {column}"
                measured[row] = scores[column][f"{score}_{percent:g}"]
    for column in columns:
        measured[f"mass on the objects %: {column}"] = 100 * scores[column][MASS]

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
    source = evaluation.data_name(flags)
    data = f"{source}: {number} images, {objects} objects, short side {size} pixels"
    evaluation.report(flags, world, title, args, data, measured, paper)


def main(argv: list[str] | None = None) -> None:
    parser = evaluation.command_line(__doc__, batch_size=0)
    add = parser.add_argument
    add("--supervised_weights", default="", metavar="FILE",
        help="of evals.transfer --from_scratch, for the column")
    add("--threshold", type=float, nargs="+", default=[0.6, 0.8],
        help="fractions of the attention that are kept [0.6 0.8]")
    add("--seed", type=int, default=0, help="of the random weights [0]")
    flags = parser.parse_args(argv)
    with evaluation.start(flags) as world:
        measure_segmentation(flags, world)


if __name__ == "__main__":
    main()
