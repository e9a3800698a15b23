"""Films: frames in, from a folder, an animated image or a video file; an animation out.

Not in the paper: the release's video_generation.py draws attention on films, as visualize_attention.py does here.
"""
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib import animation
from PIL import Image, ImageSequence
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from data import EXTENSIONS, UNREADABLE, decode, find_images, to_rgb
from runtime.commandline import InputError, brief


def film_frames(path: Path) -> Iterator[Tensor]:
    """A folder of frames (in the order of their numbers), an animated image, or a video file -> uint8 (3, H, W) each.

    Raises InputError for what is not there or cannot be read.
    """
    if path.is_dir():
        numbered = lambda file: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(file))]
        files = sorted(find_images(path), key=numbered)  # frame 10 after frame 9
        if not files:
            raise InputError(f"no images in {str(path)!r}: --video takes a folder of frames")
        yield from map(decode, files)
    elif not path.is_file():
        raise InputError(f"no film at {str(path)!r}: check the path")
    elif path.suffix.lower() in EXTENSIONS:
        try:
            with Image.open(path) as image:
                for frame in ImageSequence.Iterator(image):
                    yield pil_to_tensor(to_rgb(frame.copy()))
        except UNREADABLE as error:
            raise InputError(f"cannot read the film {str(path)!r} ({brief(error)}): mend it") from None
    else:
        yield from video_frames(path)


def video_frames(path: Path) -> Iterator[Tensor]:
    """A video file, through the program ffmpeg (torchvision reads none any more) -> uint8 (3, H, W) each."""
    if not shutil.which("ffmpeg"):
        raise InputError(f"{str(path)!r} can only be read by ffmpeg, which is not installed: install it, or give a "
                         "folder of frames")
    with tempfile.TemporaryFile() as said, subprocess.Popen(
            ["ffmpeg", "-nostdin", "-v", "error", "-i", f"file:{path}", "-f", "image2pipe", "-c:v", "ppm", "-pix_fmt",
             "rgb24", "-"],
            stdout=subprocess.PIPE, stderr=said) as ffmpeg:
        while ffmpeg.stdout.readline():  # P6, width and height, 255, and the pixels, of one frame after the other
            width, height = map(int, ffmpeg.stdout.readline().split())
            ffmpeg.stdout.readline()
            pixels = bytearray(ffmpeg.stdout.read(3 * width * height))
            yield torch.frombuffer(pixels, dtype=torch.uint8).view(height, width, 3).movedim(-1, 0)
        if ffmpeg.wait():
            said.seek(0)
            reason = brief(ValueError(said.read().decode(errors="replace")))
            raise InputError(f"ffmpeg cannot read {str(path)!r} ({reason}): mend it, or give a folder of frames")


def animation_writer(path: Path, fps: int) -> tuple[animation.AbstractMovieWriter, Path]:
    """What writes an animation, and where: path.mp4 where ffmpeg is installed, else path.gif."""
    if animation.FFMpegWriter.isAvailable():
        return animation.FFMpegWriter(fps), path.with_suffix(".mp4")
    return animation.PillowWriter(fps), path.with_suffix(".gif")
