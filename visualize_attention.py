"""Draw where the [CLS] token looks (Fig. 1, 3 and 10): the heads of the last block, on images or films of your own.

    python visualize_attention.py --pretrained_weights runs/mine/checkpoint.pth --image_path cat.jpg --threshold 0.6
    python visualize_attention.py --pretrained dino_vits8 --image_path cat.jpg dog.jpg --pca
    python visualize_attention.py --pretrained dino_vits8 --video clip.mp4

Of images it writes one figure (of each: it, the mean over heads, each head; with --threshold the masks that keep that
share of the mass; with --pca what the patches' features have in common, as colours) and the release's single files:
img.png, attn-head0.png ..., mask_th0.6_head0.png .... Of a film it writes attn-mean/00000.png ..., attn-head0/00000.png
... and an animation of all side by side, an mp4 where ffmpeg is installed and else a GIF.
The positions are interpolated, so an image of any shape keeps its shape.

Shapes: H x W pixels, r x c patches, h heads, D width.
"""
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from subprocess import CalledProcessError

import matplotlib
import torch
from torch import Tensor, nn
from tqdm import tqdm

from attention import cls_attention, keep_mass, overlay, to_pixels
from data import decode
from evals.film import animation_writer, film_frames
from features import fit_to_patches, mean_and_std
from runtime import hardware
from runtime.commandline import CommandLine, InputError, brief, errors_in_one_line
from training import checkpoint

matplotlib.use("Agg")  # draws to files, needs no screen
import matplotlib.pyplot as plt
from matplotlib.image import AxesImage


def panels(image: Tensor, attention: Tensor, patch_size: int, threshold: float | None) -> dict[str, Tensor]:
    """What is drawn of one image, by title: (H, W, 3) in 0 ... 1, attention (h, r, c) -> images of H x W pixels."""
    named = {"mean": attention.mean(dim=0), **{f"head{j}": one for j, one in enumerate(attention)}}
    drawn = {"image": image} | {name: to_pixels(one, patch_size) for name, one in named.items()}
    if threshold is not None:
        drawn |= {f"{name}, {threshold:.0%}": overlay(image, to_pixels(keep_mass(one, threshold), patch_size))
                  for name, one in named.items()}
    return drawn


def principal_colours(tokens: Sequence[Tensor]) -> list[Tensor]:
    """Where all images' tokens vary most, as red, green and blue: n of (r, c, D) -> n of (r, c, 3) in 0 ... 1.

    z = (token - mean) v_1, v_2, v_3, the leading eigenvectors of the tokens' covariance; two standard deviations of z
    to either side of grey span a colour. An eigenvector has no sign: its largest entry is made positive.
    """
    flat = torch.cat([one.flatten(0, 1) for one in tokens]).double()
    centred = flat - flat.mean(dim=0)
    vectors = torch.linalg.eigh(centred.T @ centred)[1][:, -3:].flip(1)  # eigh sorts upwards
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    z = centred @ vectors
    colours = (0.5 + z / (4 * z.std(dim=0, correction=0)).clamp(min=1e-12)).clamp(0, 1).float()
    parts = colours.split([one[..., 0].numel() for one in tokens])
    return [part.view(*one.shape[:2], 3) for part, one in zip(parts, tokens)]


