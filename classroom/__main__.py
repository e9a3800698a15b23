"""Exercises made from the source itself: a function's body is taken out, and its tests say when yours does the same.

    python -m classroom list
    python -m classroom start 2 --hints     # writes workbook/loss.py, with a blank where the center is computed
    python -m classroom check 2             # the tests of that function, with yours in its place
    python -m classroom diff 2              # yours, and the reference
    python -m classroom progress
    python -m classroom run train.py --epochs 4 --output_dir runs/my-own    # any script, with your functions in it

There is no copy of a solution: `ast` finds the body, and its comments become the hints. What to write is data
(classroom/ladder.py). A check copies the sources to a temporary folder, your files over them, and runs pytest there: so
modules that import yours find it, and processes that a test, or torchrun, starts too.
"""
import argparse
import ast
import difflib
import io
import os
import shutil
import signal
import subprocess
import sys
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import indent, wrap

from classroom.ladder import LADDER, Exercise
from classroom.workbook import (
    NUMBERED,
    REPO,
    body_of,
    error_of_blank,
    forget,
    function,
    function_text,
    lines_of,
    path_of,
    reference,
    remember,
    state,
    with_body,
    with_function,
    workbook_text,
    write,
)
from runtime.commandline import CommandLine, InputError, errors_in_one_line


def number_of_lines(one: Exercise) -> int:
    """The body's lines of code, without comments and empty lines."""
    return sum(not line.lstrip().startswith(("#", "\n")) for line in body_of(reference(one), one.name).splitlines(True))


def hints(one: Exercise) -> list[str]:
    """The comments in the reference's body, and the functions that it calls, in their order."""
    body, node = body_of(reference(one), one.name), function(reference(one), one.name)
    comments = [token.string.lstrip("# ") for token in tokenize.generate_tokens(io.StringIO(body).readline)
                if token.type == tokenize.COMMENT]
    calls = [call for line in node.body for call in ast.walk(line) if isinstance(call, ast.Call)]
    calls.sort(key=lambda call: (call.end_lineno, call.end_col_offset))  # what is inside comes first
    names = dict.fromkeys(ast.unparse(call.func).rpartition(".")[2] for call in calls)
    return [*(f"hint: {comment}" for comment in comments), f"hint: the reference calls {', '.join(names)}"]


def blank(number: int, with_hints: bool) -> str:
    """The body that stands for what is to be written: all there is to know, and an error that says what is missing."""
    one, depth = NUMBERED[number], function(reference(NUMBERED[number]), NUMBERED[number].name).body[0].col_offset
    told = [f"Exercise {number}: {one.title}.", *wrap(one.text, 112 - depth), "", *one.equation.splitlines(), "",
            f"The reference's lines: {number_of_lines(one)}. Yours is tested by: python -m classroom check {number}",
            *(line for hint in hints(one) for line in wrap(hint, 112 - depth) if with_hints)]
    comment = "".join(f"# {line}".rstrip() + "\n" for line in told)
    return indent(comment + error_of_blank(number) + "\n", " " * depth)


def wings() -> list[str]:
    """The files of the source's own packages: bench/*.py and so on."""
    return [f"{file.parent.name}/*.py" for file in REPO.glob("*/__init__.py")]


def copy_sources(folder: Path, wanted: Callable[[int], bool]) -> None:
    """The sources and tests as they are, the student's files over them; what is not wanted of these is the reference's.

    So an exercise that is not solved yet does not stand in another's way, nor does a broken file where it is not
    wanted.
    """
    for file in (file for kind in ("*.py", "*.md", "*.toml", "tests/*.py", *wings()) for file in REPO.glob(kind)):
        (folder / file.relative_to(REPO)).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, folder / file.relative_to(REPO))
    texts = {}
    for number, one in NUMBERED.items():
        try:
            if path_of(one).exists():
                texts[one.file] = workbook_text(number)
        except InputError:
            if wanted(number):
                raise
    for number, one in NUMBERED.items():
        if one.file in texts and not wanted(number):
            mine, real = function_text(workbook_text(number), one.name), function_text(reference(one), one.name)
            real += "\n" * (mine.count("\n") - real.count("\n"))  # errors name the student's lines
            texts[one.file] = with_function(texts[one.file], one.name, real)
    for file, text in texts.items():
        (folder / file).write_text(text, encoding="utf-8")


def pytest_arguments(one: Exercise) -> list[str]:
    return ["-q", "--tb=short", "--no-header", "-rN", "--show-capture=stdout", "-p", "no:cacheprovider",
            *(f"tests/{test}" for test in one.tests)]


