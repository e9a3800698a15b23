"""What README, docs/ and the classroom's page say of the source is true: commands, flags, files."""

import re
import shlex
from pathlib import Path

import pytest

import ablations.train
from ablations.rows import STUDIES
from classroom.ladder import LADDER
from evals import transfer
from settings import parse_settings

REPO = Path(__file__).parent.parent
NAMES = ("README.md", "docs/running.md", "docs/results.md", "docs/paper.md", "classroom/README.md")
PAGES = {name: (REPO / name).read_text(encoding="utf-8") for name in NAMES}
README = PAGES["README.md"]

SHOWN = "\n".join([*PAGES.values(), *(one.look for one in LADDER)])
COMMANDS = SHOWN.replace("\\\n", " ").replace("-m classroom run ", "")
OTHERS = re.findall(r"(?:python|torchrun[^\n`#]*?) (\w+\.py|-m [\w.]+)([^\n`#]*)", COMMANDS)


def file_of(script: str) -> Path:
    """Return the file that train.py or -m bench starts."""
    if script.endswith(".py"):
        return REPO / script
    module = REPO / script.removeprefix("-m ").replace(".", "/")
    return module / "__main__.py" if module.is_dir() else module.with_suffix(".py")


def test_the_readme_is_read_in_five_minutes():
    assert len(README.split()) <= 1000, "the README is for a newcomer: put the rest under docs/"


def test_the_two_commands_stand_in_the_readme_as_they_are():
    for command in ("torchrun train.py", "pytest"):
        assert f"    pip install -r requirements.txt && {command} " in README


def test_the_tree_names_every_file_of_the_top_once():
    named = re.findall(r"^    (\w+\.py) ", README, re.MULTILINE)
    there = [file.name for file in REPO.glob("*.py")]
    assert sorted(named) == sorted(there)


def test_the_tree_names_every_wing_once():
    named = re.findall(r"^    (\w+)/ ", README, re.MULTILINE)
    wings = {init.parent.name for init in REPO.glob("*/__init__.py")} - {"workbook"}
    assert sorted(named) == sorted([*wings, "tests"])


def test_each_step_of_algorithm_1_names_a_file_that_is_there():
    algorithm = README.partition("```python")[2].partition("```")[0]
    files = re.findall(r"# (\w+\.py)", algorithm)
    assert len(files) >= 8, "a line without its file"
    for file in files:
        assert (REPO / file).exists(), f"Algorithm 1 names {file}, which is not there"


def test_every_study_that_is_shown_exists():
    for study in re.findall(r"-m ablations (\w+)", COMMANDS):
        assert study in (*STUDIES, "all"), f"{study} is shown, which is no study"


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_stands_beside_its_place_in_the_paper(study):
    assert re.search(rf"(`|-m ablations ){study}\b", PAGES["docs/paper.md"])


def test_every_training_that_is_shown_has_allowed_settings_and_a_folder_of_its_own():
    """A finished folder refuses other settings, and trains nothing with the same ones."""
    folders = {}
    started = r"(?:python|torchrun[^\n`#]*?) (train\.py|-m ablations\.train) ([^\n`#]*)"
    trainings = re.findall(started, COMMANDS.replace("--seed N", "--seed 0"))
    assert len(trainings) > 10
    for script, command in trainings:
        parse = parse_settings if script == "train.py" else ablations.train.parse
        folder = parse(shlex.split(command)).output_dir
        if "--output_dir" in command:
            first = folders.setdefault(folder, command.strip())
            assert first == command.strip(), f"two trainings are shown in {folder}"


def test_every_script_that_is_shown_is_there():
    for script, _ in OTHERS:
        assert file_of(script).is_file(), f"python {script} is shown, which is not there"


def test_every_flag_of_the_other_scripts_that_is_shown_exists():
    """A flag is written in the script itself, or in what gives all evaluations their flags."""
    shared = (REPO / "training/evaluation.py").read_text() + (
        REPO / "training/pretrained.py"
    ).read_text()
    for script, flags in OTHERS:
        if script in (
            "train.py",
            "-m ablations.train",
            "-m bench",
        ):  # their flags are made from the settings
            continue
        source = file_of(script).read_text(encoding="utf-8") + shared
        if script == "-m classroom":  # its race; behind -- stand flags of train.py
            source += (REPO / "classroom/race.py").read_text(encoding="utf-8")
            flags = flags.partition(" -- ")[0]
        if script == "-m evals.transfer":  # some of its flags are made from its recipes
            source += "".join(f'"--{name}"' for name in transfer.DEIT | transfer.REGULARISED)
        for flag in re.findall(r"--(\w+)", flags):
            assert f'"--{flag}"' in source, f"{script} --{flag} is shown, which it does not take"


@pytest.mark.parametrize("name", [*NAMES, "docs/extending.md", "docs/log.md"])
def test_every_file_and_figure_that_is_linked_is_there(name):
    page = REPO / name
    for link in re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), f"{name} links {link}, which is not there"


@pytest.mark.parametrize("name", NAMES)
def test_every_heading_that_is_linked_is_there(name):
    for link, heading in re.findall(r"\]\(([^)#:]*)#([\w-]+)\)", PAGES[name]):
        target = (REPO / name).parent / link if link else REPO / name
        titles = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert heading in anchors, f"{name} links #{heading}, which {target.name} lacks"
