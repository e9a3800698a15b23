"""Make dino.ipynb from dino.py: run its cells, and keep what they print and draw.

    python -m classroom.notebook

A cell of code begins with the line `# %%`, a cell of text with `# %% [markdown]`.
A notebook is a JSON file, so nothing of Jupyter is needed.
"""

import base64
import io
import json
import sys
from contextlib import chdir, redirect_stdout
from pathlib import Path
from types import ModuleType

from PIL import Image

FOLDER = Path(__file__).parent


def read_cells(text: str) -> list[tuple[str, str]]:
    """Return each cell's kind, "markdown" or "code", and its text.

    What stands above the first cell is left out.
    """
    cells = []
    for part in text.split("\n# %%")[1:]:
        mark, _, body = part.partition("\n")
        body = body.strip("\n")
        if not mark:
            cells.append(("code", body))
            continue
        lines = [line.removeprefix("#").removeprefix(" ") for line in body.split("\n")]
        cells.append(("markdown", "\n".join(lines)))
    return cells


class Screen:
    """Receives what a cell prints and draws, in the form that a notebook has it."""

    def __init__(self):
        self.outputs = []

    def write(self, text: str) -> None:
        """Take what is printed."""
        if not self.outputs or self.outputs[-1]["output_type"] != "stream":
            self.outputs.append({"output_type": "stream", "name": "stdout", "text": ""})
        self.outputs[-1]["text"] += text

    def flush(self) -> None:
        """Do nothing; print calls it."""

    def show(self) -> None:
        """Take the open figures, in place of plt.show."""
        from matplotlib import pyplot as plt  # not at the top: it would pick a backend

        for number in plt.get_fignums():
            drawn = io.BytesIO()
            plt.figure(number).savefig(drawn, dpi=80)
            png = io.BytesIO()
            image = Image.open(drawn).convert("RGB")
            # 256 colours, so that the notebook stays small
            image = image.quantize(method=Image.Quantize.FASTOCTREE)
            image.save(png, "png", optimize=True)
            data = {"image/png": base64.b64encode(png.getvalue()).decode()}
            self.outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
        plt.close("all")

    def clear(self, wait: bool) -> None:
        """Forget what the cell has shown, in place of IPython's clear_output."""
        self.outputs = []


def run_cells(cells: list[tuple[str, str]]) -> list[list[dict]]:
    """Run the code cells one after the other, as Jupyter does; return each cell's outputs."""
    from matplotlib import pyplot as plt

    plt.switch_backend("agg")  # bitmaps, no windows
    screen = Screen()
    plt.show = screen.show
    ipython = ModuleType("IPython.display")
    ipython.clear_output = screen.clear
    sys.modules["IPython.display"] = ipython

    names = {"__name__": "__main__"}
    outputs = []
    with chdir(FOLDER), redirect_stdout(screen):  # Jupyter starts in the notebook's folder
        for number, (kind, text) in enumerate(cells):
            screen.outputs = []
            if kind == "code":
                exec(compile(text, f"cell {number}", "exec"), names)
            outputs.append(screen.outputs)
    return outputs


def notebook(cells: list[tuple[str, str]], outputs: list[list[dict]]) -> dict:
    """Return the notebook in version 4.5 of its format."""
    written = []
    count = 0
    for number, (kind, text) in enumerate(cells):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {}, "source": text}
        if kind == "code":
            count += 1
            cell |= {"execution_count": count, "outputs": outputs[number]}
        written.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": written, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def make(source: Path, target: Path) -> None:
    """Run the cells of the source, and write the notebook."""
    cells = read_cells(source.read_text(encoding="utf-8"))
    outputs = run_cells(cells)
    text = json.dumps(notebook(cells, outputs), indent=1, ensure_ascii=False)
    target.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {target.name}, {target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    make(FOLDER / "dino.py", FOLDER / "dino.ipynb")
