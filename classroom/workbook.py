"""What a student has written: the exercise's file in workbook/, how far each exercise is, and which text passed.

`ast` finds a function in the text of a module, and all else stays as it was written, comments too; a method is named
Class.method. The reference of an exercise is the source itself; a blank is known by the error in its place.
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


def function(source: str, name: str) -> ast.FunctionDef:
    """The function, or Class.method, of this name; raises StopIteration if there is none."""
    node = ast.parse(source)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    if not isinstance(node, ast.FunctionDef):
        raise StopIteration
    return node


def lines_of(source: str) -> list[str]:
    """As `ast` counts them: str.splitlines would also end a line at a form feed."""
    return io.StringIO(source).readlines()


def whole_lines(source: str, name: str) -> slice:
    """Which lines of the source are the function, from its def to its end."""
    node = function(source, name)
    return slice(node.lineno - 1, node.end_lineno)


def body_lines(source: str, name: str) -> slice:
    """Which lines of the source are the function's body, behind its signature and its docstring."""
    node = function(source, name)
    before = node.body[0] if ast.get_docstring(node) is not None else node.returns or [*node.body, *node.args.args][-1]
    return slice(before.end_lineno, node.end_lineno)


def body_of(source: str, name: str) -> str:
    return "".join(lines_of(source)[body_lines(source, name)])


def with_lines(source: str, which: slice, text: str) -> str:
    """The source with this text in place of those lines."""
    lines = lines_of(source)
    lines[which] = [text]
    return "".join(lines)


def function_text(source: str, name: str) -> str:
    return "".join(lines_of(source)[whole_lines(source, name)])


def with_body(source: str, name: str, body: str) -> str:
    """The source with another body in the function."""
    return with_lines(source, body_lines(source, name), body)


def with_function(source: str, name: str, text: str) -> str:
    """The source with this text in place of the function, its signature too."""
    return with_lines(source, whole_lines(source, name), text)


def path_of(one: Exercise) -> Path:
    """The student's file, which may not be there."""
    return WORKBOOK / one.file


def reference(one: Exercise) -> str:
    """The real source of the exercise's file."""
    return (REPO / one.file).read_text(encoding="utf-8")


def error_of_blank(number: int) -> str:
    one = NUMBERED[number]
    return f'raise NotImplementedError("exercise {number}: write {one.name} in workbook/{one.file}")'


def is_blank(source: str, number: int) -> bool:
    """Whether the blank's error still stands in the function; in a comment it does not count."""
    error = ast.dump(ast.parse(error_of_blank(number)).body[0])
    return error in map(ast.dump, function(source, NUMBERED[number].name).body)


def workbook_text(number: int) -> str:
    """The student's file; raises InputError where it is missing, cannot be parsed, or has lost the function."""
    one, path = NUMBERED[number], path_of(NUMBERED[number])
    if not path.exists():
        raise InputError(f"exercise {number} is not begun: python -m classroom start {number}")
    try:
        source = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
        function(source, one.name)
        return source
    except SyntaxError as error:
        where = f", line {error.lineno}" if error.lineno else ""
        raise InputError(f"workbook/{one.file}{where}: {error.msg}: mend it") from None
    except UnicodeDecodeError:
        raise InputError(f"workbook/{one.file} is no UTF-8 text: save it as that") from None
    except StopIteration:
        raise InputError(f"workbook/{one.file} has no {one.name} any more: write its def line as in {one.file}, or "
                         "delete the workbook's file, with all that is in it, and start again") from None


def write(path: Path, text: str) -> None:
    """A file of the workbook, which may hold other solutions too."""
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def read_record() -> dict[str, str]:
    """workbook/progress.json: the number of each exercise begun -> the body that passed, or ""."""
    path = WORKBOOK / "progress.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise InputError("workbook/progress.json cannot be read: delete it, and check again what had passed")
    return record


def write_record(record: dict[str, str]) -> None:
    write(WORKBOOK / "progress.json", json.dumps(record, indent=1))


def remember(number: int, body: str) -> None:
    """The exercise is begun, and this body passed, if it is not empty."""
    write_record(read_record() | {str(number): body})


def forget(file: str) -> None:
    """None of the file's exercises is begun."""
    gone = {str(number) for number, one in NUMBERED.items() if one.file == file}
    write_record({number: body for number, body in read_record().items() if number not in gone})


def state(number: int) -> str:
    """not begun, broken (its file cannot be read as Python), passes (this very text did), blank, or begun."""
    one, passed = NUMBERED[number], read_record().get(str(number))
    if not path_of(one).exists():
        return "not begun"
    try:
        source = workbook_text(number)
    except InputError:
        return "not begun" if passed is None else "broken"
    body = body_of(source, one.name)
    if passed is None and body == body_of(reference(one), one.name):
        return "not begun"
    return "passes" if passed and body == passed else "blank" if is_blank(source, number) else "begun"
