"""Draw where the [CLS] token looks (Fig. 1, 3 and 10), on images of your own.

    python visualize_attention.py --pretrained_weights runs/mine/checkpoint.pth --image_path cat.jpg
    python visualize_attention.py --pretrained dino_vits16 --image_path cat.jpg --threshold 0.6
    python visualize_attention.py --pretrained dino_vits8 --image_path cat.jpg dog.jpg --pca
    python visualize_attention.py --pretrained dino_vits8 --image_path photos/ --threshold 0.6

The figure attention.png shows the image, the mean over the last block's heads, and each head.
--threshold adds masks that keep that fraction of the attention. --pca shows as colours what the
patches' features have in common. Every panel is also a file, named as in the release: img.png,
attn-head0.png ..., mask_th0.6_head0.png .... The masks themselves, 0 or 255 and of the image's own
size, are binary_th0.6_head0.png .... Of several images each has a folder of its own, and the first
20 share one more attention.png. Files that cannot be read are skipped and counted.
For films see python -m evals.attention_film.

Shapes: H x W pixels, r x c patches, h heads, D numbers a token.
"""
import gc
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure  # not pyplot, which would change the plots of a notebook
from matplotlib.image import AxesImage, imsave
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from attention import cls_attention, keep_mass, overlay, to_pixels
from data import decode, find_images
from features import mean_and_std, normalise
from runtime import hardware
from runtime.commandline import CommandLine, InputError, bar_style, brief, errors_in_one_line
from training.checkpoint import load_backbone
from training.evaluation import fit_to_patches, shared_levels
from training.pretrained import add_weights_flags, weights_path

MOST_IN_A_FIGURE = 20  # images: more make a figure that no program shows


