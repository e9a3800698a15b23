"""Video object segmentation by matching patches (Sec. 4.2.2, Table 5): nothing is trained.

The first frame's mask is given. Each patch of a later frame takes the labels of the 5 patches that
are most like it, among those at most 12 rows and columns away in the first frame and the last 7,
weighted by exp(cosine / 0.1). ViT-S/8 after DINO: J&F 69.9 on DAVIS 2017.

    python -m evals.video_segmentation --pretrained_weights runs/mine/checkpoint.pth
    python -m evals.video_segmentation --pretrained dino_vits8 --data_path DAVIS/
    python -m evals.video_segmentation --pretrained dino_vits8 --frames clip/ --masks first.png

--data_path: the folder DAVIS, of 2016 or 2017. ImageSets/2017/val.txt names the sequences; without
this file they are all that there are. --frames: a folder of frames, with the first frame's mask or
a folder of masks as --masks; J and F want a mask of every frame. A first mask of two values has one
object. With neither a few clips of the embedded creatures. Two rivals stand below: the first mask,
kept, and of at most ten sequences the same network untrained.

--output_dir OUT gets OUT/SEQUENCE/00000.png ..., which the official evaluation reads, and with
--overlay OUT/overlay/SEQUENCE/00000.png ... and OUT/overlay/SEQUENCE.gif. --eval_size: pixels of
the short side, else 480, or the clips' own.

paper: the protocol of Jabri et al. 2020, in words; release: the numbers above. Departures from the
release: frames are resized bicubically with antialiasing, not bilinearly without; the long side is
cut to multiples of the patch, not of 64 pixels; labels grow to the frame's own size in one step;
exactly 5 patches count, also where several tie for the fifth place; 0.229, not 0.228, is the
deviation of red.

Shapes: T frames of H x W pixels, r x c patches, m context frames, D width, C labels (the objects'
and the ground's).
"""
from argparse import Namespace
from collections import deque
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from evals.davis import (
    VAL,
    Files,
    Video,
    davis_files,
    outline,
    plain_files,
    read_video,
    scores,
    without_void,
    write_annotation,
)
from features import mean_and_std, normalise
from runtime.commandline import InputError, bar_style, true_or_false, write_whole
from runtime.creatures import make_clip
from runtime.hardware import World
from training import evaluation

PAPER = {  # Table 5: J&F, J, F
    ("vit_small", 16): (61.8, 60.2, 63.4),
    ("vit_base", 16): (62.3, 60.7, 63.9),
    ("vit_small", 8): (69.9, 66.6, 73.1),
    ("vit_base", 8): (71.4, 67.9, 74.9),
}
MATCHING = (7, 5, 12, 0.1)  # frames, patches, radius and temperature of Table 5
NAMES = ("J&F-Mean %", "J-Mean %", "F-Mean %")
FEW = 10  # sequences: a second network on more costs hours
CLIPS = 3
CLIP_SIDE = 320


def patch_features(
    network: nn.Module, image: Tensor, short_side: int, args: dict, world: World
) -> Tensor:
    """Return the last block's patch tokens, each of length 1: uint8 (3, H, W) -> fp32 (r, c, D)."""
    image = evaluation.fit_to_patches(image, short_side, args["patch_size"])
    view = normalise(image, *mean_and_std(args)).unsqueeze(0).to(world.device)
    with world.autocast():
        tokens = network.get_intermediate_layers(view, 1)[0]
    rows = image.shape[1] // args["patch_size"]
    patches = rearrange(tokens[0, 1:].float(), "(r c) D -> r c D", r=rows)
    return F.normalize(patches, dim=-1)


def propagate(
    frame: Tensor,
    context: Tensor,
    labels: Tensor,
    topk: int = 5,
    radius: int = 12,
    temperature: float = 0.1,
) -> Tensor:
    """Return label[i] = sum over the topk likest j near i of softmax_j(cos(i, j) / T) label[j].

    frame (r, c, D), context (m, r, c, D), both of length 1, labels (m, r, c, C) -> (r, c, C).
    radius: in patches; 0: all are near.
    """
    rows, columns = frame.shape[:2]
    reach = radius or max(rows, columns)
    column = torch.arange(columns, device=frame.device)
    far = ((column[:, None] - column).abs() > reach).unsqueeze(1)  # (c, 1, c)
    propagated = []
    for row in range(rows):  # all rows at once would hold gigabytes of cosines at patches of 8
        near = slice(max(0, row - reach), row + reach + 1)  # the rows that are near
        keys = rearrange(context[:, near], "m r c D -> (m r) c D")
        cosines = torch.einsum("q D, k c D -> q k c", frame[row], keys)
        cosines = cosines.masked_fill(far, -torch.inf).flatten(1)
        best, index = cosines.topk(min(topk, cosines.shape[1]))
        weights = (best / temperature).softmax(dim=1)
        candidates = labels[:, near].flatten(0, 2)
        propagated.append(torch.einsum("q k, q k C -> q C", weights, candidates[index]))
    return torch.stack(propagated)


