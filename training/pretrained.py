"""The authors' weights by name, and the flags that say whose weights a script reads."""

import hashlib
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch

from runtime.commandline import InputError, write_whole

URL = "https://dl.fbaipublicfiles.com/dino/{0}/{0}.pth"
# --pretrained name -> the authors' file, and the start of its MD5 or SHA-256, as far as known.
# The authors publish no hash. The ViTs' 24 bits are those that OpenMetricLearning checks,
# ResNet-50's are of a user's pinned copy. They show a torn or another file. They are no proof of
# who made it: a file that fits 24 bits is easily made, and MD5 is broken.
PRETRAINED = {
    "dino_vits16": ("dino_deitsmall16_pretrain", "md5", "cf0f22"),
    "dino_vits8": ("dino_deitsmall8_pretrain", "md5", "230cd5"),
    # 300 epochs instead of 800: the weights behind the paper's pictures of attention
    "dino_vits8_300ep": ("dino_deitsmall8_300ep_pretrain", "md5", ""),
    "dino_vitb16": ("dino_vitbase16_pretrain", "md5", "552daf"),
    "dino_vitb8": ("dino_vitbase8_pretrain", "md5", "556550"),
    "dino_resnet50": ("dino_resnet50_pretrain", "sha256", "156f8c4166a23dc2951ae811e39d76a0"),
}


def download_pretrained(name: str, flag: str = "--pretrained_weights") -> Path:
    """Return the authors' weights, from PyTorch's cache or the network.

    flag: the one that takes a file instead, for the messages.
    Raises InputError where the file does not begin with the hash that is known of it.
    """
    if name not in PRETRAINED:
        known = ", ".join(PRETRAINED)
        raise InputError(f"--pretrained {name} is unknown: choose one of {known}")
    file, algorithm, start = PRETRAINED[name]
    path = Path(torch.hub.get_dir(), "checkpoints", f"{file}.pth")
    if not path.is_file():
        url = URL.format(file)
        write_whole(path, lambda part: download(url, part, flag))
    digest = hashlib.new(algorithm, path.read_bytes()).hexdigest()
    if not digest.startswith(start):
        raise InputError(
            f"{str(path)!r} has the {algorithm} {digest}, not {start} ...: it is damaged or "
            f"another file; remove it, or pass a copy you trust as {flag}"
        )
    return path


def download(url: str, part: Path, flag: str) -> None:
    """Fetch a file with a progress bar; raises InputError where there is no network."""
    try:
        torch.hub.download_url_to_file(url, str(part))
    except OSError as error:
        raise InputError(
            f"cannot download {url} ({error}): get it where there is a network and pass it as "
            f"{flag}"
        ) from None


def vit_name(arch: str) -> str:
    """Return our name of an arch: the release once called ViTs deit_tiny and deit_small."""
    return arch.replace("deit_", "vit_")


def add_weights_flags(parser: ArgumentParser) -> None:
    """Add the flags that say whose weights a script reads."""
    parser.add_argument(
        "--arch", type=vit_name, default="", help="only where the file does not say"
    )
    parser.add_argument(
        "--patch_size",
        type=int,
        default=0,
        help="pixels; the file says it: another size than the file's is refused",
    )
    parser.add_argument(
        "--pretrained_weights",
        default="",
        metavar="FILE",
        help="a checkpoint of ours, of the release, of timm, Hugging Face and others",
    )
    parser.add_argument(
        "--checkpoint_key",
        default="teacher",
        choices=("teacher", "student"),
        help="whose weights to take",
    )
    parser.add_argument(
        "--pretrained",
        default="",
        metavar="NAME",
        help=f"the authors' weights: {', '.join(PRETRAINED)}",
    )
    parser.add_argument(
        "--num_heads",
        type=int,
        default=0,
        help="of the ViT's attention, where the file does not say; MoCo-v3's ViT-S has 12 [0: the "
        "paper's]",
    )


def weights_path(flags: Namespace) -> str | Path:
    """Return the file of --pretrained_weights or --pretrained; one of the two must be given."""
    if bool(flags.pretrained_weights) == bool(flags.pretrained):
        raise InputError("give the weights: --pretrained_weights FILE, or --pretrained NAME")
    if flags.num_heads < 0:
        raise InputError(f"--num_heads {flags.num_heads} must be at least 0, such as 12")
    if flags.pretrained:
        return download_pretrained(flags.pretrained)
    return find_weights(flags.pretrained_weights, "--pretrained_weights")


def find_weights(name: str | Path, flag: str) -> str | Path:
    """Return a file as it is, and the downloaded file for a name of the authors' weights.

    flag: the one that gave it.
    """
    if name in PRETRAINED and not Path(name).is_file():
        return download_pretrained(name, flag)
    return name
