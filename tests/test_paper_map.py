"""docs/paper.md leads from each equation, figure and table of the paper to code that is there."""

import ast
import re
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
PAGE = (REPO / "docs/paper.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (.+?) \| (.+?) \| .*\|$", PAGE, re.MULTILINE)
PLACES = sorted(set(re.findall(r"`([\w/]+\.py):([\w.]+)`", PAGE)))
HIGHEST = {"Algorithm": 1, "Eq": 5, "Fig": 11, "Table": 15}


def names_in(source: str) -> set[str]:
    """Return the functions and classes of a module, methods as Class.method."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            names |= {f"{node.name}.{method.name}" for method in methods}
    return names


def numbered(text: str) -> set[tuple[str, int]]:
    """Return what a text names of the paper: "Tables 3 and 4, Fig. 5 to 7" -> ("Table", 3) ..."""
    found = set()
    number_list = r"\d+(?:(?:, | and | to )\d+)*"
    pattern = rf"\b(Eq|Fig|Table|Algorithm)s?\.? ({number_list})"
    for kind, listed in re.findall(pattern, " ".join(text.split())):
        for part in re.split(", | and ", listed):
            first, _, last = part.partition(" to ")
            found |= {(kind, number) for number in range(int(first), int(last or first) + 1)}
    return found


def test_a_list_of_numbers_is_read_in_full():
    assert numbered("Tables 3 and 5; Fig. 7 to 9") == {
        ("Table", 3),
        ("Table", 5),
        ("Fig", 7),
        ("Fig", 8),
        ("Fig", 9),
    }


@pytest.mark.parametrize("kind", HIGHEST)
def test_every_number_of_the_paper_has_a_row(kind):
    in_rows = numbered("; ".join(paper for paper, _ in ROWS))
    for number in range(1, HIGHEST[kind] + 1):
        assert (kind, number) in in_rows, f"docs/paper.md has no row for {kind} {number}"


@pytest.mark.parametrize(("file", "name"), PLACES)
def test_every_place_exists(file, name):
    assert (REPO / file).exists(), f"docs/paper.md names {file}, which is not there"
    names = names_in((REPO / file).read_text(encoding="utf-8"))
    assert name in names, f"docs/paper.md names {file}:{name}, which is not there"


NUMBERED_ROWS = [row for row in ROWS if ".py" in row[1] and numbered(row[0])]


@pytest.mark.parametrize(("paper", "code"), NUMBERED_ROWS)
def test_a_rows_number_stands_in_its_files(paper, code):
    """So that a search for "Eq. 4" in the sources leads to it."""
    in_files = set()
    for file in re.findall(r"[\w/]+\.py", code):
        in_files |= numbered((REPO / file).read_text(encoding="utf-8"))
    for kind, number in numbered(paper):
        found = (kind, number) in in_files
        assert found, f"docs/paper.md sends {kind} {number} to {code}, which does not name it"


def test_the_method_stands_in_the_six_files_of_the_top():
    """Each of the method's files has a place in the part on Sec. 3."""
    method, _, _ = PAGE.partition("## The results")
    for file in ("vit", "head", "multicrop", "loss", "teacher", "optimizer"):
        assert f"`{file}.py:" in method, f"docs/paper.md does not lead to {file}.py"
