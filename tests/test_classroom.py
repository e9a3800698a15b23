"""The exercises: blanks keep what is known, attempts are kept, and each exercise's tests tell right from wrong."""
import ast
import contextlib
import gc
import io
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from classroom import __main__ as exercises
from classroom import workbook as attempts
from classroom.workbook import NUMBERED, body_of, function, function_text, reference, with_body

REPO = Path(__file__).parent.parent
CENTER, TEACHER, SAME_VIEW = 2, 3, 4  # the first and the last in loss.py
LOSS = reference(NUMBERED[CENTER])


@pytest.fixture
def workbook(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(attempts, "WORKBOOK", tmp_path / "workbook")
    return tmp_path / "workbook"


def refusal(capsys, *flags) -> str:
    """The one line before exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        exercises.main([str(flag) for flag in flags])
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1, f"one line was wanted: {lines}"
    return lines[0]


def write(workbook: Path, number: int, body: str) -> None:
    """Fill in the function of this exercise."""
    path = workbook / NUMBERED[number].file
    path.write_text(with_body(path.read_text(), NUMBERED[number].name, body))


@pytest.mark.parametrize("number", NUMBERED)
def test_a_blank_keeps_signature_and_docstring_and_all_else_of_its_file(number, workbook):
    exercises.main(["start", str(number)])
    one = NUMBERED[number]
    source = (workbook / one.file).read_text()
    blank, real = function(source, one.name), function(reference(one), one.name)
    assert "raise NotImplementedError" in ast.unparse(blank.body.pop())
    real.body[bool(ast.get_docstring(real)):] = []
    assert ast.dump(blank) == ast.dump(real), "signature, decorators and docstring must stay as they are"
    told = body_of(source, one.name)
    assert all(line in told for line in one.equation.splitlines()), "the blank must show the equation"
    assert f"The reference's lines: {exercises.number_of_lines(one)}." in told
    assert with_body(source, one.name, body_of(reference(one), one.name)) == reference(one), "something else changed"


def test_hints_are_the_comments_of_the_reference_and_are_given_when_asked_for(workbook, capsys):
    (positions,) = [number for number, one in NUMBERED.items() if one.name.endswith("positions")]
    exercises.main(["start", str(positions)])
    assert "hint:" not in (workbook / "vit.py").read_text()
    before = (workbook / "vit.py").read_text()
    capsys.readouterr()
    exercises.main(["start", str(positions), "--hints"])
    told = capsys.readouterr().out
    assert (workbook / "vit.py").read_text() == before, "what is begun gets its hints on the terminal, and stays"
    exercises.main(["start", str(positions), "--again", "--hints"])
    for given in (told, (workbook / "vit.py").read_text()):
        assert "hint: paper: bicubic interpolation; release" in given and "calls rearrange, interpolate" in given


def test_an_attempt_is_overwritten_by_again_only(workbook, capsys):
    exercises.main(["start", str(CENTER)])
    for mine in ("        pass\n", body_of(LOSS, NUMBERED[CENTER].name)):  # also where it is the reference's very text
        write(workbook, CENTER, mine)
        before = (workbook / "loss.py").read_text()
        assert "--again" in refusal(capsys, "start", CENTER)
        assert (workbook / "loss.py").read_text() == before
        exercises.main(["start", str(CENTER), "--again"])
        assert "NotImplementedError" in (workbook / "loss.py").read_text()


def test_a_file_that_was_deleted_begins_anew(workbook):
    for number in (CENTER, SAME_VIEW):
        exercises.main(["start", str(number)])
    (workbook / "loss.py").unlink()
    exercises.main(["start", str(CENTER)])
    assert exercises.state(CENTER) == "blank" and exercises.state(SAME_VIEW) == "not begun"


def test_a_file_that_comes_back_brings_what_had_passed(workbook):
    exercises.main(["start", str(CENTER)])
    write(workbook, CENTER, "        pass\n")
    exercises.remember(CENTER, "        pass\n")
    (workbook / "loss.py").rename(workbook / "away.py")
    exercises.main(["start", str(TEACHER)])
    assert exercises.state(CENTER) == "not begun"
    (workbook / "away.py").rename(workbook / "loss.py")
    assert exercises.state(CENTER) == "passes", "another file's exercise was begun meanwhile"


def test_what_could_not_be_written_is_not_begun(workbook, capsys):
    """A folder stands where the new text is written first, as a full disk would; its body is the reference's still."""
    exercises.main(["start", str(CENTER)])
    (workbook / ".loss.py.part.py").mkdir()
    with pytest.raises(SystemExit):
        exercises.main(["start", str(SAME_VIEW)])
    assert "let its folder be written" in capsys.readouterr().err
    assert exercises.state(SAME_VIEW) == "not begun", "else the reference passes as the student's"


def test_a_function_that_became_a_class_is_one_line(workbook, capsys):
    exercises.main(["start", str(TEACHER)])
    (workbook / "teacher.py").write_text(f"class {NUMBERED[TEACHER].name}: pass\n")
    with pytest.raises(SystemExit):
        exercises.main(["check", str(TEACHER)])
    assert f"teacher.py has no {NUMBERED[TEACHER].name} any more" in capsys.readouterr().err


def test_classroom_of_one_file_add_up(workbook):
    exercises.main(["start", str(CENTER)])
    write(workbook, CENTER, "        pass  # mine\n")
    exercises.main(["start", str(SAME_VIEW)])
    source = (workbook / "loss.py").read_text()
    assert "pass  # mine" in body_of(source, NUMBERED[CENTER].name), "the first attempt must stay"
    assert "NotImplementedError" in body_of(source, NUMBERED[SAME_VIEW].name)


def test_what_is_not_solved_does_not_stand_in_the_way_of_others(workbook, tmp_path):
    """In the copied sources it is the reference's; what is wanted is the student's, in the file and in its siblings."""
    for number in (CENTER, SAME_VIEW):
        exercises.main(["start", str(number)])
    write(workbook, SAME_VIEW, "    return terms.mean()\n")
    exercises.copy_sources(tmp_path / "copy", lambda number: number == SAME_VIEW)
    copied = (tmp_path / "copy" / "loss.py").read_text()
    assert body_of(copied, NUMBERED[SAME_VIEW].name) == "    return terms.mean()\n"
    assert body_of(copied, NUMBERED[CENTER].name) == body_of(LOSS, NUMBERED[CENTER].name)
    lines = [function(source, "DINOLoss.__init__").lineno for source in (copied, (workbook / "loss.py").read_text())]
    assert lines[0] == lines[1], "an error must name the line that it has in the student's file"
    assert (tmp_path / "copy" / "tests" / "test_loss.py").exists() and (tmp_path / "copy" / "ablations/byol.py").exists()


def test_progress_tells_what_is_begun_and_what_passes_as_it_stands(workbook, capsys):
    exercises.main(["start", str(CENTER)])
    assert exercises.state(CENTER) == "blank" and exercises.state(SAME_VIEW) == "not begun"
    write(workbook, CENTER, "        pass\n")
    assert exercises.state(CENTER) == "begun"
    exercises.remember(CENTER, "        pass\n")
    assert exercises.state(CENTER) == "passes"
    capsys.readouterr()
    exercises.main(["progress"])
    assert capsys.readouterr().out.splitlines() == [f"  {CENTER}  passes  the center", f"1 of {len(NUMBERED)} pass"]
    write(workbook, CENTER, "        return\n")
    assert exercises.state(CENTER) == "begun", "what passed was another text"


def test_what_was_only_emptied_does_not_pass(workbook):
    """Neither with the error taken out, nor in one line; and an error in a comment is no blank any more."""
    exercises.main(["start", str(CENTER)])
    path = workbook / "loss.py"
    blank, error = path.read_text(), exercises.error_of_blank(CENTER)
    path.write_text(blank.replace(error + "\n", "\n"))
    assert exercises.state(CENTER) == "begun"
    path.write_text(blank.replace(error, f"# {error}\n        self.center.zero_()"))
    assert exercises.state(CENTER) == "begun", "run takes what is begun, and the reference for a blank"
    exercises.remember(CENTER, body_of(path.read_text(), NUMBERED[CENTER].name))
    assert exercises.state(CENTER) == "passes"


def test_what_a_student_changed_beside_the_bodies_harms_nobody(workbook, tmp_path):
    """A form feed from a PDF, a mark at the file's start, and another signature of what is not solved yet."""
    for number in (CENTER, SAME_VIEW):
        exercises.main(["start", str(number)])
    path = workbook / "loss.py"
    text = path.read_text().replace("def mean_over_pairs(terms: Tensor)", "def mean_over_pairs(t)")
    path.write_text("\ufeff" + text.replace("# Exercise 2", "# \x0cExercise 2"))
    assert exercises.state(CENTER) == exercises.state(SAME_VIEW) == "blank" and exercises.state(14) == "not begun"
    exercises.copy_sources(tmp_path / "copy", lambda number: False)
    copied = (tmp_path / "copy/loss.py").read_text()
    for name in (NUMBERED[CENTER].name, NUMBERED[SAME_VIEW].name):
        assert function_text(copied, name) == function_text(LOSS, name), "the reference's, its signature too"
    exercises.main(["start", str(SAME_VIEW), "--again"])
    assert "def mean_over_pairs(terms: Tensor)" in path.read_text()


def test_a_diff_shows_both(workbook, capsys):
    exercises.main(["start", str(CENTER)])
    write(workbook, CENTER, "        self.center.zero_()\n")
    capsys.readouterr()
    exercises.main(["diff", str(CENTER)])
    lines = capsys.readouterr().out.splitlines()
    assert "-        self.center.zero_()" in lines and "+++ loss.py" in lines
    assert any(line.startswith("+        self.center.lerp_") for line in lines)


@pytest.mark.parametrize(("flags", "said"), [
    ("start", "start takes a number from 1 to"), ("check 0", "check takes a number from 1"), ("list 3", "no number"),
    ("check 99", "from 1 to"), ("check 2", "exercise 2 is not begun"), ("diff 2", "exercise 2 is not begun"),
    ("check 2 --hints", "are for start"), ("solve 2", "invalid choice: 'solve'"), ("run nothing.py", "'nothing.py'"),
    ("run", "the name of one"), ("run -m", "the name of one"), ("run -m nothing", "-m nothing"),
    ("run -m torch.distributed.run", "-m torch"), ("run README.md", "'README.md'"),
    ("run -m classroom list", "'-m classroom'"), ("run tests/test_loss.py", "'tests/test_loss.py'"),
    ("start two", "invalid int value")])
def test_bad_input_is_one_line(flags, said, workbook, capsys):
    assert said in refusal(capsys, *flags.split())


@pytest.mark.parametrize(("harm", "said"), [
    (lambda source: source + "\ndef (:\n", "workbook/loss.py, line"),
    (lambda source: source.replace("def update_center", "def centre"), "has no DINOLoss.update_center any more"),
    (lambda source: source + "# \ud83d", "is no UTF-8 text")])
def test_a_file_that_is_no_longer_one_is_named(harm, said, workbook, capsys):
    exercises.main(["start", str(CENTER)])
    harmed = harm((workbook / "loss.py").read_text())
    (workbook / "loss.py").write_text(harmed, encoding="utf-8", errors="surrogatepass")
    for command in ("check", "diff", "start"):
        assert said in refusal(capsys, command, CENTER)


def test_another_exercises_lost_function_is_named(workbook, capsys):
    exercises.main(["start", str(CENTER)])
    path = workbook / "loss.py"
    path.write_text(path.read_text().replace("def mean_over_pairs", "def mean_of_pairs"))
    assert "has no mean_over_pairs any more" in refusal(capsys, "check", CENTER)


def test_a_workbook_that_is_no_folder_and_a_record_that_is_none_are_one_line(workbook, capsys):
    workbook.write_text("")
    assert "workbook" in refusal(capsys, "start", CENTER)
    workbook.unlink()
    exercises.main(["start", str(CENTER)])
    (workbook / "progress.json").write_text("[]")
    assert "progress.json cannot be read" in refusal(capsys, "progress")


def test_a_broken_file_does_not_stand_in_another_exercises_way(workbook, tmp_path, capsys):
    """But a script that would run without what was written there is refused."""
    for number in (CENTER, TEACHER):
        exercises.main(["start", str(number)])
    (workbook / "loss.py").write_text("def (:\n")
    exercises.copy_sources(tmp_path / "copy", lambda number: number == TEACHER)
    assert (tmp_path / "copy/loss.py").read_text() == LOSS, "the reference takes the broken file's place"
    assert "NotImplementedError" in (tmp_path / "copy/teacher.py").read_text(), "the other file is the student's"
    exercises.main(["progress"])
    assert "2  broken  the center" in capsys.readouterr().out
    assert "workbook/loss.py, line 1" in refusal(capsys, "run", "train.py")


def test_the_page_has_the_ladder_and_changes_lines_that_are_there():
    page = (REPO / "classroom/README.md").read_text()
    assert exercises.table() in page, "the page has another ladder than python -m classroom list prints"
    changed = re.findall(r"^    - +(.+)$", page, re.MULTILINE)
    assert changed and all(line in LOSS for line in changed), "the lab changes lines that loss.py does not have"
    source = LOSS
    for old, new in zip(changed, re.findall(r"^    \+ +(.+)$", page, re.MULTILINE), strict=True):
        source = source.replace(old, new)
    ast.parse(source)


def test_each_exercise_has_wrong_answers_and_tests_that_exist():
    for one in NUMBERED.values():
        assert one.tests and len(one.wrong) >= 2, f"{one.place} wants tests, and wrong answers that they tell"
        for test in one.tests:
            file, _, name = test.partition("::")
            assert f"def {name.partition('[')[0]}(" in (REPO / "tests" / file).read_text(), f"{test} is not there"


def wrong_body(number: int, changes: list[tuple[str, str]]) -> str:
    body = body_of(reference(NUMBERED[number]), NUMBERED[number].name)
    for old, new in changes:
        assert body.count(old) == 1, f"exercise {number}: {old!r} stands {body.count(old)} times in the reference"
        body = body.replace(old, new)
    return body


class Failures:
    """What failed, and how pytest puts it: "AssertionError: words" only where an assertion has words of its own."""

    def __init__(self):
        self.messages: list[str] = []

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.messages.append(report.longrepr.reprcrash.message)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.messages.append(str(report.longrepr))


def outcome(folder: Path, arguments: list[str]) -> list[str]:
    """In a fresh process: run these tests of the copied sources -> the messages of those that failed."""
    os.chdir(folder)
    gc.freeze()  # pytest collects garbage, and need not look at what was loaded before
    failures = Failures()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = pytest.main(arguments, plugins=[failures])
    assert status in (0, 1), said.getvalue()
    return failures.messages


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[tuple[int, str], list[str]]:
    """(exercise, blank, reference or wrong answer) -> messages; each in a process of its own, forked where it can be.

    The processes begin with torch loaded, and with nothing of the project's own.
    """
    folder, found = tmp_path_factory.mktemp("exercises") / "copy", {}
    exercises.copy_sources(folder, lambda number: False)
    server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if server else "spawn")
    if server:
        context.set_forkserver_preload(["pytest", "torchvision", "torchvision.transforms.v2", "einops", "torch._dynamo",
                                        "matplotlib.pyplot"])
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        for number, one in NUMBERED.items():
            bodies = {"blank": exercises.blank(number, True), "reference": wrong_body(number, [])} | {
                name: wrong_body(number, changes) for name, changes in one.wrong.items()}
            for name, body in bodies.items():
                (folder / one.file).write_text(with_body(reference(one), one.name, body))
                for cache in (folder / one.file).parent.glob(f"__pycache__/{Path(one.file).stem}.*"):
                    cache.unlink()  # two versions of one second and one size would be taken for the same
                found[number, name] = pool.submit(outcome, folder, exercises.pytest_arguments(one)).result()
            shutil.copyfile(REPO / one.file, folder / one.file)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERED)
