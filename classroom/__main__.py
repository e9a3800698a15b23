"""Exercises made from the source itself: you write a function, and its tests say what is wrong.

    python -m classroom list                # the exercises, and how far you are
    python -m classroom start 2             # write workbook/loss.py, with a blank for the center
    python -m classroom start 2 --hints     # print the reference's comments and what it calls
    python -m classroom check 2             # run that function's tests, with yours in its place
    python -m classroom check 2 --full      # print all that pytest prints
    python -m classroom diff 2              # yours, and the reference
    python -m classroom run train.py --preset lab --output_dir runs/my-own    # with your functions
    python -m classroom grade --json FOLDER # check each workbook in the folder
    python -m classroom race --help         # how good a network for a budget?

A check copies the sources to a temporary folder, your files over them, and runs pytest there.
So modules that import yours find it, and so do processes that a test or torchrun starts.
"""
import argparse
import ast
import difflib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tokenize
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import fill, indent, wrap

from classroom import verdict, workbook
from classroom.ladder import LADDER, Exercise
from classroom.workbook import (
    NUMBERED,
    REPO,
    completed_text,
    error_of_blank,
    find_function,
    function_text,
    head_text,
    is_blank,
    lines_of,
    read_record,
    reference_text,
    remember,
    state,
    student_path,
    student_text,
    with_function,
    write_text,
)
from runtime.commandline import CommandLine, InputError, errors_in_one_line

REPORT = "report.xml"  # pytest's, in the copy
LONGEST = 120.0  # seconds of a check in grade: a loop without end must not stop it

# -- what is shown of the reference


def body_text(one: Exercise) -> str:
    """Return the reference's lines below signature and docstring."""
    source = reference_text(one)
    return function_text(source, one.name).removeprefix(head_text(source, one.name))


def count_lines(one: Exercise) -> int:
    """Return the number of lines of code in the reference's body."""
    lines = [line.strip() for line in body_text(one).splitlines()]
    return sum(line != "" and not line.startswith("#") for line in lines)


def hints(one: Exercise) -> list[str]:
    """Return the comments in the reference's body, and the functions that it calls, in order."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(body_text(one)).readline):
        if token.type == tokenize.COMMENT:
            found.append(f"hint: {token.string.lstrip('# ')}")

    calls = []
    for node in ast.walk(find_function(reference_text(one), one.name)):
        if isinstance(node, ast.Call):
            calls.append(node)
    calls.sort(key=lambda call: (call.end_lineno, call.end_col_offset))  # inner calls come first
    names = [ast.unparse(call.func).rpartition(".")[2] for call in calls]
    found.append(f"hint: the reference calls {', '.join(dict.fromkeys(names))}")
    return found


def blank(number: int) -> str:
    """Return the function with its task as a comment, and an error where its body is missing."""
    one = NUMBERED[number]
    source = reference_text(one)
    depth = find_function(source, one.name).body[0].col_offset
    lines = [
        f"Exercise {number}: {one.title}.",
        *wrap(one.task, 98 - depth),
        "",
        *one.equation.splitlines(),
        "",
        f"The reference has {count_lines(one)} lines. "
        f"Test yours: python -m classroom check {number}",
    ]
    comment = ""
    for line in lines:
        comment += f"# {line}".rstrip() + "\n"
    body = indent(comment + error_of_blank(number) + "\n", " " * depth)
    return head_text(source, one.name) + body


# -- commands


def list_exercises() -> None:
    """Print the ladder, and how far each exercise is."""
    states = {number: state(number) for number in NUMBERED}
    for number, one in NUMBERED.items():
        place = f"{one.place}, {count_lines(one)} lines"
        print(f"{number:3}  {states[number]:9}  {one.title:47}  {place}")
    print(f"{list(states.values()).count('passes')} of {len(states)} pass")
    if any(place.isdigit() for place in read_record()):
        print("workbook/progress.json knows exercises by number, as older versions wrote it: "
              "check them again")


def start(number: int, with_hints: bool, again: bool) -> None:
    """Write the blanks of the exercise's file, if there is none yet, and print the task."""
    one = NUMBERED[number]
    path = student_path(one)
    if not path.exists():
        source = reference_text(one)
        for other in NUMBERED:  # all of this file, since whoever writes one reads its neighbours
            if NUMBERED[other].file == one.file:
                source = with_function(source, NUMBERED[other].name, blank(other))
        write_text(path, source)
    elif again:
        write_text(path, with_function(student_text(number), one.name, blank(number)))

    line = find_function(student_text(number), one.name).lineno
    print(f"{number}. {one.title}: {one.name}, workbook/{one.file}, line {line}\n")
    print(fill(one.task, 98) + "\n\n" + indent(one.equation, "    ") + "\n")
    if state(number) != "blank" and not with_hints:
        raise InputError(
            f"exercise {number} is begun in workbook/{one.file}: write on there, add --hints, or "
            "add --again for a new blank, which loses what you wrote"
        )
    if with_hints:
        print("\n".join(hints(one)) + "\n")
    print(f"the reference has {count_lines(one)} lines; "
          f"then: python -m classroom check {number}")


