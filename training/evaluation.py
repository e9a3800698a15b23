"""What eval_knn.py and the scripts of evals/ share: their flags, weights, images and report.

Each takes a frozen backbone from any checkpoint and any images. It prints what it measured beside
the paper's number, says on which data, and appends the same as one JSON line to --results.
"""
import json
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize

from data import Images, knn_split, open_images, without_unreadable
from features import EvaluationView
from runtime import hardware
from runtime.commandline import CommandLine, InputError, brief, errors_in_one_line
from runtime.hardware import World
from runtime.threads import share_cores
from training.backbone import build_backbone
from training.checkpoint import load_backbone as read_backbone
from training.levels import Levels, find_levels
from training.pretrained import PRETRAINED, add_weights_flags, weights_path

FEW = 20_000  # images: the pixels of more fill the memory, and a second network costs hours
IMAGENET_CLASSES = 1000
MOST_PIXELS = 2**24  # of a whole image that a network reads: attention grows with their square


def command_line(
    description: str | None, batch_size: int = 100, videos: bool = False
) -> CommandLine:
    """Return a parser with the flags that every evaluation has; a script adds its own.

    batch_size: the default, 0 where images are read one by one. videos: no flags about images.
    """
    parser = CommandLine(description)
    add = parser.add_argument
    add_weights_flags(parser)
    add("--data_path", default="", help="laid out as described above; without it embedded images")
    if not videos:
        add("--dataset", default="", help="one of torchvision's: cifar10, flowers102 ...")
        add("--download", action="store_true", help="fetch --dataset over the network")
        add("--skip_bad_images", action="store_true", help="leave out what cannot be read")
        add("--levels", type=float, nargs=2, default=(0, 0), metavar=("BLACK", "WHITE"),
            help="of images of more than 8 bits [the checkpoint's, else found in these data]")
        add("--num_workers", type=int, default=-1,
            help="processes that decode images; -1: one a core, on a CPU one in four cores")
    if batch_size and not videos:
        add("--batch_size", "--batch_size_per_gpu", type=int, default=batch_size,
            help=f"images a process [{batch_size}]")
    add("--eval_size", "--imsize", type=int, default=0,
        help="pixels of the view; default: as described above, else the checkpoint's, or 224")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    add("--precision", default="fp32", choices=("auto", "fp32", "bf16", "fp16"))
    add("--results", default="results.jsonl", metavar="FILE",
        help="gets one more JSON line [results.jsonl]")
    return parser


def require(flags: Namespace, flag: str, holds: bool, bound: str) -> None:
    """Raise InputError with the flag, its value and its bound, unless it holds."""
    if not holds:
        raise InputError(f"--{flag} {getattr(flags, flag)} must be {bound}")


@contextmanager
def start(flags: Namespace) -> Iterator[World]:
    """Join the processes. In the block, bad input ends in one line and exit status 2."""
    patience = 24 * 60  # minutes: a process with large images may keep the others waiting
    with errors_in_one_line(), hardware.start(flags.device, flags.precision, patience) as world:
        for flag, value in vars(flags).items():
            values = value if isinstance(value, list) else [value]
            numbers = [number for number in values if isinstance(number, float)]
            require(flags, flag, all(map(math.isfinite, numbers)), "finite: take a usual number")
        usual = 0 <= flags.eval_size <= MOST_PIXELS**0.5
        require(flags, "eval_size", usual, "at least 1 pixel and at most 4096, such as 224")
        if hasattr(flags, "seed"):
            require(flags, "seed", flags.seed >= 0, "at least 0")
        if hasattr(flags, "batch_size"):
            usual = 1 <= flags.batch_size <= 2**20
            require(flags, "batch_size", usual, f"at least 1, such as 64, and at most {2**20}")
        if hasattr(flags, "num_workers"):
            in_range = -1 <= flags.num_workers <= 1024
            require(flags, "num_workers", in_range, "at least 0 and at most 1024, or -1 to choose")
        yield world


def load_backbone(flags: Namespace, world: World) -> tuple[nn.Module, dict]:
    """Return the backbone that the flags name, frozen on the device, and the flags of its run."""
    by_name = bool(flags.pretrained) or flags.pretrained_weights in PRETRAINED
    with world.main_first(by_name):  # one process downloads for all
        path = weights_path(flags)
    say = print if world.is_main else str  # once
    backbone, args = read_backbone(
        path, flags.checkpoint_key, flags.arch, flags.patch_size, flags.num_heads, say=say
    )
    return backbone.to(world.device), args


