"""Draw where [CLS] and chosen patches look (Fig. 1, 3, 8 and 10), on images of your own.

    python visualize_attention.py --pretrained_weights runs/mine/checkpoint.pth --image_path cat.jpg
    python visualize_attention.py --pretrained dino_vits16 --image_path cat.jpg --threshold 0.6
    python visualize_attention.py --pretrained dino_vits8 --image_path cat.jpg dog.jpg --pca
    python visualize_attention.py --pretrained dino_vits8 --image_path photos/ --threshold 0.6
    python visualize_attention.py --pretrained dino_vits8 --image_path a.jpg b.jpg --query 0.4 0.6

The figure attention.png shows the image, the mean over the last block's heads, and each head.
--threshold adds masks that keep that fraction of the attention, and the panel "heads": each head's
mask in a colour of its own (Fig. 3). --pca shows as colours what the patches' features have in
common. --query writes a second figure, query.png: where a patch of the first image looks (Fig. 8),
and how similar all images' patches are to it (cosine of the last block's features).

Every panel is also a file, named as in the release: img.png, attn-head0.png ...,
mask_th0.6_head0.png .... The masks themselves, 0 or 255 and of the image's own size, are
binary_th0.6_head0.png .... Those of --query are query0_attn-head0.png ... and query0_cosine.png.
Of several images each has a folder of its own, and the first 20 share one more attention.png.
Files that cannot be read are skipped and counted. What an earlier call wrote into --output_dir,
as its hidden file .attention lists, is removed; other files stay.
For films see python -m evals.attention_film.

Shapes: H x W pixels, r x c patches, h heads, D numbers a token, Q queries.
"""
import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from attention import cls_attention, keep_mass, overlay, to_pixels, token_attention
from data import decode, find_images
from features import mean_and_std, normalise
from runtime import hardware
from runtime.commandline import CommandLine, InputError, bar_style, brief, errors_in_one_line
from runtime.memory import enough_memory
from runtime.output_folder import OutputFolder
from runtime.panels import (
    Panel,
    as_pixels,
    binary_mask,
    figure_pixels,
    grow_colours,
    head_colours,
    named_maps,
    tint,
    write_panels,
)
from runtime.principal import PrincipalColours
from runtime.query import (
    attention_panels,
    check_query,
    cosine_panels,
    cosines,
    query_patches,
)
from training.checkpoint import load_backbone
from training.evaluation import fit_to_patches, shared_levels
from training.pretrained import add_weights_flags, weights_path

MOST_IN_A_FIGURE = 20  # images: more make a figure that no program shows


def attention_command_line(description: str | None) -> CommandLine:
    """Return a parser with the flags that images and films share."""
    parser = CommandLine(description)
    add = parser.add_argument
    add_weights_flags(parser)
    add("--image_size", type=int, nargs="+",
        help="pixels of the short side; default: twice the checkpoint's --eval_size, or 480")
    add("--threshold", type=float,
        help="also draw masks that keep this fraction of the attention, 0 ... 1; the paper: 0.6")
    add("--levels", type=float, nargs=2, default=(0, 0), metavar=("BLACK", "WHITE"),
        help="of images of more than 8 bits [the checkpoint's, else found in these images]")
    add("--output_dir", default="attention", help="gets the figure and the files [attention]")
    add("--device", default="auto", choices=("auto", "cuda", "mps", "cpu"))
    return parser


def load_network(flags: Namespace) -> tuple[nn.Module, dict]:
    """Return the ViT that the flags name, on its device, and the flags of its run.

    Check the flags, and fill in --image_size where it is not given.
    """
    if flags.image_size is not None:
        flags.image_size, *more = flags.image_size
        if more:  # release: height and width
            raise InputError(
                "--image_size takes one number, the short side: the image keeps its shape"
            )
    if flags.image_size is not None and flags.image_size < 1:
        raise InputError(f"--image_size {flags.image_size} must be at least 1, such as 480")
    if flags.threshold is not None and not 0 < flags.threshold <= 1:
        raise InputError(f"--threshold {flags.threshold} must be above 0 and at most 1: try 0.6")
    device = hardware.choose_device(flags.device)
    path = weights_path(flags)
    backbone, args = load_backbone(
        path, flags.checkpoint_key, flags.arch, flags.patch_size, flags.num_heads
    )
    if not hasattr(backbone, "get_last_selfattention"):
        raise InputError(f"{args['arch']} has no attention to draw: take a ViT's weights")
    if flags.image_size is None:
        # twice the pixels of training make twice as fine a map
        flags.image_size = 2 * args.get("eval_size", 240)
    return backbone.to(device), args


