"""What a student has written: the files in workbook/, and which functions passed.

`ast` finds a function in the text of a file; all else stays as it was written, comments too.
The reference of an exercise is the source itself.
"""
import ast
import io
import json
from pathlib import Path

from classroom.ladder import LADDER, Exercise
from runtime.commandline import InputError, write_whole

REPO = Path(__file__).parent.parent
WORKBOOK = REPO / "workbook"
NUMBERED = {number: one for number, one in enumerate(LADDER, start=1)}


# -- functions in the text of a file


def find_function(source: str, name: str) -> ast.FunctionDef:
    """Return the function, or Class.method, of this name; raise LookupError if there is none."""
    node = ast.parse(source)
    for part in name.split("."):
        named = [child for child in node.body if getattr(child, "name", None) == part]
        if not named:
            raise LookupError(name)
        node = named[0]
    if not isinstance(node, ast.FunctionDef):
        raise LookupError(name)
    return node


def lines_of(source: str) -> list[str]:
    """Return the lines as `ast` counts them."""
    return io.StringIO(source).readlines()  # str.splitlines would end one at a form feed too


def function_text(source: str, name: str) -> str:
    """Return the function from its def to its end."""
    node = find_function(source, name)
    return "".join(lines_of(source)[node.lineno - 1 : node.end_lineno])


def head_text(source: str, name: str) -> str:
    """Return the function's signature and docstring; the signature says what it returns."""
    node = find_function(source, name)
    end = node.returns.end_lineno
    if ast.get_docstring(node) is not None:
        end = node.body[0].end_lineno
    return "".join(lines_of(source)[node.lineno - 1 : end])


def with_function(source: str, name: str, text: str) -> str:
    """Return the source with this text in place of the function."""
    node = find_function(source, name)
    lines = lines_of(source)
    lines[node.lineno - 1 : node.end_lineno] = [text]
    return "".join(lines)


# -- the student's files


def reference_text(one: Exercise) -> str:
    """Return the real source of the exercise's file."""
    return (REPO / one.file).read_text(encoding="utf-8")


def student_path(one: Exercise) -> Path:
    return WORKBOOK / one.file


def student_text(number: int) -> str:
    """Return the student's file; raise InputError if it is missing or lacks the function."""
    one = NUMBERED[number]
    path = student_path(one)
    if not path.exists():
        raise InputError(f"exercise {number} is not begun: python -m classroom start {number}")
    try:
        source = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
        find_function(source, one.name)
    except SyntaxError as error:
        place = f"workbook/{one.file}"
        if error.lineno:
            place += f", line {error.lineno}"
        raise InputError(f"{place}: {error.msg}: fix it") from None
    except UnicodeDecodeError:
        raise InputError(f"workbook/{one.file} is no UTF-8 text: save it as that") from None
    except LookupError:
        raise InputError(
            f"workbook/{one.file} has no {one.name} any more: write its def line as in {one.file}, "
            "or delete the workbook's file, with all that is in it, and start again"
        ) from None
    return source


def completed_text(file: str, keep: set[int]) -> str:
    """Return the student's file with the reference's functions in place of those not in `keep`."""
    source = None
    for number, one in NUMBERED.items():
        if one.file != file:
            continue
        mine = student_text(number)
        if source is None:
            source = mine
        if number not in keep:
            real = function_text(reference_text(one), one.name)
            missing = function_text(mine, one.name).count("\n") - real.count("\n")
            real += "\n" * missing  # so that errors name the student's lines
            source = with_function(source, one.name, real)
    return source


def write_text(path: Path, text: str) -> None:
    """Write a file of the workbook whole: it may hold other solutions too."""
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


# -- how far an exercise is


def error_of_blank(number: int) -> str:
    """Return the statement that stands where the student is to write."""
    one = NUMBERED[number]
    message = f"exercise {number}: write {one.name} in workbook/{one.file}"
    return f'raise NotImplementedError("{message}")'


def is_blank(source: str, one: Exercise) -> bool:
    """Return whether the function begins with the blank's error; below an answer it may stay."""
    function = find_function(source, one.name)
    body = list(function.body)
    if ast.get_docstring(function) is not None:
        del body[0]
    if not body or not isinstance(body[0], ast.Raise):
        return False
    return f"write {one.name} in " in ast.unparse(body[0])


def read_record() -> dict[str, str]:
    """Return workbook/progress.json: file.py:function -> the text that passed."""
    path = WORKBOOK / "progress.json"
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise InputError(
            "workbook/progress.json cannot be read: delete it, and check again what had passed"
        )
    return record


def remember(number: int, text: str) -> None:
    """Record that this text of the function passed."""
    record = {place: old for place, old in read_record().items() if not place.isdigit()}
    record[NUMBERED[number].place] = text
    write_text(WORKBOOK / "progress.json", json.dumps(record, indent=1))


def state(number: int) -> str:
    """Return how far the exercise is.

    "not begun": it has no file. "broken": its file is no Python, or lacks the function.
    "blank": nothing is written. "passes": this very text did. "begun": anything else.
    """
    one = NUMBERED[number]
    if not student_path(one).exists():
        return "not begun"
    try:
        source = student_text(number)
    except InputError:
        return "broken"
    if read_record().get(one.place) == function_text(source, one.name):
        return "passes"
    if is_blank(source, one):
        return "blank"
    return "begun"
