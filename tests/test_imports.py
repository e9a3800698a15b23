"""Imports point one way: runtime <- method, training <- scripts <- wings, which nobody imports."""

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
WINGS = ("ablations", "bench", "classroom", "evals")
METHOD = ("vit", "head", "multicrop", "loss", "teacher", "optimizer")


def folders_imported(file: Path) -> set[str]:
    """Return the first names of all that a file imports, inside of functions too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("wing", WINGS)
def test_nobody_imports_a_wing(wing):
    """What two of them need stands in training/ or on the top; else a command is run."""
    for file in [*REPO.glob("*.py"), *REPO.glob("*/*.py")]:
        if file.parent.name not in (wing, "tests"):
            assert wing not in folders_imported(file), f"{file.relative_to(REPO)} imports {wing}"


def test_runtime_knows_nothing_of_dino():
    ours = {file.stem for file in REPO.glob("*.py")} | {"training", *WINGS}
    for file in REPO.glob("runtime/*.py"):
        assert not folders_imported(file) & ours, file.name


@pytest.mark.parametrize("name", METHOD)
def test_the_method_files_know_of_no_training(name):
    assert "training" not in folders_imported(REPO / f"{name}.py")