def check(number: int, full: bool = False) -> None:
    """Run the exercise's tests; exit with status 1 if they fail. full: print all pytest's words."""
    one = NUMBERED[number]
    source = student_text(number)
    written = function_text(source, one.name)
    if is_blank(source, one):
        line = find_function(source, one.name).lineno
        print(f"exercise {number}: write {one.name} in workbook/{one.file}, line {line}: "
              "it is still blank")
        sys.exit(1)

    # what does not pass yet stands in no other exercise's way
    keep = {other for other in NUMBERED if state(other) == "passes"} | {number}
    print(f"exercise {number}, {one.title}: its tests run ...", flush=True)
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        passed, report, output = run_tests(number, keep, Path(folder), full)
        if not passed:
            if not full:
                explain(number, Path(folder), report, output)
            print("not yet")
            sys.exit(1)
    remember(number, written)
    print(f"exercise {number} passes. Look at: {one.look}")


def run_tests(
    number: int, keep: set[int], folder: Path, full: bool = False, limit: float | None = None
) -> tuple[bool, str, str]:
    """Run the exercise's tests in a copy; return whether they pass, pytest's report, and output.

    keep: the exercises whose functions are the student's. full: let pytest print. limit: seconds.
    """
    copy_sources(folder, {NUMBERED[other].file for other in keep}, keep)
    tests = pytest_arguments(NUMBERED[number])
    command = [sys.executable, "-m", "pytest", *tests, f"--junitxml={REPORT}"]
    try:
        ended = subprocess.run(
            command, cwd=folder, capture_output=not full, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return False, "", ""
    report = read_report(folder)
    output = ""
    if not full:
        output = ended.stdout + ended.stderr
    # os._exit(0) in the student's file ends with status 0, too, and leaves no report
    passed = ended.returncode == 0 and bool(report) and verdict.all_passed(report)
    return passed, report, output


def read_report(folder: Path) -> str:
    """Return pytest's report in the copy, or "" where it wrote none."""
    path = folder / REPORT
    if not path.exists():
        return ""
    return path.read_text(encoding="utf-8")


def explain(number: int, folder: Path, report: str, output: str) -> None:
    """Print which tests failed, and what they say.

    folder: the copy. output: what pytest printed, for where its report names no failed test.
    """
    file = NUMBERED[number].file
    copied = (folder / file).read_text(encoding="utf-8")
    numbers = verdict.matching_lines(copied, student_text(number))
    failed = {}
    if report:
        failed = verdict.failed_tests(report, file, numbers)
    if not failed:
        failed[""] = verdict.last_words(output, file, numbers)
    for test, lines in failed.items():
        print(f"\n{verdict.claim(test)}")
        for line in lines:
            print("    " + line.replace(f"{folder}{os.sep}", ""))
    print(f"\npython -m classroom check {number} --full prints all that pytest says")


def grade(words: list[str]) -> None:
    """Print a line for each exercise of each workbook in a folder: whether it passes, or why not.

    All else is the reference's, so an exercise that fails makes no other one fail. But a file that
    is no Python any more, or lacks one of its functions, fails all its exercises.
    """
    parser = CommandLine("Check each workbook in a folder. It runs what was submitted.")
    parser.prog += " grade"
    parser.add_argument("folder", type=Path, help="with a folder for each student")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line")
    flags = parser.parse_args(words)

    for name, book in find_workbooks(flags.folder).items():
        workbook.WORKBOOK = book  # what reads a workbook reads this one now
        for number, one in NUMBERED.items():
            began = time.perf_counter()
            reason = why_not(number)
            seconds = round(time.perf_counter() - began, 1)
            if flags.json:
                line = {"workbook": name, "exercise": number, "function": one.place}
                line |= {"passed": not reason, "seconds": seconds, "reason": reason}
                print(json.dumps(line), flush=True)
            else:
                outcome = reason or "passes"
                print(f"{name:20}  {number:3}  {seconds:5.1f} s  {outcome}", flush=True)


def find_workbooks(folder: Path) -> dict[str, Path]:
    """Return the workbooks by student: FOLDER/NAME/loss.py or FOLDER/NAME/workbook/loss.py.

    Raises InputError if there is none.
    """
    books = {}
    for book in sorted([*folder.glob("*/"), *folder.glob("*/workbook/")]):
        if any((book / one.file).exists() for one in LADDER):
            name = book.relative_to(folder).parts[0]
            books[name] = book
    if not books:
        raise InputError(f"no workbooks in {str(folder)!r}: they are FOLDER/NAME/loss.py and so on")
    return books


def why_not(number: int) -> str:
    """Return why the function in the workbook does not pass its tests; "" if it passes."""
    try:
        if is_blank(student_text(number), NUMBERED[number]):
            return "blank"
        with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            passed, _, report = run_tests(number, {number}, Path(folder), limit=LONGEST)
    except InputError as error:  # not begun, no Python, or a function of the file is gone
        return str(error)
    if passed:
        return ""
    return "its tests fail" if report else f"no result after {LONGEST} s, or Python itself ended"


def diff(number: int) -> None:
    """Print the student's function and the reference's as a unified diff."""
    one = NUMBERED[number]
    mine = lines_of(function_text(student_text(number), one.name))
    real = lines_of(function_text(reference_text(one), one.name))
    difference = "".join(difflib.unified_diff(mine, real, f"workbook/{one.file}", one.file))
    print(difference or "no difference")


def run(words: list[str]) -> None:
    """Run a script with the student's functions, and exit with its status.

    What is still blank is the reference's.
    """
    keep = {number for number in NUMBERED if state(number) not in ("not begun", "blank")}
    files = {one.file for one in LADDER if student_path(one).exists()}
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        command = [sys.executable, *script_in(Path(folder), words)]
        copy_sources(Path(folder), files, keep)

        # python -m looks into the current folder first, which may be the real sources.
        # The environment is what the script's own processes get too.
        environment = dict(os.environ)
        environment["PYTHONSAFEPATH"] = "1"
        path = [folder]
        if os.environ.get("PYTHONPATH"):
            path.append(os.environ["PYTHONPATH"])
        environment["PYTHONPATH"] = os.pathsep.join(path)

        process = subprocess.Popen(command, env=environment)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the script's: training then saves
        signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
        sys.exit(process.wait())


# -- copies of the sources


def wing_files() -> list[Path]:
    """Return the source's files in folders: bench/step.py and so on."""
    files = []
    for init in REPO.glob("*/__init__.py"):
        files += init.parent.glob("*.py")
    return files


def copy_sources(folder: Path, files: set[str], keep: set[int]) -> None:
    """Copy the sources and tests, and over them those of the student's files that are named.

    In these the reference's functions stand in place of all exercises that are not in `keep`.
    """
    for pattern in ("*.py", "*.md", "*.toml", "tests/*.py"):
        for file in REPO.glob(pattern):
            copy_file(file, folder)
    for file in wing_files():
        copy_file(file, folder)
    for file in files:
        (folder / file).write_text(completed_text(file, keep), encoding="utf-8")


def copy_file(file: Path, folder: Path) -> None:
    target = folder / file.relative_to(REPO)
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(file, target)


def pytest_arguments(one: Exercise) -> list[str]:
    return [
        *("-q", "--tb=short", "--no-header", "-rN", "--show-capture=stdout"),
        *("-p", "no:cacheprovider"),
        *(f"tests/{test}" for test in one.tests),
    ]


def script_in(folder: Path, words: list[str]) -> list[str]:
    """Return `train.py FLAGS` or `-m bench FLAGS` as Python takes it, for a folder of copies.

    Raises InputError for anything else.
    """
    scripts = {file.name for file in REPO.glob("*.py")}
    modules = set()
    for file in wing_files():
        if file.parent != Path(__file__).parent:
            parts = file.relative_to(REPO).with_suffix("").parts
            modules.add(".".join(parts).removesuffix(".__main__"))

    name = " ".join(words[:1])
    if name == "-m":
        name = " ".join(words[:2])
        if name.removeprefix("-m ") in modules:
            return words
    elif name in scripts:
        return [str(folder / name), *words[1:]]
    raise InputError(
        f"there is no script {name!r}: run takes the name of one, such as train.py or "
        "-m evals.linear"
    )


# -- the command line


def obey(flags: argparse.Namespace) -> None:
    """Carry out list, start, check or diff."""
    if (flags.hints or flags.again) and flags.command != "start":
        raise InputError(f"--hints and --again are for start: leave them out of {flags.command}")
    if flags.full and flags.command != "check":
        raise InputError(f"--full is for check: leave it out of {flags.command}")
    if flags.command == "list":
        if flags.number is not None:
            raise InputError("list takes no number")
        list_exercises()
        return
    if flags.number not in NUMBERED:
        raise InputError(f"{flags.command} takes a number from 1 to {len(LADDER)}")
    if flags.command == "start":
        start(flags.number, flags.hints, flags.again)
    elif flags.command == "check":
        check(flags.number, flags.full)
    else:
        diff(flags.number)


def main(argv: list[str] | None = None) -> None:
    if argv is None:
        argv = sys.argv[1:]
    parser = CommandLine(__doc__)
    add = parser.add_argument
    add("command", choices=("list", "start", "check", "diff", "run", "grade", "race"))
    add("number", type=int, nargs="?", help="of the exercise; for run the script and its flags")
    add("--hints", action="store_true", help="start: the reference's comments, and what it calls")
    add("--full", action="store_true", help="check: all that pytest prints")
    add("--again", action="store_true", help="start: a new blank over what was written before")
    with errors_in_one_line():
        try:
            if argv[:1] == ["race"]:
                # by its name: the other commands need no torch, which takes seconds to load
                import_module("classroom.race").main(argv[1:])
                return
            if argv[:1] == ["grade"]:
                grade(argv[1:])
                return
            if argv[:1] == ["run"] and argv[1:2] != ["--help"]:
                run(list(argv[1:]))  # exits
            obey(parser.parse_args(argv))
        except BrokenPipeError:  # `list | head` has read enough
            sys.stderr.close()
        except OSError as error:
            raise InputError(f"cannot use {str(error.filename)!r}: {error.strerror}") from None


if __name__ == "__main__":
    main()
