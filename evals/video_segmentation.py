"""Video object segmentation by matching patches (Sec. 4.2.2, Table 5): frozen features follow objects, untrained.

The first frame's mask is given. Each patch of a later frame takes the labels of the 5 patches that are most like it,
among those at most 12 rows and columns away in the first frame and the last 7, weighted by exp(cosine / 0.1).
ViT-S/8 after DINO: J&F 69.9 on DAVIS 2017.

    python -m evals.video_segmentation --pretrained_weights runs/mine/checkpoint.pth
    python -m evals.video_segmentation --pretrained dino_vits8 --data_path DAVIS/

--data_path: the folder DAVIS, whose ImageSets/2017/val.txt names the sequences; without it a few clips of the embedded
creatures. Written are OUT/SEQUENCE/00000.png ..., which the official evaluation reads, and with --overlay
OUT/overlay/SEQUENCE/00000.png ... and OUT/overlay/SEQUENCE.gif. --eval_size: of the short side, else 480, or the
clips' own.

paper: the protocol of Jabri et al. 2020, in words; release: the numbers above. Departures from the release: the long
side is cut to multiples of the patch, not of 64 pixels; labels grow to the frame's own size in one step; exactly 5
patches count, also where several tie for the fifth place; 0.229, not 0.228, is the deviation of red.

Shapes: T frames of H x W pixels, r x c patches, m context frames, D width, C labels (the objects' and the ground's).
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

from evals.davis import VOID, Video, davis_files, outline, read_video, scores, write_annotation
from features import fit_to_patches, mean_and_std, normalise
from runtime.commandline import InputError, true_or_false, write_whole
from runtime.creatures import make_clip
from runtime.hardware import World
from training import evaluation as common

PAPER = {("vit_small", 16): (61.8, 60.2, 63.4), ("vit_base", 16): (62.3, 60.7, 63.9),
         ("vit_small", 8): (69.9, 66.6, 73.1), ("vit_base", 8): (71.4, 67.9, 74.9)}  # Table 5: J&F, J, F
NAMES = ("J&F-Mean %", "J-Mean %", "F-Mean %")
CLIPS, CLIP_SIDE = 3, 320


def patch_features(network: nn.Module, image: Tensor, short_side: int, args: dict, world: World) -> Tensor:
    """The last block's patch tokens, each of length 1: uint8 (3, H, W) -> fp32 (r, c, D)."""
    mean, std = mean_and_std(args)
    pixels = normalise(fit_to_patches(image, short_side, args["patch_size"]), mean, std)
    with world.autocast():
        tokens = network.get_intermediate_layers(pixels.unsqueeze(0).to(world.device))[0]
    rows = pixels.shape[1] // args["patch_size"]
    return F.normalize(rearrange(tokens[0, 1:].float(), "(r c) D -> r c D", r=rows), dim=-1)


def propagate(frame: Tensor, context: Tensor, labels: Tensor, topk: int = 5, radius: int = 12,
              temperature: float = 0.1) -> Tensor:
    """label[i] = sum over the topk likest j near i of softmax_j(cos(i, j) / T) label[j]; radius 0: all are near.

    frame (r, c, D), context (m, r, c, D), both of length 1, labels (m, r, c, C) -> (r, c, C).
    """
    rows, cols = frame.shape[:2]
    reach = radius or max(rows, cols)
    column = torch.arange(cols, device=frame.device)
    far = ((column[:, None] - column).abs() > reach).unsqueeze(1)  # of the columns; rows are cut out below
    propagated = []
    for row in range(rows):  # all rows at once would hold gigabytes of cosines at patches of 8
        near = slice(max(0, row - reach), row + reach + 1)
        keys = rearrange(context[:, near], "m r c D -> (m r) c D")
        cosines = torch.einsum("q D, k c D -> q k c", frame[row], keys).masked_fill(far, -torch.inf).flatten(1)
        best, index = cosines.topk(min(topk, cosines.shape[1]))
        weights = (best / temperature).softmax(dim=1)
        propagated.append(torch.einsum("q k, q k C -> q C", weights, labels[:, near].flatten(0, 2)[index]))
    return torch.stack(propagated)


def to_mask(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Soft labels of patches -> the number of each pixel's strongest, each label scaled to 0 ... 1 before: (H, W)."""
    grown = F.interpolate(rearrange(labels, "r c C -> 1 C r c"), size, mode="bilinear")[0]
    grown = grown - grown.amin(dim=(1, 2), keepdim=True)
    return (grown / grown.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)).argmax(dim=0)


@torch.no_grad()
def follow(network: nn.Module, video: Video, short_side: int, args: dict, world: World, n_last_frames: int = 7,
           **matching) -> Tensor:
    """Propagate the first frame's ids through the video -> ids (T, H, W) uint8, the first as it was given."""
    first = torch.where(video.ids[0] == VOID, 0, video.ids[0])
    numbers, size = first.unique(), tuple(first.shape)
    features = patch_features(network, video.images[0], short_side, args, world)
    small = F.interpolate(first.float()[None, None], features.shape[:2], mode="nearest-exact")[0, 0]
    labels = (small.unsqueeze(-1) == numbers).float().to(world.device)
    given, recent, ids = (features, labels), deque(maxlen=n_last_frames), [video.ids[0]]
    for image in tqdm(video.images[1:], video.name, disable=not world.is_main, leave=False):
        features = patch_features(network, image, short_side, args, world)
        labels = propagate(features, *(torch.stack(part) for part in zip(given, *recent)), **matching)
        recent.append((features, labels))
        ids.append(numbers[to_mask(labels, size).cpu()])
    return torch.stack(ids)