def untrained(args: dict, world: World, seed: int | None = None) -> nn.Module:
    """Return the network of these flags before its training, frozen, on the device.

    args: of a checkpoint. seed: without one that of the run, so that it is the run's own start.
    """
    if seed is None:
        seed = args.get("seed", 0)
    torch.manual_seed(seed)
    network = build_backbone(
        args["arch"],
        args["patch_size"],
        args.get("img_size", 224),  # a convnet has none
        args.get("num_heads", 0),
        init_std=args.get("init_std", 0.02),
    )
    return network.eval().requires_grad_(False).to(world.device)


def is_imagenet(flags: Namespace, classes: int) -> bool:
    """Return whether the images may be ImageNet's: by --dataset, else by their 1000 classes."""
    if flags.dataset:
        return flags.dataset == "imagenet"
    return classes == IMAGENET_CLASSES


def readable(flags: Namespace, images: Images) -> Images:
    """Return all images, or with --skip_bad_images those that can be read."""
    if flags.skip_bad_images:
        images, _ = without_unreadable(images)
    if len(images) == 0:
        raise InputError("--skip_bad_images leaves no image of a part: add one that can be read")
    return images


def wanted_levels(flags: Namespace, args: dict) -> tuple[Levels, list[str]]:
    """Return black and white of images of more than 8 bits, and a line for where there are some.

    They are those of --levels, else those of the checkpoint's training. 0 and 0: neither has any.
    args: of the checkpoint.
    """
    trained = args.get("levels", (0.0, 0.0))
    if any(flags.levels) or not any(trained):
        return flags.levels, []
    return trained, ["these levels are those of the checkpoint's training: --levels gives others"]


def shared_levels(
    files: Sequence[Path], flags: Namespace, args: dict
) -> tuple[Levels | None, list[str]]:
    """Return one black and white for all files of more than 8 bits, and lines that say so.

    None, and no lines, where there are none. args: of the checkpoint.
    """
    wanted, line = wanted_levels(flags, args)
    levels, notes = find_levels(files, wanted)
    if levels:
        notes += line
    return levels, notes


def load_images(flags: Namespace, world: World, args: dict) -> tuple[Images, Images | None]:
    """Return the train images, and the test images where the source has them.

    args: of the checkpoint that is evaluated.
    """
    source = (flags.data_path, flags.dataset, flags.download)
    levels, line = wanted_levels(flags, args)
    with world.main_first(flags.download):
        train, test = open_images(*source, levels=levels)
    notes = train.notes
    if train.levels:
        notes += line
    found = len(train) + (len(test) if test else 0)
    train = readable(flags, train)
    left = len(train)
    if test is not None:
        test = readable(flags, test)
        left += len(test)
    if left < found:
        notes.append(f"skipped {found - left} images that cannot be read")
    if world.is_main:
        for note in notes:
            print(note)
    return train, test


def load_labelled(flags: Namespace, world: World, args: dict) -> tuple[Images, Images, str]:
    """Return labelled train and test images, and which the test images are.

    args: of the checkpoint that is evaluated.
    """
    return split_labelled(flags, *load_images(flags, world, args))


def load_test_or_train(
    flags: Namespace, world: World, args: dict, lacks: str = "no labels"
) -> Images:
    """Return the test images if they have labels, else the train images; only labelled ones.

    args: of the checkpoint. lacks: what the error says that the images have.
    """
    train, test = load_images(flags, world, args)
    images = train
    if test is not None and test.labels is not None:
        images = test
    if images.labels is None:
        raise InputError(
            f"--data_path {flags.data_path!r} has {lacks}: put images into class folders"
        )
    return images.subset((images.labels >= 0).nonzero().squeeze(1))


def split_labelled(
    flags: Namespace, train: Images, test: Images | None
) -> tuple[Images, Images, str]:
    """Return labelled train and test images, and which the test images are."""
    split = knn_split(train, test)
    if split is None:
        raise InputError(
            f"--data_path {flags.data_path!r} has no labels to learn from, or fewer than 5 images: "
            "put images into class folders (eval_knn.py --dump_features needs none)"
        )
    which = "every fifth image" if test is None else "the test part"
    return *split, which


def view_size(flags: Namespace, args: dict) -> int:
    """Return the pixels of the view: --eval_size, else the checkpoint's, else 224."""
    size = flags.eval_size or args.get("eval_size", 224)
    if size % args["patch_size"]:
        raise InputError(
            f"--eval_size {size} must be a multiple of the patch size {args['patch_size']}"
        )
    return size