def test_an_exercises_tests_tell_blank_right_and_wrong_apart_in_words(outcomes, number):
    """A wrong answer fails by assertions with words of their own, never by a crash or by bare numbers alone."""
    assert outcomes[number, "reference"] == [], "the reference must pass its tests"
    blank = outcomes[number, "blank"]
    assert blank and all(f"exercise {number}: write" in message for message in blank), blank
    for name in NUMBERED[number].wrong:
        messages = outcomes[number, name]
        assert messages, f"{name}: passes, though it is wrong"
        for message in messages:
            first = message.splitlines()[0]
            assert first.startswith("AssertionError: ") and "not close" not in first, f"{name}: does not teach: {first}"


def in_process(workbook: Path, *flags: str) -> subprocess.CompletedProcess:
    """python -m classroom FLAGS, with this workbook."""
    script = ("import pathlib; from classroom import __main__ as exercises, workbook as attempts; "
              f"attempts.WORKBOOK = pathlib.Path({str(workbook)!r}); exercises.main()")
    return subprocess.run([sys.executable, "-c", script, *flags], cwd=REPO, capture_output=True, text=True)


@pytest.mark.slow
def test_check_and_run_take_the_students_file_also_in_a_process_that_imports_it(workbook):
    """A check fails and then passes, which is kept; train.py, in a process of its own, meets what the file does."""
    (schedules,) = [number for number, one in NUMBERED.items() if one.name == "cosine"]
    exercises.main(["start", str(schedules)])
    write(workbook, schedules, "    return start\n")
    wrong = in_process(workbook, "check", str(schedules))
    assert wrong.returncode == 1 and "step 50 must have 0.22" in wrong.stdout and "not yet" in wrong.stdout, wrong
    assert exercises.state(schedules) == "begun"
    write(workbook, schedules, wrong_body(schedules, []))
    right = in_process(workbook, "check", str(schedules))
    assert right.returncode == 0 and exercises.state(schedules) == "passes", right
    (workbook / "optimizer.py").write_text("raise SystemExit('mine')\n" + (workbook / "optimizer.py").read_text())
    ran = in_process(workbook, "run", "train.py")
    assert ran.returncode == 1 and ran.stderr.splitlines()[-1] == "mine", ran
    ran = in_process(workbook, "run", "-m", "bench")
    assert ran.returncode == 1 and ran.stderr.splitlines()[-1] == "mine", "the current folder's modules came first"
    script = workbook / "start_exercises.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(REPO)!r})\n"
                      "import pathlib; from classroom import __main__ as exercises, workbook as attempts\n"
                      f"attempts.WORKBOOK = pathlib.Path({str(workbook)!r})\nexercises.main()\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ran = subprocess.run([*torchrun, str(script), "run", "train.py"], capture_output=True, text=True)
    assert "mine" in ran.stderr.splitlines(), "what torchrun starts must meet the student's file too"
