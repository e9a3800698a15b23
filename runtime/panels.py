"""Panels: drawings of an image, as rows of a figure and as files.

The files of the attention tools are named here, so that those of an earlier call can be removed.

Shapes: H x W pixels.
"""
import gc
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure  # not pyplot, which would change the plots of a notebook
from matplotlib.image import AxesImage, imsave
from PIL import Image
from torch import Tensor

from runtime.commandline import InputError

# what the files of panels and figures are called
OUR_NAMES = (
    "attention", "img", "pca", "attn-*", "mask_th*", "binary_th*", "query", "query[0-9]*_*"
)


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


def write_panels(folder: Path, panels: list[Panel]) -> None:
    """Write each panel into the folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for panel in panels:
        write_panel(folder / f"{panel.file_name}.png", panel)


def earlier_files(output: Path, places: Sequence[str], inputs: Iterable[Path]) -> set[Path]:
    """Return the files of our names in the output folder.

    places: where in it, with {} for the name. Raises InputError where an input is one of them.
    """
    found = set()
    for place in places:
        for name in OUR_NAMES:
            found.update(output.glob(place.format(name)))
    read = {file.resolve() for file in inputs}
    for file in found:
        if file.resolve() in read:
            raise InputError(f"{str(file)!r} would be overwritten: choose another --output_dir")
    return found


def remove(files: Iterable[Path], output: Path) -> None:
    """Remove files, and what folders in the output folder this empties."""
    for file in files:
        file.unlink()
        if file.parent != output:
            with suppress(OSError):  # other files are in it
                file.parent.rmdir()
