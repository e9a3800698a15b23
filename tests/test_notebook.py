"""Modules imported into a notebook leave its plots alone."""

import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parent.parent
HIDDEN = {"hubconf.py"}  # adds itself to the path and is read by torch.hub alone
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
