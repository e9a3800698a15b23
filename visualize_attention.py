"""Draw where the [CLS] token looks (Fig. 1, 3 and 10), on images of your own.

    python visualize_attention.py --pretrained_weights runs/mine/checkpoint.pth --image_path cat.jpg
    python visualize_attention.py --pretrained dino_vits16 --image_path cat.jpg --threshold 0.6
    python visualize_attention.py --pretrained dino_vits8 --image_path cat.jpg dog.jpg --pca

One figure, attention.png, shows each image, the mean over the last block's heads, and each head.
--threshold adds masks that keep that fraction of the attention. --pca shows as colours what the
patches' features have in common. Every panel is also a file, named as in the release: img.png,
attn-head0.png ..., mask_th0.6_head0.png .... For films see python -m evals.attention_film.

Shapes: H x W pixels, r x c patches, h heads, D numbers a token.
"""
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure  # not pyplot, which would change the plots of a notebook
from matplotlib.image import AxesImage, imsave
from torch import Tensor, nn

from attention import cls_attention, keep_mass, overlay, to_pixels
from data import decode
from features import mean_and_std, normalise
from runtime import hardware
from runtime.commandline import CommandLine, InputError, brief, errors_in_one_line
from training.checkpoint import load_backbone
from training.evaluation import fit_to_patches
from training.pretrained import add_weights_flags, weights_path


class Panel(NamedTuple):
    """One drawing of an image.

    kind: image, pca, attn or mask. head: mean, head0 ..., of attn and mask. image: (H, W, 3) in
    0 ... 1, or an attention map (H, W). mass: the fraction of the attention that a mask keeps.
    """

    kind: str
    head: str
    image: Tensor
    mass: float = 0.0

    @property
    def title(self) -> str:
        """What stands above it in the figure."""
        if self.kind == "mask":
            return f"{self.head}, {self.mass:.0%}"
        return self.head or self.kind

    @property
    def file_name(self) -> str:
        """The release's name of its file."""
        if self.kind == "image":
            return "img"
        if self.kind == "mask":
            return f"mask_th{self.mass}_{self.head}"
        if self.kind == "attn":
            return f"attn-{self.head}"
        return self.kind


def attention_command_line(description: str | None) -> CommandLine:
    """Return a parser with the flags that images and films share."""
    parser = CommandLine(description)
    add = parser.add_argument
    add_weights_flags(parser)
    add("--image_size", type=int, nargs="+",
        help="pixels of the short side; default: twice the checkpoint's --eval_size, or 480")
    add("--threshold", type=float,
        help="also draw masks that keep this fraction of the attention, 0 ... 1; the paper: 0.6")
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