def evaluation_view(
    flags: Namespace, args: dict, kind: Callable[..., EvaluationView] = EvaluationView
) -> EvaluationView:
    """Return the view that the checkpoint was evaluated with while it trained, or the paper's.

    kind: the class of the view.
    """
    settings = {}
    for setting, flag in (("crop", "eval_crop"), ("mean", "mean"), ("std", "std")):
        if flag in args:
            settings[setting] = args[flag]
    return kind(size=view_size(flags, args), **settings)


def loading(flags: Namespace, world: World) -> dict:
    """Return the arguments of extract_features that are about loading images."""
    return {
        "batch_size": flags.batch_size,
        "num_workers": share_cores(flags.num_workers, world.device),
        "progress": "features",
    }


def fit_to_patches(image: Tensor, short_side: float, patch_size: int) -> Tensor:
    """Resize a whole image so that both sides are multiples of the patch.

    The short side comes near short_side pixels: uint8 (3, H, W) -> uint8 (3, H', W').
    """
    height, width = image.shape[-2:]
    scale = short_side / min(height, width)
    rows = max(1, round(height * scale / patch_size))
    columns = max(1, round(width * scale / patch_size))
    size = [rows * patch_size, columns * patch_size]
    if math.prod(size) > MOST_PIXELS:
        raise InputError(
            f"an image of {width} x {height} pixels would become one of {size[1]} x {size[0]}: "
            "cut it, or ask for a smaller size"
        )
    return resize(image, size, InterpolationMode.BICUBIC, antialias=True)


def data_name(flags: Namespace) -> str:
    """Return which data the flags name, for the report."""
    names = [name for name in (flags.dataset, flags.data_path) if name]
    return " ".join(names) or "the embedded creatures"


def print_table(
    measured: dict[str, float],
    paper: dict[str, float],
    intervals: dict[str, tuple[float, float]],
) -> None:
    """Print each row's number beside the paper's, and its interval.

    Where no row has a paper's number, or an interval, there is no column for it.
    """
    width = max(len(row) for row in measured)
    head = f"{'':{width}}     here"
    if paper:
        head += "   paper"
    if intervals:
        head += "   95 % interval"
    print(head)
    for row, value in measured.items():
        line = f"{row:{width}}  {value:7.2f}"
        if paper:
            line += f"  {paper.get(row, '-'):>6}"
        if row in intervals:
            low, high = intervals[row]
            line += f"   {low:.2f} to {high:.2f}"
        print(line)


def without_nan(value: float) -> float | None:
    """Return the number as JSON can hold it."""
    if not math.isfinite(value):
        return None
    return round(value, 4)


def append_line(path: str, line: dict) -> None:
    """Append one line of JSON to the file --results."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
    except OSError as error:
        raise InputError(
            f"cannot append to --results {path!r} ({brief(error)}): choose another file"
        ) from None


def report(
    flags: Namespace,
    world: World,
    title: str,
    args: dict,
    data: str,
    measured: dict[str, float],
    paper: dict[str, float],
    intervals: dict[str, tuple[float, float]] | None = None,
) -> None:
    """Print what was measured beside the paper's numbers, and append both to --results.

    title: the task and its place in the paper. args: the flags that the network was made with.
    data: what was measured on. measured and paper: number by row; the paper's are of other data.
    intervals: low and high by row.
    """
    if not world.is_main:
        return
    paper = {row: value for row, value in paper.items() if row in measured}
    if getattr(flags, "checkpoint_key", "teacher") != "teacher":
        paper = {}  # the paper's numbers are of the teacher
    network = args["arch"]
    if args["patch_size"] > 1:  # 1: a convnet
        network += f", patches of {args['patch_size']}"
    print(f"{title}\n{network}; {data}")
    intervals = intervals or {}
    print_table(measured, paper, intervals)
    line = {
        "table": title,
        "weights": str(flags.pretrained_weights or flags.pretrained),
        "arch": args["arch"],
        "patch_size": args["patch_size"],
        "data": data,
        "paper": paper,
        "measured": {row: without_nan(value) for row, value in measured.items()},
        "flags": {flag: value for flag, value in vars(flags).items() if flag != "results"},
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    if intervals:
        rounded = {row: list(map(without_nan, both)) for row, both in intervals.items()}
        line["intervals"] = rounded
    append_line(flags.results, line)