def to_mask(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the number of each pixel's strongest label: soft labels (r, c, C) -> (H, W)."""
    grown = F.interpolate(rearrange(labels, "r c C -> 1 C r c"), size, mode="bilinear")[0]
    # release: each label is scaled to 0 ... 1 first, so that a weak one still wins at its strongest
    grown = grown - grown.amin(dim=(1, 2), keepdim=True)
    grown = grown / grown.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    return grown.argmax(dim=0)


@torch.no_grad()
def follow(
    network: nn.Module,
    video: Video,
    short_side: int,
    args: dict,
    world: World,
    n_last_frames: int = 7,
    **matching,
) -> Tensor:
    """Propagate the first frame's ids through the video: ids (T, H, W) uint8, the first as given.

    matching: propagate's topk, radius and temperature.
    """
    first = without_void(video.ids[0])
    numbers = first.unique()  # label c is object numbers[c]
    features = patch_features(network, video.images[0], short_side, args, world)
    small = F.interpolate(first.float()[None, None], features.shape[:2], mode="nearest-exact")[0, 0]
    labels = (small.unsqueeze(-1) == numbers).float().to(world.device)  # one-hot (r, c, C)
    given = (features, labels)
    recent = deque(maxlen=n_last_frames)
    ids = [video.ids[0]]
    frames = tqdm(
        video.images[1:], video.name, disable=not world.is_main, leave=False, **bar_style()
    )
    for image in frames:
        features = patch_features(network, image, short_side, args, world)
        context, context_labels = zip(given, *recent)
        labels = propagate(
            features, torch.stack(context), torch.stack(context_labels), **matching
        )
        recent.append((features, labels))
        ids.append(numbers[to_mask(labels, tuple(first.shape)).cpu()])
    return torch.stack(ids)


def draw_overlay(video: Video, ids: Tensor) -> list[Image.Image]:
    """Return the frames with the objects of ids (T, H, W) in the palette's colours over them."""
    colours = torch.zeros(256, 3, dtype=torch.uint8)
    colours.view(-1)[:len(video.palette)] = torch.tensor(video.palette, dtype=torch.uint8)
    frames = video.images.movedim(1, -1)
    is_object = (ids > 0).unsqueeze(-1)
    mixed = torch.where(is_object, frames // 2 + colours[ids.long()] // 2, frames)
    mixed[outline(ids) > 0] = 255  # white
    return [Image.fromarray(frame) for frame in np.asarray(mixed)]


def require_other_folders(output: Path, files: dict[str, Files]) -> None:
    """Raise InputError if a folder that is written to holds a frame or a mask of these files."""
    read = set()
    for sequence in files.values():
        for pair in sequence:
            read |= {file.parent.resolve() for file in pair if file is not None}
    written = [output / "overlay"]
    for name in files:
        written += [output / name, output / "overlay" / name]
    for folder in written:
        if folder.resolve() in read:
            raise InputError(
                f"--output_dir {str(output)!r} would write into {str(folder)!r}, which holds "
                "frames or masks: choose another folder"
            )


def write_masks(output: Path, video: Video, ids: Tensor) -> None:
    """Write the indexed PNGs of one sequence, ids (T, H, W) uint8."""
    for name, mask in zip(video.frames, ids, strict=True):
        write_annotation(output / video.name / f"{name}.png", mask, video.palette)


def write_overlay(output: Path, video: Video, ids: Tensor) -> None:
    """Write the frames with their objects, and all of them as a GIF."""
    frames = draw_overlay(video, ids)
    for name, frame in zip(video.frames, frames, strict=True):
        write_whole(output / "overlay" / video.name / f"{name}.png", frame.save)
    save = partial(
        frames[0].save, save_all=True, append_images=frames[1:], duration=80, loop=0
    )
    write_whole(output / "overlay" / f"{video.name}.gif", save)


def embedded_clip(number: int) -> Video:
    """Return one of the embedded clips."""
    images, ids = make_clip(number, side=CLIP_SIDE)
    return Video(f"clip{number}", images, ids, [f"{i:05}" for i in range(len(images))])


def score_table(objects: Tensor) -> dict[str, float]:
    """Return J&F, J and F by the rows' names, means over the objects.

    objects: (n, 2 or 3, 2): of the network and its rivals, J and F.
    """
    rivals = ("", "first mask kept, ", "untrained, ")
    measured = {}
    for rival, (region, contour) in zip(rivals, objects.mean(dim=0).tolist()):
        values = ((region + contour) / 2, region, contour)
        for name, value in zip(NAMES, values, strict=True):
            measured[rival + name] = value
    return measured


def measure_video_segmentation(flags: Namespace, world: World) -> None:
    """Follow the objects of every sequence, write the masks, and report the scores."""
    require = evaluation.require
    require(flags, "n_last_frames", flags.n_last_frames >= 0, "at least 0, such as 7")
    require(flags, "topk", flags.topk >= 1, "at least 1, such as 5")
    radius = flags.size_mask_neighborhood
    require(flags, "size_mask_neighborhood", radius >= 0, "at least 0, such as 12")
    require(flags, "temperature", flags.temperature > 0, "above 0, such as 0.1")
    backbone, args = evaluation.load_backbone(flags, world)
    if not hasattr(backbone, "get_intermediate_layers"):
        raise InputError(f"{args['arch']} has no patch tokens to match: take a ViT's weights")

    files = video_files(flags)
    output = Path(flags.output_dir)
    require_other_folders(output, files)
    frames = []
    for sequence in files.values():
        frames += [frame for frame, _ in sequence]
    levels, notes = evaluation.shared_levels(frames, flags, args)
    if world.is_main:
        for note in notes:
            print(note)
    sequences = list(files) or list(range(CLIPS))
    short_side = flags.eval_size or (480 if files else CLIP_SIDE)
    untrained = None
    if len(sequences) <= FEW:
        untrained = evaluation.untrained(args, world)

    def follow_in(network: nn.Module, video: Video) -> Tensor:
        return follow(
            network, video, short_side, args, world, flags.n_last_frames,
            topk=flags.topk, radius=radius, temperature=flags.temperature,
        )

    measured = []
    mine = torch.arange(len(sequences)).tensor_split(world.size)[world.rank]
    for index in mine.tolist():  # the processes share the sequences
        name = sequences[index]
        if files:
            video = read_video(name, files[name], levels)
        else:
            video = embedded_clip(name)
        ids = follow_in(backbone, video)
        write_masks(output, video, ids)
        if flags.overlay:
            write_overlay(output, video, ids)
        if len(video.ids) < len(video.images):  # only the first frame has a mask
            continue
        found = [ids, video.ids[:1].expand_as(video.ids)]  # a rival: the first mask, kept
        if untrained is not None:
            found.append(follow_in(untrained, video))
        measured.append(torch.stack([scores(one, video.ids) for one in found], dim=1))
    if not world.any(len(measured) > 0):
        if world.is_main:
            print(f"no J and F, which want a mask of every frame; the masks are in {output}")
        return
    objects = world.gather_rows(torch.cat(measured) if measured else torch.empty(0))

    source = flags.frames or flags.data_path or "the embedded clips"
    data = (
        f"{source}: {len(sequences)} sequences, {len(objects)} objects, "
        f"short side {short_side} pixels"
    )
    paper = {}
    matching = (flags.n_last_frames, flags.topk, radius, flags.temperature)
    davis_2017 = flags.data_path and Path(flags.data_path, VAL).is_file()
    if davis_2017 and short_side == 480 and matching == MATCHING:
        paper = dict(zip(NAMES, PAPER.get((args["arch"], args["patch_size"]), ())))
    small = PAPER["vit_small", 16][0]
    title = f"video object segmentation (Table 5: ViT-S/16 has J&F {small} on DAVIS 2017)"
    evaluation.report(flags, world, title, args, data, score_table(objects), paper)


def video_files(flags: Namespace) -> dict[str, Files]:
    """Return the files of each sequence that the flags mean; none: the embedded clips."""
    if bool(flags.frames) != bool(flags.masks):
        raise InputError("--frames and --masks go together: give both")
    if flags.frames and flags.data_path:
        raise InputError("--frames and --masks are the data: leave --data_path out")
    if flags.frames:
        return plain_files(flags.frames, flags.masks)
    if flags.data_path:
        return davis_files(flags.data_path)
    return {}


def main(argv: list[str] | None = None) -> None:
    parser = evaluation.command_line(__doc__, videos=True)
    add = parser.add_argument
    add("--frames", default="", metavar="FOLDER", help="of one video; goes with --masks")
    add("--masks", default="", metavar="FILE|FOLDER",
        help="the first frame's mask, or masks of the frames' names")
    add("--levels", type=float, nargs=2, default=(0, 0), metavar=("BLACK", "WHITE"),
        help="of frames of more than 8 bits [the checkpoint's, else found in these data]")
    add("--n_last_frames", type=int, default=7,
        help="how many frames give labels, beside the first [7]")
    add("--size_mask_neighborhood", type=int, default=12,
        help="radius in patches, 0: no limit [12]")
    add("--topk", type=int, default=5, help="how many patches give labels [5]")
    add("--temperature", type=float, default=0.1, help="of their weights [0.1]")
    add("--overlay", type=true_or_false, default=True, metavar="true|false",
        help="write frames to look at [true]")
    add("--output_dir", default="runs/video", metavar="OUT",
        help="gets masks and overlays [runs/video]")
    flags = parser.parse_args(argv)
    with evaluation.start(flags) as world:
        measure_video_segmentation(flags, world)


if __name__ == "__main__":
    main()
