"""Draw where the [CLS] token looks, frame by frame, on films of your own.

Not in the paper: the release's video_generation.py draws attention on films.

    python -m evals.attention_film --pretrained dino_vits8 --video clip.mp4
    python -m evals.attention_film --pretrained_weights runs/demo/checkpoint.pth --video frames/

The panels are those of visualize_attention.py. Each becomes a folder of frames: img/00000.png,
attn-mean/00000.png, attn-head0/00000.png .... attention.mp4 shows all side by side, or
attention.gif where ffmpeg is not installed. What an earlier call wrote into --output_dir, as its
hidden file .attention_film lists, is removed; other files stay.

--video: a folder of frames, an animated image, or, where ffmpeg is installed, a film.
"""
import re
import shutil
import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib import animation
from PIL import Image, ImageSequence
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from data import EXTENSIONS, UNREADABLE, decode, find_images, to_rgb
from runtime.commandline import InputError, bar_style, brief, errors_in_one_line
from runtime.memory import enough_memory
from runtime.output_folder import OutputFolder
from runtime.panels import draw_figure, write_panel
from training.evaluation import fit_to_patches, shared_levels
from training.levels import Levels
from visualize_attention import (
    attention_command_line,
    attention_of,
    load_network,
    make_panels,
)


def frame_number(file: Path) -> list[int | str]:
    """Return a key that sorts frame 10 after frame 9."""
    parts = re.split(r"(\d+)", str(file))
    return [int(part) if part.isdecimal() else part for part in parts]


def frame_files(path: Path) -> list[Path]:
    """Return the files of a film: its frames in a folder, or itself."""
    if not path.is_dir():
        return [path]
    files = sorted(find_images(path), key=frame_number)
    if not files:
        raise InputError(f"no images in {str(path)!r}: --video takes a folder of frames")
    return files


def film_frames(path: Path, levels: Levels | None = None) -> Iterator[Tensor]:
    """Yield the frames of a folder, an animated image or a video file: uint8 (3, H, W) each.

    levels: black and white of frames of more than 8 bits.
    """
    if path.is_dir():
        for file in frame_files(path):
            yield decode(file, levels)
    elif not path.is_file():
        raise InputError(f"no film at {str(path)!r}: check the path")
    elif path.suffix.lower() in EXTENSIONS:
        try:
            with Image.open(path) as image:
                for frame in ImageSequence.Iterator(image):
                    yield pil_to_tensor(to_rgb(frame.copy(), levels))
        except UNREADABLE as error:
            raise InputError(
                f"cannot read the film {str(path)!r} ({brief(error)}): fix it, or take another"
            ) from None
    else:
        yield from video_frames(path)


def video_frames(path: Path) -> Iterator[Tensor]:
    """Yield the frames of a video file, decoded by the program ffmpeg: uint8 (3, H, W) each."""
    if not shutil.which("ffmpeg"):
        raise InputError(
            f"{str(path)!r} can only be read by ffmpeg, which is not installed: install it, or "
            "give a folder of frames"
        )
    command = ["ffmpeg", "-nostdin", "-v", "error", "-i", f"file:{path}"]
    command += ["-f", "image2pipe", "-c:v", "ppm", "-pix_fmt", "rgb24", "-"]
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as ffmpeg,
    ):
        # one PPM after the other: a line P6, a line of width and height, a line 255, the pixels
        while ffmpeg.stdout.readline():
            width, height = map(int, ffmpeg.stdout.readline().split())
            ffmpeg.stdout.readline()
            pixels = bytearray(ffmpeg.stdout.read(3 * width * height))
            yield torch.frombuffer(pixels, dtype=torch.uint8).view(height, width, 3).movedim(-1, 0)
        if ffmpeg.wait():
            errors.seek(0)
            reason = brief(errors.read().decode(errors="replace"))
            raise InputError(
                f"ffmpeg cannot read {str(path)!r} ({reason}): fix it, or give a folder of frames"
            )


def animation_writer(fps: int) -> tuple[animation.AbstractMovieWriter, str]:
    """Return what writes an animation, and the suffix of its file: .mp4 with ffmpeg, else .gif."""
    if animation.FFMpegWriter.isAvailable():
        return animation.FFMpegWriter(fps), ".mp4"
    return animation.PillowWriter(fps), ".gif"


def draw_film(flags: Namespace) -> None:
    """Look at each frame, and write its panels and the animation."""
    if not 1 <= flags.fps <= 100:  # a GIF's frames last a hundredth of a second or more
        raise InputError(f"--fps {flags.fps} must be at least 1 and at most 100, such as 10")
    backbone, args = load_network(flags)
    video = Path(flags.video)
    inputs = [video, *find_images(video)]
    # a list of its own: an image's figure in this folder stays
    output = OutputFolder(Path(flags.output_dir), ".attention_film", inputs)
    writer, suffix = animation_writer(flags.fps)
    figure = None
    levels, notes = shared_levels(frame_files(video), flags, args)
    for note in notes:
        print(note)
    frames = tqdm(film_frames(video, levels), "frames", leave=False, **bar_style())
    for number, frame in enumerate(frames):
        image = fit_to_patches(frame, flags.image_size, backbone.patch_size)
        with enough_memory(image):
            attention = attention_of(backbone, image, args)
        panels = make_panels(frame, image, attention, backbone.patch_size, flags.threshold)
        if figure is None:
            output.remove_earlier()
            path = output.file(f"attention{suffix}")
            unfinished = output.file(f".part{suffix}")
            figure, drawn = draw_figure(panels)
            writer.setup(figure, unfinished)
        for panel in panels:
            write_panel(output.file(panel.file_name, f"{number:05}.png"), panel)
        in_figure = [panel for panel in panels if panel.row is not None]
        for panel, artist in zip(in_figure, drawn, strict=True):
            artist.set_data(panel.image.numpy())
            artist.autoscale()  # each frame's map from its own least to its own most
        writer.grab_frame()
    if figure is None:
        raise InputError(f"{flags.video!r} has no frames: give another film")
    writer.finish()
    unfinished.replace(path)
    print(f"wrote {path}, and the frames of its parts in the folders beside it")


def main(argv: list[str] | None = None) -> None:
    parser = attention_command_line(__doc__)
    add = parser.add_argument
    add("--video", "--input_path", required=True, metavar="FRAMES/|FILE",
        help="the film, as described above")
    add("--fps", type=int, default=10, help="the animation's frames a second [10]")
    flags = parser.parse_args(argv)
    with errors_in_one_line():
        try:
            draw_film(flags)
        except (OSError, subprocess.CalledProcessError) as error:
            raise InputError(
                f"cannot write to {flags.output_dir!r} ({brief(error)}): choose another "
                "--output_dir"
            ) from None


if __name__ == "__main__":
    main()
