"""What the README says of the source is true: its table of places, its commands' flags; those of the exercises too."""
import ast
import re
from dataclasses import fields
from pathlib import Path

import pytest

from exercise_rows import LADDER
from settings import Settings

REPO = Path(__file__).parent.parent
README = (REPO / "README.md").read_text()
SHOWN = "\n".join([README, (REPO / "EXERCISES.md").read_text(), *(one.look for one in LADDER)])
COMMANDS = SHOWN.replace("\\\n", " ").replace("exercises.py run ", "")


def names_in(file: Path) -> set[str]:
    """Functions, classes and Class.method of a module."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


PLACES = re.findall(r"`(\w+\.py):([\w.]+)`", README)


def test_the_paper_to_code_table_is_there():
    assert len(PLACES) >= 15


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_every_place_that_the_readme_names_exists(file, name):
    assert (REPO / file).exists(), f"README names {file}, which is not there"
    assert name in names_in(REPO / file), f"README names {file}:{name}, which is not there"


def test_every_training_flag_that_is_shown_exists():
    flags = {field.name for field in fields(Settings)}
    for command in re.findall(r"train\.py ([^\n`#]*)", COMMANDS):
        for flag in re.findall(r"--(\w+)", command):
            assert flag in flags, f"README or EXERCISES shows train.py --{flag}, which is no setting"


def test_every_flag_of_the_other_scripts_that_is_shown_exists():
    """A flag is written in the script itself, or in what gives all evaluations their flags."""
    shared = (REPO / "evaluation.py").read_text() + (REPO / "checkpoint.py").read_text()
    for script, command in re.findall(r"(\w+\.py) ([^\n`#]*)", COMMANDS):
        source = (REPO / script).read_text() + shared
        for flag in re.findall(r"--(\w+)", command) if script not in ("train.py", "bench.py", "bench_sweep.py") else ():
            assert f'"--{flag}"' in source, f"{script} --{flag} is shown, which {script} does not take"


def test_every_module_stands_in_the_reading_order():
    for module in REPO.glob("*.py"):
        assert f"`{module.name}" in README, f"README does not say what {module.name} is for"