def start(number: int, with_hints: bool, again: bool) -> None:
    """Put the blank into the workbook's file, which begins as a copy of the real one; once begun, only give hints."""
    one, path = NUMBERED[number], path_of(NUMBERED[number])
    source = workbook_text(number) if path.exists() else reference(one)
    if state(number) != "not begun" and not again:
        if with_hints:
            print("\n".join(hints(one)))
            return
        raise InputError(f"exercise {number} is begun in workbook/{one.file}: go on there (--hints tells more), or add "
                         "--again to lose what you wrote")
    blanked = function_text(with_body(reference(one), one.name, blank(number, with_hints)), one.name)
    source = with_function(source, one.name, blanked)
    if not path.exists():
        forget(one.file)
    write(path, source)
    remember(number, "")
    line = function(source, one.name).lineno
    print(f"{number}. {one.title}: write {one.name}, workbook/{one.file}, line {line}\n\n"
          + "\n".join(wrap(one.text, 100)) + "\n\n" + indent(one.equation, "    ")
          + f"\n\nthe reference's lines: {number_of_lines(one)}; then: python -m classroom check {number}")


def check(number: int) -> None:
    """Run the exercise's tests; exit status 1 if they fail."""
    one = NUMBERED[number]
    if state(number) == "not begun":
        raise InputError(f"exercise {number} is not begun: python -m classroom start {number}")
    body = body_of(workbook_text(number), one.name)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copy_sources(Path(folder), lambda other: other == number or state(other) == "passes")
        command = [sys.executable, "-m", "pytest", *pytest_arguments(one)]
        failed = subprocess.run(command, cwd=folder).returncode
    if failed:
        files = sorted({test.partition("::")[0] for test in one.tests})
        print(f"not yet: read the lines that begin with E; the tests are in tests/{', tests/'.join(files)}")
        sys.exit(1)
    remember(number, body)
    print(f"exercise {number} passes. Look at: {one.look}")


def diff(number: int) -> None:
    """The student's function and the reference's, as a unified diff."""
    one = NUMBERED[number]
    functions = [lines_of(function_text(source, one.name)) for source in (workbook_text(number), reference(one))]
    print("".join(difflib.unified_diff(*functions, f"workbook/{one.file}", one.file)) or "no difference")


def progress() -> None:
    states = {number: state(number) for number in NUMBERED}
    for number, word in states.items():
        if word != "not begun":
            print(f"{number:3}  {word:7} {NUMBERED[number].title}")
    print(f"{list(states.values()).count('passes')} of {len(states)} pass")


def table() -> str:
    """The ladder, as this folder's README.md has it."""
    rows = [f"| {number} | {one.title} | `{one.place}` | {number_of_lines(one)} |" for number, one in NUMBERED.items()]
    return "\n".join(["| | exercise | function | lines |", "|---|---|---|---|", *rows])


def script_in(folder: Path, words: Sequence[str]) -> list[str]:
    """train.py or -m bench, and flags -> the same in the folder of copies; raises InputError for anything else."""
    name = " ".join(words[:2] if words[:1] == ("-m",) else words[:1])
    if name in {file.name for file in REPO.glob("*.py")}:
        return [str(folder / name), *words[1:]]
    modules = [file.relative_to(REPO).with_suffix("").parts for wing in wings() for file in REPO.glob(wing)
               if file.parent != Path(__file__).parent]
    if name in {f"-m {'.'.join(parts)}".removesuffix(".__main__") for parts in modules}:
        return list(words)
    raise InputError(f"there is no script {name!r}: run takes the name of one, such as train.py or -m bench")


def run(*words: str) -> None:
    """A script with all that was written so far in it; blanks are the reference's. Its exit status becomes ours."""
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [sys.executable, *script_in(Path(folder), words)]
        copy_sources(Path(folder), lambda number: state(number) != "blank")
        # python -m would look into the current folder first, which may be this one: the copies must win, also in the
        # processes that the script starts
        path = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        process = subprocess.Popen(command, env=os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": path})
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the script's: a training saves and then stops
        signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
        sys.exit(process.wait())


def obey(flags: argparse.Namespace) -> None:
    """Any command but run."""
    if (flags.hints or flags.again) and flags.command != "start":
        raise InputError(f"--hints and --again are for start: leave them out of {flags.command}")
    needs_number = flags.command in ("start", "check", "diff")
    if needs_number != (flags.number is not None) or (needs_number and flags.number not in NUMBERED):
        raise InputError(f"{flags.command} takes " + (f"a number from 1 to {len(LADDER)}" if needs_number else
                         "no number"))
    match flags.command:
        case "list":
            print(table())
        case "start":
            start(flags.number, flags.hints, flags.again)
        case "check":
            check(flags.number)
        case "diff":
            diff(flags.number)
        case "progress":
            progress()


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("command", choices=("list", "start", "check", "diff", "progress", "run"))
    add("number", type=int, nargs="?", help="of the exercise; for run the script and its flags")
    add("--hints", action="store_true", help="start: what the reference calls, and its comments, too")
    add("--again", action="store_true", help="start: over what was written before")
    with errors_in_one_line():
        try:
            if argv[:1] == ["run"] and argv[1:2] != ["--help"]:
                run(*argv[1:])
            obey(parser.parse_args(argv))
        except OSError as error:
            raise InputError(f"cannot use {str(error.filename)!r}: {error.strerror}") from None


if __name__ == "__main__":
    main()