def lay_out(images: list[dict[str, Tensor]]) -> tuple[plt.Figure, dict[str, AxesImage]]:
    """A row for each image, and with masks a second one below it -> the figure, and the last image's panels."""
    across = len([name for name in images[0] if "%" not in name])
    rows = [row for drawn in images for row in (list(drawn.items())[:across], list(drawn.items())[across:]) if row]
    figure, grid = plt.subplots(len(rows), across, figsize=(2 * across, 2.2 * len(rows) + 0.2), layout="constrained",
                                squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    shown = {}
    for line, row in zip(grid, rows, strict=True):
        for axes, (title, image) in zip(line[across - len(row):], row, strict=True):  # masks stand below their maps
            shown[title] = axes.imshow(image.numpy(), interpolation="nearest")
            axes.set_title(title, fontsize=9)
    return figure, shown


def word(title: str, threshold: float | None) -> str:
    """A panel's title -> the release's word for its file: img, attn-head0, mask_th0.6_head0."""
    what, share, _ = title.partition(", ")
    return f"mask_th{threshold}_{what}" if share else {"image": "img", "pca": "pca"}.get(what, f"attn-{what}")


def write_files(folder: Path, drawn: dict[str, Tensor], threshold: float | None, frame: int | None = None) -> None:
    """Each panel as a file: img.png, attn-head0.png, mask_th0.6_head0.png; of a film img/00000.png ..."""
    for title, image in drawn.items():
        name = word(title, threshold)
        path = folder / (f"{name}.png" if frame is None else f"{name}/{frame:05}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        plt.imsave(path, image.numpy())


@torch.no_grad()
def look(backbone: nn.Module, args: dict, image: Tensor, short_side: int, device: torch.device) -> tuple[Tensor, ...]:
    """uint8 (3, H, W), any size -> the image as it is read (H, W, 3) in 0 ... 1, input (1, 3, H, W), attention."""
    mean, std = mean_and_std(args)
    pixels = fit_to_patches(image, short_side, backbone.patch_size).float() / 255
    inputs = ((pixels - mean) / std).unsqueeze(0).to(device)
    return pixels.movedim(0, -1), inputs, cls_attention(backbone, inputs)[0].cpu()


@torch.no_grad()
def draw_images(backbone: nn.Module, args: dict, flags: Namespace, device: torch.device) -> str:
    """Look at all images and write the figure and the files -> what was written."""
    output, patch, drawn, tokens = Path(flags.output_dir), backbone.patch_size, [], []
    for image in [decode(path) for path in flags.image_path]:
        image, inputs, attention = look(backbone, args, image, flags.image_size, device)
        drawn.append(panels(image, attention, patch, flags.threshold))
        if flags.pca:
            last = backbone.get_intermediate_layers(inputs)[0][0, 1:].cpu()
            tokens.append(last.view(*attention.shape[1:], -1))
    for number, colours in enumerate(principal_colours(tokens) if flags.pca else ()):
        grown = to_pixels(colours.movedim(-1, 0), patch).movedim(0, -1)
        drawn[number] = {"image": drawn[number]["image"], "pca": grown} | drawn[number]
    for number, (path, one) in enumerate(zip(flags.image_path, drawn, strict=True)):
        folder = output / f"{number}-{Path(path).stem}" if len(drawn) > 1 else output
        write_files(folder, one, flags.threshold)
    figure, _ = lay_out(drawn)
    figure.savefig(output / "attention.png", dpi=110)
    plt.close(figure)
    return f"{output / 'attention.png'}, and the single images beside it"


def draw_film(backbone: nn.Module, args: dict, flags: Namespace, device: torch.device) -> str:
    """Look at each frame, and write its files and the animation of all panels side by side -> what was written."""
    output, figure = Path(flags.output_dir), None
    writer, path = animation_writer(output / "attention", flags.fps)
    unfinished = path.with_name(f".part{path.suffix}")
    for number, image in enumerate(tqdm(film_frames(Path(flags.video)), "frames", leave=False)):
        image, _, attention = look(backbone, args, image, flags.image_size, device)
        drawn = panels(image, attention, backbone.patch_size, flags.threshold)
        write_files(output, drawn, flags.threshold, number)
        if figure is None:
            figure, shown = lay_out([drawn])
            writer.setup(figure, unfinished, dpi=110)
        for title, image in drawn.items():
            shown[title].set_data(image.numpy())
            shown[title].autoscale()
        writer.grab_frame()
    if figure is None:
        raise InputError(f"{flags.video!r} has no frames: give another film")
    writer.finish()
    unfinished.replace(path)
    plt.close(figure)
    for title in drawn:  # an earlier film may have been longer
        for frame in (output / word(title, flags.threshold)).glob("[0-9][0-9][0-9][0-9][0-9].png"):
            if int(frame.stem) > number:
                frame.unlink()
    return f"{path}, and the frames of its parts in the folders beside it"


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    add, source = parser.add_argument, parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--image_path", nargs="+", metavar="FILE", help="one image or several")
    source.add_argument("--video", metavar="FRAMES/|FILE", help="a folder of frames, an animated image, or, where "
                        "ffmpeg is installed, a film")
    checkpoint.add_weights_flags(parser)
    add("--image_size", type=int, help="pixels of the short side, in multiples of the patch; default: twice the "
        "checkpoint's --eval_size, or 480")
    add("--threshold", type=float, help="also draw masks that keep this share of the mass, 0 ... 1; the paper: 0.6")
    add("--pca", action="store_true", help="of images: the patch tokens' first three principal components, in which "
        "all the images together vary most, as red, green and blue")
    add("--fps", type=int, default=10, help="the animation's frames a second [10]")
    add("--output_dir", default="attention", help="gets the figure and the single files [attention]")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    flags = parser.parse_args(argv)
    with errors_in_one_line():
        for flag in ("image_size", "fps"):
            if getattr(flags, flag) is not None and getattr(flags, flag) < 1:
                raise InputError(f"--{flag} {getattr(flags, flag)} must be at least 1")
        if flags.threshold is not None and not 0 < flags.threshold <= 1:
            raise InputError(f"--threshold {flags.threshold} must lie in 0 ... 1, above 0")
        if flags.pca and flags.video:
            raise InputError("--pca compares images: give some of the film's frames to --image_path")
        device = hardware.choose_device(flags.device)
        backbone, args = checkpoint.load_backbone(checkpoint.weights_path(flags), flags.checkpoint_key)
        if not hasattr(backbone, "get_last_selfattention"):
            raise InputError(f"{args['arch']} has no attention to draw: take a ViT's weights")
        flags.image_size = flags.image_size or 2 * args.get("eval_size", 240)
        draw = draw_film if flags.video else draw_images
        try:
            print("wrote", draw(backbone.to(device), args, flags, device))
        except (OSError, CalledProcessError) as error:
            raise InputError(f"cannot write to {flags.output_dir!r} ({brief(error)}): choose another --output_dir"
                             ) from None


if __name__ == "__main__":
    main()
