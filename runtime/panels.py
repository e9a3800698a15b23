"""Panels: drawings of an image, as rows of a figure and as files.

Shapes: H x W pixels, r x c patches, h heads.
"""
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure  # not pyplot, which would change the plots of a notebook
from matplotlib.image import AxesImage, imsave
from PIL import Image
from torch import Tensor

from runtime.output_folder import OutputFolder

RED = torch.tensor([1.0, 0.0, 0.0])


class Panel(NamedTuple):
    """One drawing of an image.

    title: what stands above it in the figure, and colour the title's. file_name: the release's.
    image: (H, W, 3) in 0 ... 1, a map (H, W), or uint8 0 or 255 (H, W).
    row: of the figure; None for a file alone.
    """

    title: str
    file_name: str
    image: Tensor
    row: int | None = 0
    colour: Sequence[float] = (0, 0, 0)


def as_pixels(image: Tensor) -> Tensor:
    """Return an image as it is drawn: uint8 (3, H, W) -> (H, W, 3) in 0 ... 1."""
    return image.movedim(0, -1).float() / 255


def binary_mask(kept: Tensor, height: int, width: int) -> Tensor:
    """Return a mask of an image's own size: bool (r, c) -> uint8 (height, width), 0 or 255."""
    grid = 255 * kept.byte().view(1, 1, *kept.shape)
    # nearest: a pixel takes the value of the patch that it is in
    return F.interpolate(grid, (height, width), mode="nearest")[0, 0]


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


def grow_colours(patches: Tensor, patch_size: int) -> Tensor:
    """Repeat each patch's colour over its pixels: (r, c, 3) -> (H, W, 3)."""
    rows = patches.repeat_interleave(patch_size, dim=0)
    return rows.repeat_interleave(patch_size, dim=1)


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


def draw_figure(panels: list[Panel]) -> tuple[Figure, list[AxesImage]]:
    """Draw the panels of each row side by side, so that each mask is below its map.

    Return the figure, and what is drawn in it, panel by panel.
    """
    shown = [panel for panel in panels if panel.row is not None]
    by_row: dict[int, list[Panel]] = {}
    for panel in shown:
        by_row.setdefault(panel.row, []).append(panel)
    rows = list(by_row.values())
    columns = len(rows[0])
    tallest = max(panel.image.shape[0] / panel.image.shape[1] for panel in shown)
    row_height = 2 * min(tallest, 2) + 0.25  # with the title
    figure_size = (2 * columns, row_height * len(rows))
    figure = Figure(figure_size, dpi=110, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    drawn = []
    for line, row in zip(grid, rows, strict=True):
        for axes in line:
            axes.axis("off")
        below_the_maps = line[columns - len(row):]  # "heads" is below the image, or --pca's panel
        for axes, panel in zip(below_the_maps, row, strict=True):
            axes.set_title(panel.title, fontsize=9, color=panel.colour)
            # nearest: a patch is a square, not a blur that the network never computed
            drawn.append(axes.imshow(panel.image.numpy(), interpolation="nearest"))
    return figure, drawn


def figure_pixels(panels: list[Panel]) -> np.ndarray:
    """Draw the figure, and return its pixels: uint8 (height, width, 4)."""
    figure, _ = draw_figure(panels)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.array(canvas.buffer_rgba())
    # the parts of a figure refer to one another: uncollected, many images' panels would stay
    del figure, canvas
    gc.collect()
    return pixels


def write_panel(path: Path, panel: Panel) -> None:
    """Write a panel as a file of its own; maps in colours, each from its least to its most."""
    if panel.image.dtype == torch.uint8:
        Image.fromarray(panel.image.numpy()).save(path)
    else:
        imsave(path, panel.image.numpy())


def write_panels(output: OutputFolder, place: str, panels: list[Panel]) -> None:
    """Write each panel into a folder of the output folder; "" is the output folder itself."""
    paths = [output.file(place, f"{panel.file_name}.png") for panel in panels]
    for path, panel in zip(paths, panels, strict=True):
        write_panel(path, panel)