@torch.no_grad()
def patch_tokens_of(backbone: nn.Module, image: Tensor, args: dict) -> Tensor:
    """Return the last block's patch tokens: uint8 (3, H, W) -> (r, c, D)."""
    layers = backbone.get_intermediate_layers(network_input(image, args, backbone), 1)
    patches = layers[0][0, 1:].cpu()  # without [CLS]
    return patches.view(image.shape[1] // backbone.patch_size, -1, patches.shape[-1])


def principal_colours(tokens: Sequence[Tensor]) -> list[Tensor]:
    """Return where all images' tokens vary most, as colours: (r, c, D) -> (r, c, 3) in 0 ... 1.

    z = (token - mean) v_1, v_2, v_3, by the leading eigenvectors of the covariance, are red,
    green and blue. Two standard deviations of z to either side of grey span a colour.
    """
    # all images together: alike patches then have one colour in all of them
    flat = torch.cat([image_tokens.flatten(0, 1) for image_tokens in tokens]).double()
    centred = flat - flat.mean(dim=0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    vectors = vectors[:, -3:].flip(1)  # eigh sorts the eigenvalues upwards
    # an eigenvector has no sign of its own: make its largest entry positive
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    vectors = vectors * vectors.gather(0, largest).sign()
    z = centred @ vectors
    span = 4 * z.std(dim=0, correction=0)
    colours = (0.5 + z / span.clamp(min=1e-12)).clamp(0, 1).float()  # tokens all alike are grey
    sizes = [image_tokens.shape[0] * image_tokens.shape[1] for image_tokens in tokens]
    parts = colours.split(sizes)
    return [part.view(*one.shape[:2], 3) for part, one in zip(parts, tokens, strict=True)]


def make_panels(
    image: Tensor, attention: Tensor, patch_size: int, mass: float | None
) -> list[Panel]:
    """Return the panels of one image: it, the heads' mean, each head, and their masks.

    image: uint8 (3, H, W). attention: (h, r, c). mass: what a mask keeps; None draws no masks.
    """
    pixels = image.movedim(0, -1).float() / 255
    maps = {"mean": attention.mean(dim=0)}
    for number, head in enumerate(attention):
        maps[f"head{number}"] = head
    panels = [Panel("image", "", pixels)]
    for name, patches in maps.items():
        panels.append(Panel("attn", name, to_pixels(patches, patch_size)))
    if mass is not None:
        for name, patches in maps.items():
            mask = to_pixels(keep_mass(patches, mass), patch_size)
            panels.append(Panel("mask", name, overlay(pixels, mask), mass))
    return panels


def draw_figure(images: Sequence[list[Panel]]) -> tuple[Figure, list[AxesImage]]:
    """Draw a row for each image, and a second one for its masks.

    Return the figure, and what is drawn in it, panel by panel.
    """
    rows = []
    for panels in images:
        rows.append([panel for panel in panels if panel.kind != "mask"])
        masks = [panel for panel in panels if panel.kind == "mask"]
        if masks:
            rows.append(masks)
    columns = max(len(row) for row in rows)
    size = (2 * columns, 2.2 * len(rows) + 0.2)
    figure = Figure(size, dpi=110, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    drawn = []
    for line, row in zip(grid, rows, strict=True):
        for axes in line:
            axes.axis("off")
        below_the_maps = line[columns - len(row):]  # there is no mask of the image itself
        for axes, panel in zip(below_the_maps, row, strict=True):
            axes.set_title(panel.title, fontsize=9)
            # nearest: a patch is a square, not a blur that the network never computed
            drawn.append(axes.imshow(panel.image.numpy(), interpolation="nearest"))
    return figure, drawn


def write_panels(folder: Path, panels: list[Panel]) -> None:
    """Write each panel as a file: img.png, attn-head0.png, mask_th0.6_head0.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for panel in panels:
        imsave(folder / f"{panel.file_name}.png", panel.image.numpy())


def draw_attention(flags: Namespace) -> None:
    """Read the images, look at them, and write the figure and the files."""
    backbone, args = load_network(flags)
    patch_size = backbone.patch_size

    # an image of any shape keeps its shape, in whole patches
    images = []
    for path in flags.image_path:
        images.append(fit_to_patches(decode(path), flags.image_size, patch_size))

    drawings = []
    for image in images:
        attention = attention_of(backbone, image, args)
        drawings.append(make_panels(image, attention, patch_size, flags.threshold))
    if flags.pca:
        tokens = [patch_tokens_of(backbone, image, args) for image in images]
        for panels, colours in zip(drawings, principal_colours(tokens), strict=True):
            grown = to_pixels(colours.movedim(-1, 0), patch_size).movedim(0, -1)
            panels.insert(1, Panel("pca", "", grown))  # beside the image

    output = Path(flags.output_dir)
    for number, (path, panels) in enumerate(zip(flags.image_path, drawings, strict=True)):
        folder = output
        if len(images) > 1:  # several images have files of the same names
            folder = output / f"{number}-{Path(path).stem}"
        write_panels(folder, panels)
    figure, _ = draw_figure(drawings)
    figure.savefig(output / "attention.png")
    print(f"wrote {output / 'attention.png'}, and the single images beside it")


def main(argv: list[str] | None = None) -> None:
    parser = attention_command_line(__doc__)
    add = parser.add_argument
    add("--image_path", nargs="+", required=True, metavar="FILE", help="one image or several")
    add("--pca", action="store_true",
        help="the patch tokens' first three principal components over all images, as colours")
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
