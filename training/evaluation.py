"""What the evaluations share (Sec. 3.2 and 4, appendix F): weights, images, view, and the telling.

Every eval_*.py takes a backbone from any checkpoint, frozen, and any images; prints what it measured beside the
paper's number, saying on which data; and appends the same as one JSON line to --results.
"""
import argparse
import json
import math
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data import Images, knn_split, open_images, without_unreadable
from features import EvaluationView
from runtime import hardware
from runtime.commandline import CommandLine, InputError, brief, errors_in_one_line
from runtime.hardware import World
from runtime.sampling import CropsDataset, EpochBatches, make_loader
from training import checkpoint
from training.backbone import build_backbone


def command_line(description: str | None, batch_size: int = 100, videos: bool = False) -> CommandLine:
    """The flags that every evaluation has, less those of images where it reads videos; a script adds its own.

    batch_size: the default; 0 where images are read one by one.
    """
    parser = CommandLine(description)
    add = parser.add_argument
    checkpoint.add_weights_flags(parser)
    add("--arch", default="", help="only where the file does not say")
    add("--data_path", default="", help="the images, laid out as the lines above say; without it embedded images")
    if not videos:
        add("--dataset", default="", help="one of torchvision's instead: cifar10, flowers102 ...")
        add("--download", action="store_true", help="fetch --dataset over the network")
        add("--skip_bad_images", action="store_true", help="leave out what cannot be read")
        if batch_size:
            add("--batch_size", type=int, default=batch_size, help=f"images, where all have one size [{batch_size}]")
        add("--num_workers", type=int, default=-1,
            help="that decode images; -1: one a core, on a CPU one in four cores")
    add("--eval_size", type=int, default=0,
        help="pixels of the view; default: what the lines above say, else the checkpoint's, or 224")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    add("--precision", default="fp32", choices=("auto", "fp32", "bf16"))
    add("--results", default="results.jsonl", metavar="FILE", help="gets one JSON line [results.jsonl]")
    return parser


def run(parser: CommandLine, evaluate: Callable[[argparse.Namespace, World], None], argv: list[str] | None) -> None:
    """Read the flags, join the processes, evaluate; bad input is one line and exit status 2."""
    flags = parser.parse_args(argv)
    with errors_in_one_line(), hardware.start(flags.device, flags.precision, patience=24 * 60) as world:
        for flag, value in vars(flags).items():
            for number in value if isinstance(value, list) else [value]:
                require(flags, **{flag: not isinstance(number, float) or math.isfinite(number)})
        least = {"batch_size": 1, "eval_size": 0, "num_workers": -1}
        require(flags, **{flag: getattr(flags, flag) >= low for flag, low in least.items() if hasattr(flags, flag)})
        evaluate(flags, world)


def require(flags: argparse.Namespace, **holds: bool) -> None:
    """Raise InputError for the first flag that does not hold."""
    for flag, good in holds.items():
        if not good:
            raise InputError(f"--{flag} {getattr(flags, flag)} is out of range: --help says what it takes")


def load_backbone(flags: argparse.Namespace, world: World) -> tuple[nn.Module, dict]:
    """The backbone that the flags name, frozen, on the device; and the flags it was made with, its arch among them."""
    with world.main_first(bool(flags.pretrained)):
        path = checkpoint.weights_path(flags)
    backbone, args = checkpoint.load_backbone(path, flags.checkpoint_key, flags.arch)
    return backbone.to(world.device), args


def untrained(args: dict, world: World, seed: int = 0) -> nn.Module:
    """The network of these flags (load_backbone's) before its training, frozen, on the device."""
    torch.manual_seed(seed)
    network = build_backbone(args["arch"], args["patch_size"], args["img_size"], args.get("num_heads", 0),
                             init_std=args.get("init_std", 0.02))
    return network.eval().requires_grad_(False).to(world.device)


def load_images(flags: argparse.Namespace, world: World) -> tuple[Images, Images | None]:
    """The training images and, where the source has them, the others."""
    with world.main_first(flags.download):
        train, val = open_images(flags.data_path, flags.dataset, flags.download)
    return readable(flags, train), val and readable(flags, val)


def readable(flags: argparse.Namespace, images: Images) -> Images:
    """All of them, or with --skip_bad_images those that can be read; raises InputError if none can."""
    images = without_unreadable(images)[0] if flags.skip_bad_images else images
    if not len(images):
        raise InputError("--skip_bad_images leaves no image of a part: give at least one that can be read")
    return images


def load_labelled(flags: argparse.Namespace, world: World) -> tuple[Images, Images, str]:
    """Labelled images to learn from, those that are asked, and which these are; raises InputError without labels."""
    train, val = load_images(flags, world)
    split = knn_split(train, val)
    if split is None:
        raise InputError(f"--data_path {flags.data_path!r} has no labels to learn from, or fewer than 5 images: put "
                         "images into class folders")
    return *split, "every fifth image" if val is None else "the evaluation part"


def balanced_share(labels: Tensor, fraction: float, seed: int) -> Tensor:
    """The indices of `fraction` of each class, at least one image: labels (n,) -> rising indices (Table 12's 1 %).

    A smaller share is part of a larger one.
    """
    generator, chosen = torch.Generator().manual_seed(seed), []
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        chosen.append(members[order[:max(1, round(fraction * len(members)))]])
    return torch.cat(chosen).sort().values


class LabelledCrops(CropsDataset):
    """The random view and the label of image `index` in epoch `epoch`: dataset[epoch, index]."""

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return super().__getitem__(key), self.images.labels[key[1]]


