"""Draw where the [CLS] token looks (Fig. 1, 3 and 8-10): the heads of the last block, on pictures of your own.

    python visualize_attention.py --pretrained_weights runs/mine/checkpoint.pth --image_path cat.jpg --threshold 0.6
    python visualize_attention.py --pretrained dino_vits8 --image_path cat.jpg dog.jpg

Writes one figure (of each picture: it, the mean over heads, each head, and with --threshold the masks that keep that
share of the mass) and the release's single files: img.png, attn-head0.png ..., mask_th0.6_head0.png ....
The positions are interpolated, so a picture of any shape keeps its shape.
"""
import re
from pathlib import Path

import matplotlib
import torch
from torch import Tensor, nn

import checkpoint
import hardware
from attention import cls_attention, keep_mass, to_pixels
from commandline import CommandLine, InputError, brief, errors_in_one_line
from data import decode
from features import fit_to_patches, mean_and_std

matplotlib.use("Agg")  # draws to files, needs no screen
import matplotlib.pyplot as plt


def overlay(picture: Tensor, mask: Tensor) -> Tensor:
    """The picture with the mask's outside darkened: (H, W, 3) in 0 ... 1, bool (H, W) -> (H, W, 3)."""
    return torch.where(mask.unsqueeze(-1), picture, 0.25 * picture)


def panels(picture: Tensor, attention: Tensor, patch_size: int, threshold: float | None) -> dict[str, Tensor]:
    """What is drawn of one picture, by title: (H, W, 3) in 0 ... 1, attention (h, r, c) -> images of H x W pixels."""
    named = {"mean": attention.mean(dim=0), **{f"head{j}": one for j, one in enumerate(attention)}}
    drawn = {"picture": picture} | {name: to_pixels(one, patch_size) for name, one in named.items()}
    if threshold is not None:
        drawn |= {f"{name}, {threshold:.0%}": overlay(picture, to_pixels(keep_mass(one, threshold), patch_size))
                  for name, one in named.items()}
    return drawn


def write_files(folder: Path, drawn: dict[str, Tensor], threshold: float | None) -> None:
    """The release's single files: img.png, attn-head0.png ..., mask_th0.6_head0.png ..."""
    folder.mkdir(parents=True, exist_ok=True)
    plt.imsave(folder / "img.png", drawn["picture"].numpy())
    for name in [name for name in drawn if re.fullmatch(r"head\d+", name)]:
        plt.imsave(folder / f"attn-{name}.png", drawn[name].numpy())
        if threshold is not None:
            plt.imsave(folder / f"mask_th{threshold}_{name}.png", drawn[f"{name}, {threshold:.0%}"].numpy())


def draw_figure(path: Path, pictures: list[dict[str, Tensor]]) -> None:
    """One figure: a row for each picture, and with masks a second one below it."""
    across = len([name for name in pictures[0] if "%" not in name])
    rows = [row for drawn in pictures for row in (list(drawn.items())[:across], list(drawn.items())[across:]) if row]
    figure, grid = plt.subplots(len(rows), across, figsize=(2 * across, 2.2 * len(rows)), layout="constrained",
                                squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for line, row in zip(grid, rows, strict=True):
        for axes, (title, image) in zip(line[across - len(row):], row, strict=True):  # masks stand below their maps
            axes.imshow(image.numpy(), interpolation="nearest")
            axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@torch.no_grad()
def visualize(backbone: nn.Module, args: dict, flags, device: torch.device) -> None:
    """Decode, resize, look, draw and tell where, for all pictures."""
    mean, std = mean_and_std(args)
    images, drawn, output = [decode(path) for path in flags.image_path], [], Path(flags.output_dir)
    for image in images:
        pixels = fit_to_patches(image, flags.image_size, backbone.patch_size).float() / 255
        attention = cls_attention(backbone, ((pixels - mean) / std).unsqueeze(0).to(device))[0].cpu()
        drawn.append(panels(pixels.movedim(0, -1), attention, backbone.patch_size, flags.threshold))
    try:
        for number, (path, one) in enumerate(zip(flags.image_path, drawn, strict=True)):
            write_files(output / f"{number}-{Path(path).stem}" if len(drawn) > 1 else output, one, flags.threshold)
        draw_figure(output / "attention.png", drawn)
    except OSError as error:
        raise InputError(f"cannot write to {str(output)!r} ({brief(error)}): choose another --output_dir") from None
    print(f"wrote {output / 'attention.png'}, and the single pictures beside it")


def main(argv: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("--image_path", nargs="+", required=True, metavar="FILE", help="one picture or several")
    checkpoint.add_weights_flags(parser)
    add("--image_size", type=int, default=480, help="pixels of the short side, in multiples of the patch [480]")
    add("--threshold", type=float, help="also draw masks that keep this share of the mass, 0 ... 1; the paper: 0.6")
    add("--output_dir", default="attention", help="gets the figure and the single files [attention]")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    flags = parser.parse_args(argv)
    with errors_in_one_line():
        if flags.image_size < 1:
            raise InputError(f"--image_size {flags.image_size} must be at least 1")
        if flags.threshold is not None and not 0 < flags.threshold <= 1:
            raise InputError(f"--threshold {flags.threshold} must lie in 0 ... 1, above 0")
        device = hardware.choose_device(flags.device)
        backbone, args = checkpoint.load_backbone(checkpoint.weights_path(flags), flags.checkpoint_key)
        if not hasattr(backbone, "get_last_selfattention"):
            raise InputError(f"{args['arch']} has no attention to draw: take a ViT's weights")
        visualize(backbone.to(device), args, flags, device)


if __name__ == "__main__":
    main()