class Panel(NamedTuple):
    """One drawing of an image.

    kind: image, pca, attn, mask, or binary, which is a file alone. head: mean, head0 ..., of attn,
    mask and binary. image: (H, W, 3) in 0 ... 1, an attention map (H, W), or, of binary, uint8
    0 or 255 of the image's own size. mass: the fraction of the attention that a mask keeps.
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
        if self.kind in ("mask", "binary"):
            return f"{self.kind}_th{self.mass}_{self.head}"
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


@torch.no_grad()
def patch_tokens_of(backbone: nn.Module, image: Tensor, args: dict) -> Tensor:
    """Return the last block's patch tokens: uint8 (3, H, W) -> (r, c, D)."""
    layers = backbone.get_intermediate_layers(network_input(image, args, backbone), 1)
    patches = layers[0][0, 1:].cpu()  # without [CLS]
    return patches.view(image.shape[1] // backbone.patch_size, -1, patches.shape[-1])


class PrincipalColours:
    """Where the patch tokens of all images vary most, as colours.

    z = (token - mean) v_1, v_2, v_3, by the leading eigenvectors of the covariance, are red,
    green and blue. Two standard deviations of z to either side of grey span a colour.
    All images together: alike patches then have one colour in all of them.
    """

    def __init__(self):
        self.count = 0
        self.total = 0.0  # of the tokens: (D,)
        self.products = 0.0  # of each two of their numbers: (D, D)

    def add(self, tokens: Tensor) -> None:
        """Take the tokens of one more image into account: (r, c, D)."""
        flat = tokens.flatten(0, 1).double()
        self.count += len(flat)
        self.total = self.total + flat.sum(dim=0)
        self.products = self.products + flat.T @ flat

    def of(self, tokens: Tensor) -> Tensor:
        """Return the colours of one image: (r, c, D) -> (r, c, 3) in 0 ... 1."""
        mean = self.total / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        variances, vectors = torch.linalg.eigh(covariance)
        # eigh sorts the eigenvalues upwards
        variances = variances[-3:].flip(0)
        vectors = vectors[:, -3:].flip(1)
        # an eigenvector has no sign of its own: make its largest entry positive
        largest = vectors.abs().argmax(dim=0, keepdim=True)
        vectors = vectors * vectors.gather(0, largest).sign()

        z = (tokens.double() - mean) @ vectors
        span = 4 * variances.clamp(min=1e-24).sqrt()  # tokens all alike are grey
        return (0.5 + z / span).clamp(0, 1).float()


def binary_mask(kept: Tensor, height: int, width: int) -> Tensor:
    """Return a mask of an image's own size: bool (r, c) -> uint8 (height, width), 0 or 255."""
    grid = 255 * kept.byte().view(1, 1, *kept.shape)
    # nearest: a pixel takes the value of the patch that it is in
    return F.interpolate(grid, (height, width), mode="nearest")[0, 0]


def make_panels(
    original: Tensor, image: Tensor, attention: Tensor, patch_size: int, mass: float | None
) -> list[Panel]:
    """Return the panels of one image: it, the heads' mean, each head, and their masks.

    original: uint8 (3, height, width), and image: (3, H, W), as the network reads it.
    attention: (h, r, c). mass: what a mask keeps; None draws no masks.
    """
    height, width = original.shape[-2:]
    pixels = image.movedim(0, -1).float() / 255
    maps = {"mean": attention.mean(dim=0)}
    for number, head in enumerate(attention):
        maps[f"head{number}"] = head
    panels = [Panel("image", "", pixels)]
    for name, patches in maps.items():
        panels.append(Panel("attn", name, to_pixels(patches, patch_size)))
    if mass is not None:
        for name, patches in maps.items():
            kept = keep_mass(patches, mass)
            dark = overlay(pixels, to_pixels(kept, patch_size))
            panels.append(Panel("mask", name, dark, mass))
            panels.append(Panel("binary", name, binary_mask(kept, height, width), mass))
    return panels


def draw_figure(panels: list[Panel]) -> tuple[Figure, list[AxesImage]]:
    """Draw an image beside its maps, and the masks below their maps; binary masks are left out.

    Return the figure, and what is drawn in it, panel by panel.
    """
    rows = [[panel for panel in panels if panel.kind not in ("mask", "binary")]]
    masks = [panel for panel in panels if panel.kind == "mask"]
    if masks:
        rows.append(masks)
    columns = len(rows[0])
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


def write_panel(path: Path, panel: Panel) -> None:
    """Write a panel as a file of its own; maps in colours, each from its least to its most."""
    if panel.kind == "binary":
        Image.fromarray(panel.image.numpy()).save(path)
    else:
        imsave(path, panel.image.numpy())


@contextmanager
def enough_memory(image: Tensor) -> Iterator[None]:
    """Raise InputError where the memory is too short for an image (3, H, W)."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # PyTorch has no error of its own for a CPU's memory
        if isinstance(error, RuntimeError) and not re.search("memory|bad_alloc", str(error)):
            raise
        height, width = image.shape[-2:]
        raise InputError(
            f"too little memory for an image of {width} x {height} pixels: ask for a smaller "
            "--image_size, or cut the image"
        ) from None


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


def draw_image(
    folder: Path,
    file: Path,
    backbone: nn.Module,
    args: dict,
    colours: PrincipalColours | None,
    flags: Namespace,
) -> np.ndarray:
    """Write the panels of one image into the folder; return the figure's pixels."""
    patch_size = backbone.patch_size
    original = decode(file, args["levels"])
    # an image of any shape keeps its shape, in whole patches
    image = fit_to_patches(original, flags.image_size, patch_size)
    with enough_memory(image):
        attention = attention_of(backbone, image, args)
        panels = make_panels(original, image, attention, patch_size, flags.threshold)
        if colours:
            of_patches = colours.of(patch_tokens_of(backbone, image, args))
            grown = to_pixels(of_patches.movedim(-1, 0), patch_size).movedim(0, -1)
            panels.insert(1, Panel("pca", "", grown))  # beside the image

        folder.mkdir(parents=True, exist_ok=True)
        for panel in panels:
            write_panel(folder / f"{panel.file_name}.png", panel)
        figure, _ = draw_figure(panels)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels = np.array(canvas.buffer_rgba())
    # the parts of a figure refer to one another: uncollected, many images' panels would stay
    del figure, canvas
    gc.collect()
    return pixels


def draw_attention(flags: Namespace) -> None:
    """Read one image after the other, look at it, and write its figure and files."""
    backbone, args = load_network(flags)
    files = image_files(flags.image_path)
    args["levels"], notes = shared_levels(files, flags, args)
    for note in notes:
        print(note)
    colours = None
    if flags.pca:
        colours = common_colours(files, backbone, args, flags.image_size)

    output = Path(flags.output_dir)
    strips = []  # the first images' figures, one below the other
    drawn = 0
    for number, file in enumerate(tqdm(files, "images", leave=False, **bar_style())):
        folder = output
        if len(files) > 1:  # several images have files of the same names
            folder = output / f"{number}-{file.stem}"
        try:
            figure = draw_image(folder, file, backbone, args, colours, flags)
        except InputError as error:
            if len(files) == 1:
                raise
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            continue
        Image.fromarray(figure).save(folder / "attention.png")
        drawn += 1
        if len(strips) < MOST_IN_A_FIGURE:
            strips.append(figure)

    if not drawn:
        raise InputError(f"none of the {len(files)} files could be drawn: give other images")
    Image.fromarray(np.concatenate(strips)).save(output / "attention.png")
    text = f"wrote {output / 'attention.png'}, and the single images beside it"
    if len(files) > 1:
        text += f": {drawn} of {len(files)} drawn, {len(files) - drawn} skipped"
    print(text)


def main(argv: list[str] | None = None) -> None:
    parser = attention_command_line(__doc__)
    add = parser.add_argument
    add("--image_path", nargs="+", required=True, metavar="FILE|FOLDER",
        help="images, or folders of images")
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