def network_input(image: Tensor, args: dict, backbone: nn.Module) -> Tensor:
    """Return an image as the network reads it: uint8 (3, H, W) -> (1, 3, H, W), on its device."""
    mean, std = mean_and_std(args)  # of the training, else the network sees other colours
    device = next(backbone.parameters()).device
    return normalise(image, mean, std).unsqueeze(0).to(device)


def attention_of(backbone: nn.Module, image: Tensor, args: dict) -> Tensor:
    """Return where [CLS] looks in the last block: uint8 (3, H, W) -> (h, r, c).

    H and W are multiples of the patch. The positions are interpolated to the image's shape.
    """
    return cls_attention(backbone, network_input(image, args, backbone))[0].cpu()


def paint_heads(pixels: Tensor, attention: Tensor, kept: Tensor, patch_size: int) -> Tensor:
    """Lay each head's kept patches over the image in the head's colour (Fig. 3).

    (H, W, 3), (h, r, c), bool (h, r, c) -> (H, W, 3). A patch that several heads keep takes the
    colour of the head that gives it the largest part of its attention.
    """
    parts = attention / attention.sum(dim=(-2, -1), keepdim=True)
    strongest = (parts * kept).argmax(dim=0)
    colours = head_colours(len(attention))[strongest]  # (r, c, 3)
    painted = tint(pixels, grow_colours(colours, patch_size))
    anyones = to_pixels(kept.any(dim=0), patch_size)
    return torch.where(anyones.unsqueeze(-1), painted, overlay(pixels, anyones))


def make_panels(
    original: Tensor, image: Tensor, attention: Tensor, patch_size: int, mass: float | None
) -> list[Panel]:
    """Return the panels of one image: it, the heads' mean, each head, and their masks.

    original: uint8 (3, height, width), and image: (3, H, W), as the network reads it.
    attention: (h, r, c). mass: what a mask keeps; None draws no masks.
    """
    pixels = as_pixels(image)
    maps = named_maps(attention)
    panels = [Panel("image", "img", pixels)]
    for name, patches in maps.items():
        panels.append(Panel(name, f"attn-{name}", to_pixels(patches, patch_size)))
    if mass is None:
        return panels

    coloured = paint_heads(pixels, attention, keep_mass(attention, mass), patch_size)
    panels.append(Panel("heads", f"mask_th{mass}_heads", coloured, row=1))
    colours = [(0, 0, 0), *head_colours(len(attention)).tolist()]  # the mean's title is black
    for (name, patches), colour in zip(maps.items(), colours, strict=True):
        kept = keep_mass(patches, mass)
        title = f"{name}, {mass:.0%}"
        dark = overlay(pixels, to_pixels(kept, patch_size))
        panels.append(Panel(title, f"mask_th{mass}_{name}", dark, 1, colour))
        binary = binary_mask(kept, *original.shape[-2:])
        panels.append(Panel("", f"binary_th{mass}_{name}", binary, row=None))
    return panels