def epoch_batches(images: Images, flags: argparse.Namespace, world: World) -> EpochBatches:
    """The order in which this process learns from the images; where they are few, all are one step."""
    if len(images) < 2 * world.size:
        raise InputError(f"{len(images)} images are too few to learn from for {world.size} processes: take a "
                         "larger --fraction, or add images")
    batch_size = min(flags.batch_size, len(images) // world.size)
    return EpochBatches(len(images), batch_size, 1, world.rank, world.size, flags.seed)


def training_loader(images: Images, view: Callable[[Tensor], Tensor], batches: EpochBatches,
                    flags: argparse.Namespace, world: World) -> DataLoader:
    """Batches of random views (B, 3, S, S) and labels (B,) in this order."""
    return make_loader(LabelledCrops(images, view, flags.seed), batches, flags.num_workers, world)


def view_size(flags: argparse.Namespace, args: dict) -> int:
    """Pixels of the view: --eval_size, else the checkpoint's, else 224; raises InputError if patches do not fit."""
    size = flags.eval_size or args.get("eval_size", 224)
    if size % args["patch_size"]:
        raise InputError(f"--eval_size {size} must be a multiple of the patch size {args['patch_size']}")
    return size


def evaluation_view(flags: argparse.Namespace, args: dict,
                    kind: Callable[..., EvaluationView] = EvaluationView) -> EvaluationView:
    """The centre crop that the checkpoint was evaluated with while it trained, or the paper's; or another kind."""
    given = {name: args[key] for name, key in (("crop", "eval_crop"), ("mean", "mean"), ("std", "std")) if key in args}
    return kind(size=view_size(flags, args), **given)


def loading(flags: argparse.Namespace, world: World) -> dict:
    """The flags' part in extract_features: batch size, workers, a bar."""
    return {"batch_size": flags.batch_size, "progress": "features",
            "num_workers": hardware.share_cores(flags.num_workers, world.device)}


def fingerprint(backbone: nn.Module) -> int:
    """A checksum of the weights: the same path may hold others tomorrow."""
    return zlib.crc32(b"".join(value.cpu().numpy().tobytes() for value in backbone.state_dict().values()))


def fingerprint_of_images(images: Images) -> int:
    """A checksum of the labels and of ten images, evenly spaced: the same, wherever the files lie."""
    some = torch.linspace(0, len(images) - 1, 10).long().tolist()
    values = [images.labels, *(images[index][0] for index in some)]
    return zlib.crc32(b"".join(value.numpy().tobytes() for value in values))


def source(flags: argparse.Namespace) -> str:
    """Which data it was, in a word for a table."""
    return " ".join(filter(None, [flags.dataset, flags.data_path])) or "the embedded creatures"


class Progress:
    """How far an evaluation that trains is: its modules and optimisers by name, kept in a file after each epoch.

    recipe: plain values, all that must agree for a stopped training to go on as if it had not been stopped; once it is
    loaded, the file's, which may hold more.
    """

    def __init__(self, path: Path, recipe: dict, **parts):
        self.path, self.recipe, self.parts, self.epoch = path, recipe, parts, 0

    def save(self, **more) -> None:
        """Write everything, after an epoch, and what other readers of the file want."""
        checkpoint.save_checkpoint(self.path, {"recipe": self.recipe, "epoch": self.epoch, "parts": {
            name: part.state_dict() for name, part in self.parts.items()}, **more})

    def load(self) -> None:
        """Go on where the file is; raises InputError if another recipe made it, or another script."""
        stored = checkpoint.read_checkpoint(self.path)
        kinds = {"recipe": dict, "epoch": int, "parts": dict}
        if any(not isinstance(stored.get(name), kind) for name, kind in kinds.items()) or (
                stored["parts"].keys() != self.parts.keys()):
            raise InputError(f"{str(self.path)!r} was not written by this evaluation: choose another --output_dir")
        for name, new in self.recipe.items():
            if (old := stored["recipe"].get(name)) != new:
                raise InputError(f"{str(self.path)!r} was made with another {name} ({old}, not {new}): choose another "
                                 "--output_dir, or what it was made with")
        for name, part in self.parts.items():
            if isinstance(part, nn.Module):
                checkpoint.load_strictly(part, stored["parts"][name], self.path)
            else:
                part.load_state_dict(stored["parts"][name])
        self.epoch, self.recipe = stored["epoch"], stored["recipe"]


def tell(flags: argparse.Namespace, world: World, table: str, args: dict, data: str, measured: dict[str, float],
         paper: dict[str, float]) -> None:
    """Print measured beside the paper's numbers, which are of other data, and append both to --results as JSON.

    table: the task and its place in the paper; data: what was measured on; measured and paper: by the row's name.
    """
    if not world.is_main:
        return
    paper = {name: value for name, value in paper.items() if name in measured}
    network = f"{args['arch']}, patches of {args['patch_size']}" if args["patch_size"] > 1 else args["arch"]
    width = max(map(len, measured))
    print(f"{table}\n{network}; {data}\n{'':{width}}     here   paper")
    for name, value in measured.items():
        print(f"{name:{width}}  {value:7.2f}  {paper.get(name, '-'):>6}")
    line = {"table": table, "weights": str(flags.pretrained_weights or flags.pretrained), "arch": args["arch"],
            "patch_size": args["patch_size"], "data": data, "paper": paper,
            "measured": {name: round(value, 4) if math.isfinite(value) else None for name, value in measured.items()},
            "flags": {name: value for name, value in vars(flags).items() if name != "results"},
            "time": time.strftime("%Y-%m-%d %H:%M:%S")}
    try:
        Path(flags.results).parent.mkdir(parents=True, exist_ok=True)
        with open(flags.results, "a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
    except OSError as error:
        raise InputError(f"cannot append to --results {flags.results!r} ({brief(error)}): choose another") from None
