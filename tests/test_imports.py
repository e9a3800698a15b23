"""Imports point one way: runtime <- method <- training <- scripts <- wings, which nobody imports.

The table says which part may import which, imports inside of functions counted.
"""

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
METHOD = {"vit", "head", "multicrop", "loss", "teacher", "optimizer"}
DATA = {"data", "settings", "features", "attention"}  # what goes in and comes out
SCRIPTS = {"train", "eval_knn", "visualize_attention", "hubconf"}
WINGS = {"ablations", "bench", "classroom", "evals"}
LIBRARY = METHOD | DATA | {"runtime"}
OURS = LIBRARY | SCRIPTS | WINGS | {"training", "tests"}

# a top file or a folder, and what of ours it may import
MAY = {"runtime": {"runtime"}, "training": LIBRARY | {"training"}}
for name in METHOD:
    MAY[name] = METHOD | {"runtime"}
for name in DATA:
    MAY[name] = LIBRARY
MAY["data"] = LIBRARY | {"training"}
for name in SCRIPTS:
    MAY[name] = LIBRARY | {"training"}
for name in WINGS:  # and none of the others
    MAY[name] = LIBRARY | SCRIPTS | {"training", name}


def imported(text: str) -> set[str]:
    """Return the first names of all that a file imports, inside of functions too."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports begin at the top, so that the table can be read"
            found.add(node.module.partition(".")[0])
    return found


def refused(part: str, text: str) -> set[str]:
    """Return what of ours a file of this part imports and may not."""
    return imported(text) & OURS - MAY[part]


def test_the_table_has_each_top_file_and_folder():
    parts = {file.stem for file in REPO.glob("*.py")}
    for file in REPO.glob("*/__init__.py"):
        parts.add(file.parent.name)
    assert parts == MAY.keys(), "a new one gets a line in MAY"


@pytest.mark.parametrize("part", sorted(MAY))
def test_a_part_imports_what_the_table_allows(part):
    for file in [*REPO.glob(f"{part}.py"), *REPO.glob(f"{part}/**/*.py")]:
        found = refused(part, file.read_text(encoding="utf-8"))
        assert not found, f"{file.relative_to(REPO)} imports {', '.join(sorted(found))}"


@pytest.mark.parametrize(
    ("part", "line"),
    [
        ("training", "import train"),
        ("training", "from evals import common"),
        ("loss", "import eval_knn"),
        ("vit", "from settings import Settings"),
        ("teacher", "import data"),
        ("head", "from training.backbone import VITS"),
        ("attention", "import training.report"),
        ("features", "from training import report"),
        ("settings", "import train"),
        ("data", "import train"),
        ("train", "from eval_knn import main"),
        ("eval_knn", "import evals.common"),
        ("runtime", "from vit import VisionTransformer"),
        ("runtime", "import training"),
        ("evals", "from bench import measure"),
        ("ablations", "import evals.linear as linear"),
    ],
)
def test_the_table_refuses(part, line):
    assert refused(part, line)
    assert refused(part, f"def f():\n    {line}"), "an import inside of a function counts too"


def test_what_a_file_needs_of_ours_stands_at_its_top():
    """So the first lines of a file say all that it leans on; optional packages may stand deeper."""
    for part in sorted(MAY):
        for file in [*REPO.glob(f"{part}.py"), *REPO.glob(f"{part}/**/*.py")]:
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef):
                    found = imported(ast.unparse(node)) & OURS
                    assert not found, f"{file.relative_to(REPO)}: {node.name} imports {found}"