@torch.no_grad()
def patch_tokens_of(backbone: nn.Module, image: Tensor, args: dict) -> Tensor:
    """Return the last block's patch tokens: uint8 (3, H, W) -> (r, c, D)."""
    layers = backbone.get_intermediate_layers(network_input(image, args, backbone), 1)
    patches = layers[0][0, 1:].cpu()  # without [CLS]
    return patches.view(image.shape[1] // backbone.patch_size, -1, patches.shape[-1])


def common_colours(
    files: list[Path], backbone: nn.Module, args: dict, image_size: int
) -> PrincipalColours:
    """Return the colours that all images share; those that cannot be read do not count."""
    colours = PrincipalColours()
    for file in tqdm(files, "colours", leave=False, **bar_style()):
        with suppress(InputError):  # reported where the image is drawn
            image = fit_to_patches(decode(file, args["levels"]), image_size, backbone.patch_size)
            with enough_memory(image):
                colours.add(patch_tokens_of(backbone, image, args))
    return colours


def look_at(
    file: Path,
    backbone: nn.Module,
    args: dict,
    colours: PrincipalColours | None,
    flags: Namespace,
) -> tuple[list[Panel], np.ndarray]:
    """Read an image, and return its panels and its figure's pixels."""
    patch_size = backbone.patch_size
    original = decode(file, args["levels"])
    # an image of any shape keeps its shape, in whole patches
    image = fit_to_patches(original, flags.image_size, patch_size)
    with enough_memory(image):
        attention = attention_of(backbone, image, args)
        panels = make_panels(original, image, attention, patch_size, flags.threshold)
        if colours:
            of_patches = colours.of(patch_tokens_of(backbone, image, args))
            panels.insert(1, Panel("pca", "pca", grow_colours(of_patches, patch_size)))
        return panels, figure_pixels(panels)


def query_attention_of(
    backbone: nn.Module, image: Tensor, args: dict, patches: list[tuple[int, int]]
) -> Tensor:
    """Return where Q patches look in the last block (Fig. 8): uint8 (3, H, W) -> (h, Q, r, c).

    patches: the row and the column of each.
    """
    columns = image.shape[-1] // backbone.patch_size
    tokens = [1 + row * columns + column for row, column in patches]  # token 0 is [CLS]
    return token_attention(backbone, network_input(image, args, backbone), tokens)[0].cpu()


def draw_queries(
    images: list[tuple[Path, str]],
    backbone: nn.Module,
    args: dict,
    flags: Namespace,
    output: OutputFolder,
) -> np.ndarray:
    """Write the panels of --query into the images' folders; return the figure's pixels (Fig. 8).

    images: each one's file and folder. The queries are patches of the first.
    """
    patch_size = backbone.patch_size
    in_figure = []
    for number, (file, place) in enumerate(images):
        image = fit_to_patches(decode(file, args["levels"]), flags.image_size, patch_size)
        pixels = as_pixels(image)
        panels = []
        patches = []  # of the queries, in this image
        with enough_memory(image):
            tokens = patch_tokens_of(backbone, image, args)
            if number == 0:
                patches = query_patches(flags.query, *tokens.shape[:2])
                attention = query_attention_of(backbone, image, args, patches)
                panels = attention_panels(pixels, attention, patches, patch_size)
                features = torch.stack([tokens[patch] for patch in patches])  # (Q, D)
                # one scale for all images: their colours compare
                least = cosines(features, tokens).amin(dim=(1, 2))
            maps = cosines(features, tokens)
            panels += cosine_panels(pixels, maps, least, patches, patch_size)
        write_panels(output, place, panels)
        if number < MOST_IN_A_FIGURE:
            in_figure += [panel for panel in panels if panel.row is not None]
    return figure_pixels(in_figure)


def image_files(paths: Sequence[str]) -> list[Path]:
    """Return the files named, and in the place of a folder the images in it and below it."""
    files = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        found = find_images(path)
        if not found:
            raise InputError(f"no images in --image_path {str(path)!r}: give another folder")
        files += found
    return files


def draw_attention(flags: Namespace) -> None:
    """Read one image after the other, look at it, and write its figure and files."""
    check_query(flags.query)
    backbone, args = load_network(flags)
    files = image_files(flags.image_path)
    output = OutputFolder(Path(flags.output_dir), ".attention", files)
    args["levels"], notes = shared_levels(files, flags, args)
    for note in notes:
        print(note)
    colours = None
    if flags.pca:
        colours = common_colours(files, backbone, args, flags.image_size)

    strips = []  # the first images' figures, one below the other
    drawn = []  # the images' files and folders
    for number, file in enumerate(tqdm(files, "images", leave=False, **bar_style())):
        place = ""
        if len(files) > 1:  # several images have files of the same names
            place = f"{number}-{file.stem}"
        try:
            panels, figure = look_at(file, backbone, args, colours, flags)
        except InputError as error:
            if len(files) == 1:
                raise
            if flags.query and number == 0:
                raise InputError(f"--query is a point of the first image: {error}") from None
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            continue
        if not drawn:
            output.remove_earlier()
        write_panels(output, place, panels)
        Image.fromarray(figure).save(output.file(place, "attention.png"))
        drawn.append((file, place))
        if len(strips) < MOST_IN_A_FIGURE:
            strips.append(figure)

    if not drawn:
        raise InputError(f"none of the {len(files)} files could be drawn: give other images")
    path = output.file("attention.png")
    Image.fromarray(np.concatenate(strips)).save(path)
    if flags.query:
        query_path = output.file("query.png")
        Image.fromarray(draw_queries(drawn, backbone, args, flags, output)).save(query_path)
        print(f"wrote {query_path}, and its single images beside it")
    text = f"wrote {path}, and the single images beside it"
    if len(files) > 1:
        text += f": {len(drawn)} of {len(files)} drawn, {len(files) - len(drawn)} skipped"
    print(text)


def main(argv: list[str] | None = None) -> None:
    parser = attention_command_line(__doc__)
    add = parser.add_argument
    add("--image_path", nargs="+", required=True, metavar="FILE|FOLDER",
        help="images, or folders of images")
    add("--pca", action="store_true",
        help="the patch tokens' first three principal components over all images, as colours")
    add("--query", type=float, nargs="+", default=[], metavar="X Y",
        help="points of the first image, fractions of its width and height, 0 ... 1: where the "
        "patch at each looks, and which patches of all images are like it")
    flags = parser.parse_args(argv)
    with errors_in_one_line():
        try:
            draw_attention(flags)
        except OSError as error:
            raise InputError(
                f"cannot write to {flags.output_dir!r} ({brief(error)}): choose another "
                "--output_dir"
            ) from None


if __name__ == "__main__":
    main()
