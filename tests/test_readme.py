"""What the README says of the source is true: its tables, its commands' flags; those of the exercises too."""
import ast
import re
import shlex
from pathlib import Path

import pytest

from ablations.rows import STUDIES
from classroom.ladder import LADDER
from settings import parse_settings

REPO = Path(__file__).parent.parent
README = (REPO / "README.md").read_text()
SHOWN = "\n".join([README, (REPO / "classroom/README.md").read_text(), *(one.look for one in LADDER)])
COMMANDS = SHOWN.replace("\\\n", " ").replace("-m classroom run ", "")


def names_in(file: Path) -> set[str]:
    """Functions, classes and Class.method of a module."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


def file_of(script: str) -> Path:
    """train.py or -m bench -> the file that it starts."""
    if script.endswith(".py"):
        return REPO / script
    module = REPO / script.removeprefix("-m ").replace(".", "/")
    return module / "__main__.py" if module.is_dir() else module.with_suffix(".py")


def numbered(text: str) -> set[tuple[str, int]]:
    """What a text names of the paper: "Tables 3 and 4, Fig. 5 to 7" -> ("Table", 3) ... ("Fig", 7)."""
    found, number_list = set(), r"\d+(?:(?:, | and | to )\d+)*"
    for kind, listed in re.findall(rf"\b(Eq|Fig|Table|Algorithm)s?\.? ({number_list})", " ".join(text.split())):
        for first, _, last in (part.partition(" to ") for part in re.split(", | and ", listed)):
            found |= {(kind, number) for number in range(int(first), int(last or first) + 1)}
    return found


PLACES = re.findall(r"`([\w/]+\.py):([\w.]+)`", README)
ROWS = re.findall(r"^\| (.+?) \| (.+?) \| .*\|$", README.partition("## From the paper to the code")[2], re.M)[1:]
PAPER = {(kind, number) for kind, most in (("Algorithm", 1), ("Eq", 5), ("Fig", 11), ("Table", 15))
         for number in range(1, most + 1)}


def test_the_paper_to_code_table_is_there():
    assert len(PLACES) >= 15


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_every_place_that_the_readme_names_exists(file, name):
    assert (REPO / file).exists(), f"README names {file}, which is not there"
    assert name in names_in(REPO / file), f"README names {file}:{name}, which is not there"


def test_every_equation_figure_and_table_of_the_paper_stands_in_the_readme():
    missing = PAPER - numbered("; ".join(what for what, _ in ROWS))
    assert not missing, f"the paper-to-code table has no row for {sorted(missing)}"


@pytest.mark.parametrize(("what", "where"), [row for row in ROWS if numbered(row[0]) and ".py" in row[1]])
def test_the_number_that_a_row_names_is_found_in_its_files(what, where):
    """So a search for "Eq. 4" in the sources leads to it."""
    there = set().union(*(numbered((REPO / file).read_text()) for file in re.findall(r"[\w/]+\.py", where)))
    for kind, number in numbered(what):
        assert (kind, number) in there, f"README sends a reader of {kind} {number} to {where}, where it is not named"


def test_every_study_that_is_shown_exists_and_every_study_is_shown():
    for study in re.findall(r"-m ablations (\w+)", COMMANDS):
        assert study in (*STUDIES, "all"), f"a page shows python -m ablations {study}, which is no study"
    for study in STUDIES:
        assert re.search(rf"(`|-m ablations ){study}\b", README), f"README does not say what the study {study} is"


def test_every_training_that_is_shown_has_settings_that_are_allowed_and_a_folder_of_its_own():
    """A finished folder refuses other settings, and trains nothing with the same ones."""
    folders = {}
    for command in re.findall(r"train\.py ([^\n`#]*)", COMMANDS.replace("--seed N", "--seed 0")):
        folder = parse_settings(shlex.split(command)).output_dir
        if "--output_dir" in command:
            assert folders.setdefault(folder, command) == command, f"two trainings are shown in {folder}"


def test_every_flag_of_the_other_scripts_that_is_shown_exists():
    """A flag is written in the script itself, or in what gives all evaluations their flags."""
    shared = (REPO / "training/evaluation.py").read_text() + (REPO / "training/checkpoint.py").read_text()
    for script, command in re.findall(r"(?:python|torchrun[^\n`#]*?) (\w+\.py|-m [\w.]+) ([^\n`#]*)", COMMANDS):
        source = file_of(script).read_text() + shared
        for flag in re.findall(r"--(\w+)", command) if script not in ("train.py", "-m bench") else ():
            assert f'"--{flag}"' in source, f"{script} --{flag} is shown, which {script} does not take"


def test_every_file_and_figure_that_is_linked_is_there():
    for page in (REPO / "README.md", REPO / "classroom/README.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.relative_to(REPO)} links {link}, which is not there"