def overlay(video: Video, ids: Tensor) -> list[Image.Image]:
    """T frames with the objects of ids (T, H, W) in the palette's colours over them, half and half, outlined white."""
    colours = torch.zeros(256, 3, dtype=torch.uint8)
    colours.view(-1)[:len(video.palette)] = torch.tensor(video.palette, dtype=torch.uint8)
    frames = video.images.movedim(1, -1)
    mixed = torch.where((ids > 0).unsqueeze(-1), frames // 2 + colours[ids.long()] // 2, frames)
    mixed[outline(ids) > 0] = 255
    return [Image.fromarray(frame) for frame in np.asarray(mixed)]


def write(output: Path, video: Video, ids: Tensor, with_overlay: bool) -> None:
    """The indexed PNGs of one sequence, ids (T, H, W) uint8, and, asked for, what there is to look at."""
    for name, mask in zip(video.frames, ids):
        write_annotation(output / video.name / f"{name}.png", mask, video.palette)
    if with_overlay:
        first, *others = frames = overlay(video, ids)
        for name, frame in zip(video.frames, frames):
            write_whole(output / "overlay" / video.name / f"{name}.png", frame.save)
        write_whole(output / "overlay" / f"{video.name}.gif",
                    lambda part: first.save(part, save_all=True, append_images=others, duration=80, loop=0))


def clip(number: int) -> Video:
    """One of the embedded clips."""
    images, ids = make_clip(number, side=CLIP_SIDE)
    return Video(f"clip{number}", images, ids, [f"{i:05}" for i in range(len(images))])


def main(argv: list[str] | None = None) -> None:
    parser = common.command_line(__doc__, videos=True)
    add = parser.add_argument
    add("--n_last_frames", type=int, default=7, help="that vote beside the first [7]")
    add("--size_mask_neighborhood", type=int, default=12, help="radius in patches, 0: no limit [12]")
    add("--topk", type=int, default=5, help="patches that vote [5]")
    add("--temperature", type=float, default=0.1, help="of the votes [0.1]")
    add("--overlay", type=true_or_false, default=True, metavar="true|false", help="write frames to look at [true]")
    add("--output_dir", default="runs/video", metavar="OUT", help="gets masks and overlays [runs/video]")
    common.run(parser, evaluate, argv)


def evaluate(flags: Namespace, world: World) -> None:
    """Follow the objects of every sequence, write, score, and tell; the sequences are shared over the processes."""
    common.require(flags, n_last_frames=flags.n_last_frames >= 0, topk=flags.topk >= 1,
                   size_mask_neighborhood=flags.size_mask_neighborhood >= 0, temperature=flags.temperature > 0)
    backbone, args = common.load_backbone(flags, world)
    if not hasattr(backbone, "get_intermediate_layers"):
        raise InputError(f"{args['arch']} has no patch tokens to match: take a ViT's weights")
    files = davis_files(flags.data_path) if flags.data_path else {}
    sequences = list(files) or list(range(CLIPS))
    short_side = flags.eval_size or (480 if files else CLIP_SIDE)
    follow_in = partial(follow, short_side=short_side, args=args, world=world, n_last_frames=flags.n_last_frames,
                        topk=flags.topk, radius=flags.size_mask_neighborhood, temperature=flags.temperature)
    fresh, measured = None if files else common.untrained(args, world), []
    for index in torch.arange(len(sequences)).tensor_split(world.size)[world.rank].tolist():
        video = read_video(sequences[index], files[sequences[index]]) if files else clip(index)
        ids = follow_in(backbone, video)
        write(Path(flags.output_dir), video, ids, flags.overlay)
        rivals = [video.ids[:1].expand_as(video.ids)] + ([follow_in(fresh, video)] if fresh else [])
        measured.append(torch.stack([scores(one, video.ids) for one in (ids, *rivals)], dim=1))
    objects = world.gather_rows(torch.cat(measured) if measured else torch.empty(0))
    data = f"{flags.data_path or 'the embedded clips'}: {len(sequences)} sequences, {len(objects)} objects"
    common.tell(flags, world, "video object segmentation (Table 5: ViT-S/16 has J&F "
                f"{PAPER['vit_small', 16][0]} on DAVIS 2017)", args,
                f"{data}, short side {short_side} pixels", table(objects),
                dict(zip(NAMES, PAPER.get((args["arch"], args["patch_size"]), ()))))


def table(objects: Tensor) -> dict[str, float]:
    """J&F, J and F by name, means over objects, of the network and its two rivals: (n, 2 or 3, 2), the last J and F."""
    rows = objects.mean(dim=0).tolist()
    return {who + name: value for who, (region, contour) in zip(("", "first mask kept, ", "untrained, "), rows)
            for name, value in zip(NAMES, ((region + contour) / 2, region, contour))}


if __name__ == "__main__":
    main()
