"""The classroom's notebook runs, and modules imported into one leave its plots alone."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from classroom.notebook import read_cells

REPO = Path(__file__).parent.parent
SOURCE = REPO / "classroom" / "dino.py"
NOTEBOOK = REPO / "classroom" / "dino.ipynb"
# read by torch.hub alone; and the cells of a notebook, which train
HIDDEN = {"hubconf.py", "dino.py"}
FOLDERS = (".", "runtime", "training", "evals", "ablations", "classroom", "bench")

IMPORT_ALL = """
import importlib, sys
import matplotlib

matplotlib.use("svg")  # as a notebook chooses its own
for name in sys.argv[1:]:
    importlib.import_module(name)
assert matplotlib.get_backend() == "svg", f"the backend is {matplotlib.get_backend()}"
assert "matplotlib.pyplot" not in sys.modules, "pyplot keeps every figure, and picks a backend"
"""


def modules() -> list[str]:
    names = []
    for folder in FOLDERS:
        for file in sorted((REPO / folder).glob("*.py")):
            if file.name not in HIDDEN and not file.name.startswith("__"):
                names.append(".".join(file.relative_to(REPO).with_suffix("").parts))
    return names


def test_importing_every_module_leaves_matplotlibs_backend_as_it_is():
    """A notebook that imports train, report or visualize_attention keeps its inline plots."""
    assert {"train", "training.report", "visualize_attention"} <= set(modules())
    command = [sys.executable, "-c", IMPORT_ALL, *modules()]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def shipped_cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def printed(cell: dict) -> str:
    return "".join(output.get("text", "") for output in cell["outputs"])


def run_python(*arguments, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"MPLBACKEND": "agg", "PYTHONPATH": str(REPO)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


def test_the_notebook_is_made_of_its_source():
    cells = [(cell["cell_type"], cell["source"]) for cell in shipped_cells()]
    source = SOURCE.read_text(encoding="utf-8")
    assert cells == read_cells(source), "run python -m classroom.notebook"


def test_each_cell_of_the_notebook_stands_below_a_text():
    kinds = [kind for kind, _ in read_cells(SOURCE.read_text(encoding="utf-8"))]
    assert kinds[::2] == ["markdown"] * 12
    assert kinds[1::2] == ["code"] * 11


def test_the_notebook_ships_with_what_its_cells_print_and_draw():
    code = [cell for cell in shipped_cells() if cell["cell_type"] == "code"]
    for cell in code[1:]:  # the first only finds the files
        assert cell["outputs"], cell["source"]
    kinds = {output["output_type"] for cell in code for output in cell["outputs"]}
    assert kinds == {"stream", "display_data"}, "neither errors nor anything that is not drawn"
    assert NOTEBOOK.stat().st_size < 1e6


def test_the_notebook_has_the_repositorys_address_once_and_no_path_of_a_machine():
    cells = shipped_cells()
    texts = [cell["source"] for cell in cells]
    texts += [printed(cell) for cell in cells if cell["cell_type"] == "code"]
    text = "\n".join(texts)
    assert text.count("://github.com") == 1
    assert not re.search(r"""(^|[\s"'(=])(/|[A-Z]:\\)\w""", text)


@pytest.mark.slow
def test_the_notebooks_cells_run_as_plain_python_with_twenty_steps(tmp_path):
    text = SOURCE.read_text(encoding="utf-8")
    smaller = {
        "IMAGES = 4000": "IMAGES = 128",
        "train_images, 1000)": "train_images, 53)",
        "--epochs 6": "--epochs 5",
    }
    for old, new in smaller.items():
        assert text.count(old) >= 1, old
        text = text.replace(old, new)
    text += "\nassert total == len(metrics) == 20\n"
    script = tmp_path / "cells.py"
    script.write_text(text, encoding="utf-8")
    done = run_python(script, cwd=NOTEBOOK.parent)  # where Jupyter starts
    assert done.returncode == 0, done.stderr
    assert "after: k-NN names" in done.stdout


CELLS = """# no cell

# %% [markdown]
# # A title
#
# - a text

# %%
import matplotlib.pyplot as plt
from IPython.display import clear_output
print("forgotten")
clear_output(wait=True)
print("first")
plt.plot([2, 3, 5])
plt.show()
print("second")

# %%
number = 7

# %%
print(number)
"""


def test_a_notebook_keeps_text_and_figures_in_their_order(tmp_path):
    source = tmp_path / "cells.py"
    source.write_text(CELLS, encoding="utf-8")
    target = tmp_path / "made.ipynb"
    make = "import sys; from pathlib import Path; from classroom.notebook import make; "
    done = run_python("-c", make + "make(*map(Path, sys.argv[1:]))", source, target)
    assert done.returncode == 0, done.stderr

    text, drawing, silent, later = json.loads(target.read_text(encoding="utf-8"))["cells"]
    assert text["source"] == "# A title\n\n- a text"
    first, figure, second = drawing["outputs"]
    assert (first["text"], second["text"]) == ("first\n", "second\n")
    assert figure["data"].keys() == {"image/png"}
    assert silent["outputs"] == []
    assert printed(later) == "7\n", "a cell knows what stands in those above it"
