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
import re
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from attention import cls_attention, keep_mass, overlay, to_pixels, token_attention
from data import decode, find_images
from features import mean_and_std, normalise
from runtime import hardware
from runtime.commandline import CommandLine, InputError, bar_style, brief, errors_in_one_line
from runtime.panels import OutputFolder, Panel, figure_pixels, write_panels
from training.checkpoint import load_backbone
from training.evaluation import fit_to_patches, shared_levels
from training.pretrained import add_weights_flags, weights_path

MOST_IN_A_FIGURE = 20  # images: more make a figure that no program shows
RED = torch.tensor([1.0, 0.0, 0.0])


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


def query_attention_of(
    backbone: nn.Module, image: Tensor, args: dict, patches: list[tuple[int, int]]
) -> Tensor:
    """Return where Q patches look in the last block (Fig. 8): uint8 (3, H, W) -> (h, Q, r, c).

    patches: the row and the column of each.
    """
    columns = image.shape[-1] // backbone.patch_size
    tokens = [1 + row * columns + column for row, column in patches]  # token 0 is [CLS]
    return token_attention(backbone, network_input(image, args, backbone), tokens)[0].cpu()


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


def as_pixels(image: Tensor) -> Tensor:
    """Return an image as it is drawn: uint8 (3, H, W) -> (H, W, 3) in 0 ... 1."""
    return image.movedim(0, -1).float() / 255


def named_maps(attention: Tensor) -> dict[str, Tensor]:
    """Return the heads' mean and each head by name: (h, r, c) -> (r, c) each."""
    maps = {"mean": attention.mean(dim=0)}
    for number, head in enumerate(attention):
        maps[f"head{number}"] = head
    return maps


def head_colours(heads: int) -> Tensor:
    """Return a colour for each head, as far apart as they can be: (h, 3) in 0 ... 1."""
    hues = np.linspace(0, 1, heads)
    return torch.from_numpy(colormaps["gist_rainbow"](hues)[:, :3]).float()


def tint(pixels: Tensor, colours: Tensor) -> Tensor:
    """Lay colours over an image without its own: two of (H, W, 3) in 0 ... 1 -> (H, W, 3)."""
    grey = pixels.mean(dim=-1, keepdim=True)
    return 0.4 * grey + 0.6 * colours


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


def grow_colours(patches: Tensor, patch_size: int) -> Tensor:
    """Repeat each patch's colour over its pixels: (r, c, 3) -> (H, W, 3)."""
    rows = patches.repeat_interleave(patch_size, dim=0)
    return rows.repeat_interleave(patch_size, dim=1)


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


def check_query(numbers: Sequence[float]) -> None:
    """Raise InputError where --query is not x y of points in the image."""
    if len(numbers) % 2:
        raise InputError(
            f"--query takes x and y of each point, but has {len(numbers)} numbers: give pairs, "
            "such as 0.4 0.6"
        )
    for number in numbers:
        if not 0 <= number <= 1:
            raise InputError(
                f"--query {number:g} must be a fraction of the image's width or height, 0 ... 1: "
                "try 0.4 0.6"
            )


def query_patches(numbers: Sequence[float], rows: int, columns: int) -> list[tuple[int, int]]:
    """Return the row and the column of the patch at each point x y of --query."""
    patches = []
    for x, y in zip(numbers[::2], numbers[1::2], strict=True):
        row = min(int(y * rows), rows - 1)  # 1.0 is in the last patch
        column = min(int(x * columns), columns - 1)
        patches.append((row, column))
    return patches


def cosines(queries: Tensor, tokens: Tensor) -> Tensor:
    """Return how similar each patch is to each query: (Q, D), (r, c, D) -> (Q, r, c), -1 ... 1."""
    units = F.normalize(tokens, dim=-1)
    return torch.einsum("q d, r c d -> q r c", F.normalize(queries, dim=-1), units)


def lay_over(
    pixels: Tensor, values: Tensor, least: float, most: float, patch_size: int
) -> Tensor:
    """Lay a map over its image in colours, from blue for `least` to yellow for `most`.

    (H, W, 3), (r, c) -> (H, W, 3).
    """
    scaled = (values - least) / max(most - least, 1e-12)  # of a map of one value: 0
    colours = torch.from_numpy(colormaps["viridis"](scaled.numpy())[..., :3]).float()
    return tint(pixels, grow_colours(colours, patch_size))


def frame_patch(pixels: Tensor, row: int, column: int, patch_size: int) -> Tensor:
    """Return the image with a red frame around one patch: (H, W, 3) -> (H, W, 3)."""
    edge = max(1, min(pixels.shape[:2]) // 60)  # seen in a small panel too
    top = row * patch_size
    left = column * patch_size
    bottom = top + patch_size
    right = left + patch_size
    framed = pixels.clone()
    framed[max(0, top - edge):bottom + edge, max(0, left - edge):right + edge] = RED
    framed[top:bottom, left:right] = pixels[top:bottom, left:right]
    return framed


def attention_panels(
    pixels: Tensor, attention: Tensor, patches: list[tuple[int, int]], patch_size: int
) -> list[Panel]:
    """Return where patches of an image look (Fig. 8): a row each, with the heads as files alone.

    (H, W, 3), (h, Q, r, c), and the row and the column of each of the Q patches.
    """
    panels = []
    for query, patch in enumerate(patches):
        framed = frame_patch(pixels, *patch, patch_size)
        panels.append(Panel(f"query {query}", f"query{query}_img", framed, query))
        for name, values in named_maps(attention[:, query]).items():
            row = None
            if name == "mean":
                row = query
            drawn = lay_over(pixels, values, values.min(), values.max(), patch_size)
            drawn = frame_patch(drawn, *patch, patch_size)
            panels.append(Panel("attention", f"query{query}_attn-{name}", drawn, row))
    return panels


def cosine_panels(
    pixels: Tensor,
    maps: Tensor,
    least: Tensor,
    framed: list[tuple[int, int]],
    patch_size: int,
) -> list[Panel]:
    """Return how similar an image's patches are to each query, a row each.

    (H, W, 3), (Q, r, c), what is blue in each (Q,), and the queries where they are in this image.
    """
    panels = []
    for query, values in enumerate(maps):
        drawn = lay_over(pixels, values, least[query], 1.0, patch_size)
        if framed:
            drawn = frame_patch(drawn, *framed[query], patch_size)
        title = f"cosine, up to {values.max():.2f}"
        panels.append(Panel(title, f"query{query}_cosine", drawn, query))
    return panels


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
        framed = []
        with enough_memory(image):
            tokens = patch_tokens_of(backbone, image, args)
            if number == 0:
                patches = query_patches(flags.query, *tokens.shape[:2])
                framed = patches
                attention = query_attention_of(backbone, image, args, patches)
                panels = attention_panels(pixels, attention, patches, patch_size)
                features = torch.stack([tokens[patch] for patch in patches])  # (Q, D)
                # one scale for all images: their colours compare
                least = cosines(features, tokens).amin(dim=(1, 2))
            maps = cosines(features, tokens)
            panels += cosine_panels(pixels, maps, least, framed, patch_size)
        write_panels(output, place, panels)
        if number < MOST_IN_A_FIGURE:
            in_figure += [panel for panel in panels if panel.row is not None]
    return figure_pixels(in_figure)


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
