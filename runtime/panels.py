"""Panels: drawings of an image, as rows of a figure and as files.

The output folder keeps a list of the files, so that those of an earlier call can be removed.

Shapes: H x W pixels.
"""
import gc
import os
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


class OutputFolder:
    """The folder that gets a tool's files, and the list of them, a hidden file in it.

    Only what an earlier call put on the list is removed. No other file is overwritten.
    """

    def __init__(self, folder: Path, list_name: str, inputs: Iterable[Path]):
        """Read an earlier call's list. Raises InputError where an input is on it."""
        self.folder = folder
        self.list = folder / list_name
        self.earlier = []
        self.names = set()  # this call's
        if self.list.exists():
            # a file's name can have a line break, but no NUL
            self.earlier = os.fsdecode(self.list.read_bytes()).split("\0")[:-1]

        read = {file.resolve() for file in inputs}
        for name in self.earlier:
            path = folder / name
            if path.resolve() in read:
                raise would_be_overwritten(path)

    def remove_earlier(self) -> None:
        """Remove the earlier call's files, which would pass for this call's, and their folders."""
        for name in self.earlier:
            path = self.folder / name
            path.unlink(missing_ok=True)
            if path.parent != self.folder:
                with suppress(OSError):  # other files are in it
                    path.parent.rmdir()
        self.list.unlink(missing_ok=True)

    def file(self, *parts: str) -> Path:
        """Return where a file is to be written: put it on the list, and make its folder.

        Raises InputError where a file is that this call did not write.
        """
        path = self.folder.joinpath(*parts)
        name = str(path.relative_to(self.folder))
        if name in self.names:
            return path
        if path.exists():
            raise would_be_overwritten(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.list.open("ab") as names:
            names.write(os.fsencode(name) + b"\0")
        self.names.add(name)
        return path


def would_be_overwritten(path: Path) -> InputError:
    return InputError(f"{str(path)!r} would be overwritten: choose another --output_dir")


def write_panels(output: OutputFolder, place: str, panels: list[Panel]) -> None:
    """Write each panel into a folder of the output folder; "" is the output folder itself."""
    paths = [output.file(place, f"{panel.file_name}.png") for panel in panels]
    for path, panel in zip(paths, panels, strict=True):
        write_panel(path, panel)
