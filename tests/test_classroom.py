"""The exercises: blanks keep what is known, attempts are kept, and each exercise's tests tell right
from wrong.
"""

import ast
import contextlib
import gc
import io
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from classroom_answers import WRONG

from classroom import __main__ as exercises
from classroom import verdict
from classroom import workbook as attempts
from classroom.workbook import (
    NUMBERED,
    find_function,
    function_text,
    head_text,
    reference_text,
    with_function,
)

REPO = Path(__file__).parent.parent
PLACES = {one.place: number for number, one in NUMBERED.items()}
FORWARD = PLACES["loss.py:DINOLoss.forward"]
CENTER = PLACES["loss.py:DINOLoss.update_center"]
TEACHER = PLACES["teacher.py:update_teacher"]
LOSS = reference_text(NUMBERED[CENTER])


@pytest.fixture
def workbook(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(attempts, "WORKBOOK", tmp_path / "workbook")
    return tmp_path / "workbook"


def command(*words) -> None:
    exercises.main([str(word) for word in words])


def refusal(capsys, *words) -> str:
    """The one line before exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        command(*words)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1, f"one line was wanted: {lines}"
    return lines[0]


def body_of(source: str, name: str) -> str:
    return function_text(source, name).removeprefix(head_text(source, name))


def with_body(source: str, name: str, body: str) -> str:
    return with_function(source, name, head_text(source, name) + body)


def write(workbook: Path, number: int, body: str) -> None:
    """Fill in the function of this exercise."""
    path = workbook / NUMBERED[number].file
    path.write_text(with_body(path.read_text(), NUMBERED[number].name, body))


def remember_as_it_is(number: int) -> None:
    """As a check that passes does."""
    exercises.remember(number, function_text(attempts.student_text(number), NUMBERED[number].name))


@pytest.mark.parametrize("number", NUMBERED)
def test_a_blank_keeps_signature_and_docstring_and_all_else_of_its_file(number, workbook):
    command("start", number)
    one = NUMBERED[number]
    source = (workbook / one.file).read_text()
    blank, real = (find_function(text, one.name) for text in (source, reference_text(one)))
    assert "raise NotImplementedError" in ast.unparse(blank.body.pop())
    real.body[bool(ast.get_docstring(real)) :] = []
    assert ast.dump(blank) == ast.dump(real), (
        "signature, decorators and docstring must stay as they are"
    )
    comment = body_of(source, one.name)
    assert all(line in comment for line in one.equation.splitlines()), (
        "the blank must show the equation"
    )
    assert f"The reference has {exercises.count_lines(one)} lines." in comment
    assert max(map(len, comment.splitlines()[:-1])) <= 100
    for other in NUMBERED.values():
        if other.file == one.file:
            source = with_body(source, other.name, body_of(reference_text(other), other.name))
    assert source == reference_text(one), "something else changed"


def test_whoever_starts_an_exercise_finds_no_answer_of_another_in_the_file(workbook):
    command("start", CENTER)
    source = (workbook / "loss.py").read_text()
    assert "NotImplementedError" in body_of(source, NUMBERED[FORWARD].name)
    assert exercises.state(FORWARD) == exercises.state(CENTER) == "blank"
    assert exercises.state(TEACHER) == "not begun"


def test_hints_are_the_comments_of_the_reference_and_are_given_when_asked_for(workbook, capsys):
    positions = PLACES["vit.py:VisionTransformer.positions"]
    command("start", positions)
    before = (workbook / "vit.py").read_text()
    assert "hint:" not in capsys.readouterr().out + before
    command("start", positions, "--hints")
    given = capsys.readouterr().out
    assert (workbook / "vit.py").read_text() == before, (
        "what is begun gets its hints on the terminal, and stays"
    )
    assert "hint: paper: bicubic; release" in given and "calls rearrange, interpolate" in given
    write(workbook, positions, "        return self.pos_embed\n")
    command("start", positions, "--hints")
    assert "hint: paper: bicubic; release" in capsys.readouterr().out


def test_an_attempt_is_overwritten_by_again_only(workbook, capsys):
    command("start", CENTER)
    for mine in (
        "        pass\n",
        body_of(LOSS, NUMBERED[CENTER].name),
    ):  # also where it is the reference's very text
        write(workbook, CENTER, mine)
        before = (workbook / "loss.py").read_text()
        assert "--again" in refusal(capsys, "start", CENTER)
        assert (workbook / "loss.py").read_text() == before
        command("start", CENTER, "--again")
        assert exercises.state(CENTER) == "blank"


def test_a_begun_exercise_shows_its_task_again(workbook, capsys):
    command("start", CENTER)
    write(workbook, CENTER, "        pass\n")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        command("start", CENTER)
    assert "Eq. 4" in capsys.readouterr().out


def test_again_leaves_the_files_other_exercises_alone(workbook):
    command("start", CENTER)
    write(workbook, CENTER, "        pass  # mine\n")
    command("start", FORWARD, "--again")
    assert "pass  # mine" in body_of((workbook / "loss.py").read_text(), NUMBERED[CENTER].name)


def test_a_file_that_was_deleted_begins_anew(workbook):
    command("start", CENTER)
    write(workbook, CENTER, "        pass\n")
    remember_as_it_is(CENTER)
    (workbook / "loss.py").unlink()
    assert exercises.state(CENTER) == "not begun"
    command("start", CENTER)
    assert exercises.state(CENTER) == "blank"


def test_a_file_that_comes_back_brings_what_had_passed(workbook):
    command("start", CENTER)
    write(workbook, CENTER, "        pass\n")
    remember_as_it_is(CENTER)
    (workbook / "loss.py").rename(workbook / "away.py")
    command("start", TEACHER)
    assert exercises.state(CENTER) == "not begun"
    (workbook / "away.py").rename(workbook / "loss.py")
    assert exercises.state(CENTER) == "passes", "another file's exercise was begun meanwhile"


def test_what_could_not_be_written_is_not_begun(workbook, capsys):
    """A folder stands where the new text is written first, as a full disk would."""
    (workbook / ".loss.py.part.py").mkdir(parents=True)
    assert "let its folder be written" in refusal(capsys, "start", CENTER)
    assert exercises.state(CENTER) == "not begun"


def test_a_function_that_became_a_class_is_one_line(workbook, capsys):
    command("start", TEACHER)
    (workbook / "teacher.py").write_text(f"class {NUMBERED[TEACHER].name}: pass\n")
    assert f"teacher.py has no {NUMBERED[TEACHER].name} any more" in refusal(
        capsys, "check", TEACHER
    )


def test_what_is_not_solved_does_not_stand_in_the_way_of_others(workbook, tmp_path):
    """In the copied sources it is the reference's; what is kept is the student's, in the file and
    in its siblings.
    """
    command("start", CENTER)
    write(workbook, CENTER, "        pass\n")
    exercises.copy_sources(tmp_path / "copy", {"loss.py"}, {CENTER})
    copied, mine = ((folder / "loss.py").read_text() for folder in (tmp_path / "copy", workbook))
    assert body_of(copied, NUMBERED[CENTER].name) == "        pass\n"
    assert (
        body_of(copied, NUMBERED[FORWARD].name).strip()
        == body_of(LOSS, NUMBERED[FORWARD].name).strip()
    )
    for file in ("tests/test_loss.py", "ablations/byol.py", "pyproject.toml"):
        assert (tmp_path / "copy" / file).exists()
    write(workbook, FORWARD, "        # a line\n" * 40 + "        return 1 / 0\n")
    exercises.copy_sources(tmp_path / "copy", {"loss.py"}, {CENTER})
    copied, mine = ((folder / "loss.py").read_text() for folder in (tmp_path / "copy", workbook))
    lines = [find_function(source, NUMBERED[CENTER].name).lineno for source in (copied, mine)]
    assert lines[0] == lines[1], "an error must name the line that it has in the student's file"


def test_the_list_says_what_is_begun_and_what_passes_as_it_stands(workbook, capsys):
    command("start", CENTER)
    write(workbook, CENTER, "        pass\n")
    assert exercises.state(CENTER) == "begun"
    remember_as_it_is(CENTER)
    capsys.readouterr()
    command("list")
    *lines, total = capsys.readouterr().out.splitlines()
    words = [tuple(line.split()[:2]) for line in lines]
    assert words[FORWARD - 1] == (str(FORWARD), "blank") and words[CENTER - 1] == (
        str(CENTER),
        "passes",
    )
    assert words[TEACHER - 1] == (str(TEACHER), "not") and total == f"1 of {len(NUMBERED)} pass"
    write(workbook, CENTER, "        return\n")
    assert exercises.state(CENTER) == "begun", "what passed was another text"


def test_progress_is_kept_by_the_functions_place_and_a_record_by_numbers_is_ignored_in_one_line(
    workbook, capsys
):
    """So that another ladder, in which it has another number, finds it again."""
    command("start", CENTER)
    write(workbook, CENTER, "        pass\n")
    record = workbook / "progress.json"
    record.write_text(json.dumps({str(CENTER): "        pass\n", "16": ""}))
    assert exercises.state(CENTER) == "begun"
    capsys.readouterr()
    command("list")
    assert sum("by number" in line for line in capsys.readouterr().out.splitlines()) == 1
    remember_as_it_is(CENTER)
    assert json.loads(record.read_text()).keys() == {"loss.py:DINOLoss.update_center"}
    command("list")
    assert "by number" not in capsys.readouterr().out


def test_what_was_only_emptied_does_not_pass(workbook):
    """Neither with the error taken out, nor in one line; and an error in a comment is no blank any
    more.
    """
    command("start", CENTER)
    path = workbook / "loss.py"
    blank, error = path.read_text(), attempts.error_of_blank(CENTER)
    path.write_text(blank.replace(error + "\n", "\n"))
    assert exercises.state(CENTER) == "begun"
    path.write_text(blank.replace(error, f"# {error}\n        self.center.zero_()"))
    assert exercises.state(CENTER) == "begun", (
        "run takes what is begun, and the reference for a blank"
    )
    remember_as_it_is(CENTER)
    assert exercises.state(CENTER) == "passes"


def test_what_a_student_changed_beside_the_bodies_harms_nobody(workbook, tmp_path):
    """A form feed from a PDF, a mark at the file's start, and another signature of what is not
    solved yet.
    """
    command("start", CENTER)
    path = workbook / "loss.py"
    signature = "def update_center(self, teacher_logits: Tensor) -> None:"
    text = path.read_text().replace(signature, "def update_center(self, t):")
    path.write_text("\ufeff" + text.replace("# Exercise 1", "# \x0cExercise 1"))
    assert exercises.state(FORWARD) == exercises.state(CENTER) == "blank"
    exercises.copy_sources(tmp_path / "copy", {"loss.py"}, set())
    copied = (tmp_path / "copy/loss.py").read_text()
    for number in (FORWARD, CENTER):
        name = NUMBERED[number].name
        assert function_text(copied, name) == function_text(LOSS, name), (
            "the reference's, its signature too"
        )
    command("start", CENTER, "--again")
    assert signature in path.read_text()


def test_a_diff_shows_both(workbook, capsys):
    command("start", CENTER)
    write(workbook, CENTER, "        self.center.zero_()\n")
    capsys.readouterr()
    command("diff", CENTER)
    lines = capsys.readouterr().out.splitlines()
    assert "-        self.center.zero_()" in lines and "+++ loss.py" in lines
    assert any(line.startswith("+        self.center.lerp_") for line in lines)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("start", "start takes a number from 1 to"),
        ("check 0", "check takes a number from 1"),
        ("list 3", "no number"),
        ("check 99", "from 1 to"),
        ("check 2", "exercise 2 is not begun"),
        ("diff 2", "exercise 2 is not begun"),
        ("check 2 --hints", "are for start"),
        ("start 2 --full", "--full is for check"),
        ("solve 2", "invalid choice: 'solve'"),
        ("run nothing.py", "'nothing.py'"),
        ("run", "the name of one"),
        ("run -m", "the name of one"),
        ("run -m nothing", "-m nothing"),
        ("run -m torch.distributed.run", "-m torch"),
        ("run README.md", "'README.md'"),
        ("run -m classroom list", "'-m classroom'"),
        ("run tests/test_loss.py", "'tests/test_loss.py'"),
        ("start two", "invalid int value"),
    ],
)
def test_bad_input_is_one_line(words, said, workbook, capsys):
    assert said in refusal(capsys, *words.split())


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda source: source + "\ndef (:\n", "workbook/loss.py, line"),
        (
            lambda source: source.replace("def update_center", "def centre"),
            "has no DINOLoss.update_center any more",
        ),
        (lambda source: source + "# \ud83d", "is no UTF-8 text"),
    ],
)
def test_a_file_that_is_no_longer_one_is_named(harm, said, workbook, capsys):
    command("start", CENTER)
    harmed = harm((workbook / "loss.py").read_text())
    (workbook / "loss.py").write_text(harmed, encoding="utf-8", errors="surrogatepass")
    for word in ("check", "diff", "start"):
        assert said in refusal(capsys, word, CENTER)


def test_another_exercises_lost_function_is_named(workbook, capsys):
    command("start", CENTER)
    write(workbook, CENTER, "        pass\n")
    path = workbook / "loss.py"
    path.write_text(path.read_text().replace("def forward", "def forwards"))
    assert "has no DINOLoss.forward any more" in refusal(capsys, "check", CENTER)


def test_a_workbook_that_is_no_folder_and_a_record_that_is_none_are_one_line(workbook, capsys):
    workbook.write_text("")
    assert "workbook" in refusal(capsys, "start", CENTER)
    workbook.unlink()
    command("start", CENTER)
    (workbook / "progress.json").write_text("[]")
    assert "progress.json cannot be read" in refusal(capsys, "list")


def test_a_broken_file_does_not_stand_in_another_exercises_way(workbook, monkeypatch, capsys):
    """But a script that would run without what was written there is refused."""
    for number in (CENTER, TEACHER):
        command("start", number)
    (workbook / "loss.py").write_text("def (:\n")
    write(workbook, TEACHER, "    pass  # mine\n")

    def look(command, cwd, **output):
        assert (Path(cwd) / "loss.py").read_text() == LOSS, (
            "the reference takes the broken file's place"
        )
        assert "pass  # mine" in (Path(cwd) / "teacher.py").read_text(), (
            "the other file is the student's"
        )
        (Path(cwd) / exercises.REPORT).write_text('<testsuite><testcase name="a"/></testsuite>')
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(exercises.subprocess, "run", look)
    command("check", TEACHER)
    command("list")
    assert f"{CENTER}  broken " in capsys.readouterr().out
    assert "workbook/loss.py, line 1" in refusal(capsys, "run", "train.py")


def test_the_check_of_a_blank_is_one_friendly_line(workbook, capsys):
    command("start", CENTER)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        command("check", CENTER)
    line = find_function((workbook / "loss.py").read_text(), "DINOLoss.update_center").lineno
    assert ended.value.code == 1 and capsys.readouterr() == (
        "exercise 2: write DINOLoss.update_center in workbook/loss.py, "
        f"line {line}: it is still blank\n",
        "",
    )


def test_an_answer_above_the_blanks_left_over_error_is_tested(workbook):
    command("start", CENTER)
    source = (workbook / "loss.py").read_text()
    name = NUMBERED[CENTER].name
    assert attempts.is_blank(source, NUMBERED[CENTER])
    answered = with_body(source, name, "        return\n" + body_of(source, name))
    assert "raise NotImplementedError" in function_text(answered, name)
    assert not attempts.is_blank(answered, NUMBERED[CENTER])


REPORT = """
<testsuites><testsuite><testcase name="test_it_is_right"/>
<testcase name="test_eq_4_the_center[3-5]"><failure>tests/test_loss.py:177: in test_eq_4
    assert_close(center, wanted)
E   AssertionError: Eq. 4: one tenth is new
E   assert 3 == 5
E    +  where 3 = center()</failure></testcase>
<testcase name="test_eq_4_the_center[7-11]"><failure>
E   AssertionError: another case</failure></testcase>
<testcase name="test_it_ends"><failure>tests/test_loss.py:205: in test_it_ends
    loss.update_center(x)
loss.py:78: in update_center
    return 1 / 0
E   ZeroDivisionError: division by zero

During handling of the above exception, another exception occurred:
loss.py:79: in update_center
    y
E   NameError: name 'y' is not defined</failure></testcase>
<testcase name="tests.test_loss"><error message="collection failure">ImportError while importing
loss.py:3: in &lt;module&gt;
    import torhc
E   ModuleNotFoundError: No module named 'torhc'</error></testcase>
</testsuite></testsuites>"""


def test_a_failed_test_is_its_claim_its_own_words_and_the_students_line():
    failed = verdict.failed_tests(REPORT.strip(), "loss.py", {79: 61, 3: 3})
    assert {verdict.claim(test): lines for test, lines in failed.items()} == {
        "eq 4 the center": ["Eq. 4: one tenth is new"],
        "it ends": ["NameError: name 'y' is not defined", "raised in workbook/loss.py, line 61"],
        "the tests did not start": [
            "ModuleNotFoundError: No module named 'torhc'",
            "raised in workbook/loss.py, line 3",
        ],
    }


def test_the_students_line_is_named_where_the_error_ends_in_other_code():
    text = """
tests/test_head.py:9: in test_it
    head(x)
head.py:31: in forward
    x = F.normalize(x, dim=7)
/lib/torch/nn/functional.py:99: in normalize
    denom = input.norm(p, dim)
E   IndexError: Dimension out of range
"""
    assert verdict.message(text, "head.py", {31: 29}) == [
        "IndexError: Dimension out of range",
        "raised in workbook/head.py, line 29",
    ]
    assert verdict.message(text, "ahead.py", {31: 29}) == ["IndexError: Dimension out of range"]


def test_a_report_passes_only_if_a_test_did_and_none_failed():
    passed = '<testcase name="a"/>'
    skipped = '<testcase name="b"><skipped/></testcase>'
    for cases, want in {passed: True, passed + skipped: True, skipped: False, "": False}.items():
        assert verdict.all_passed(f"<testsuite>{cases}</testsuite>") == want, cases
    assert not verdict.all_passed(REPORT.strip())


def test_without_a_failed_test_pytests_own_last_lines_are_shown():
    output = "x\n\n!!!!! KeyboardInterrupt !!!!!\nloss.py:3: KeyboardInterrupt\n"
    assert verdict.last_words(output, "loss.py", {})[-2:] == [
        "!!!!! KeyboardInterrupt !!!!!",
        "loss.py:3: KeyboardInterrupt",
    ]
    assert "without a word" in verdict.last_words("", "loss.py", {})[0]


def test_a_line_of_the_copy_has_the_number_of_the_students_line():
    copied = "import a\n\ndef theirs():\n    1\n    2\n    3\n\ndef mine():\n    4\n"
    mine = "import a\n\ndef theirs():\n    raise E\n\ndef mine():\n    4\n"
    numbers = verdict.matching_lines(copied, mine)
    assert numbers[8] == 6 and numbers[9] == 7 and numbers[1] == 1
    assert not {4, 5, 6} & numbers.keys(), "the reference's lines are not the student's"


def test_the_page_has_the_ladder():
    rows = [f"| {number} | {one.title} | `{one.place}` |\n" for number, one in NUMBERED.items()]
    page = (REPO / "classroom/README.md").read_text()
    assert "|---|---|---|\n" + "".join(rows) in page, (
        "the page has another ladder than classroom/ladder.py"
    )


def test_the_page_changes_lines_that_are_there():
    page = (REPO / "classroom/README.md").read_text()
    removed = re.findall(r"^    -(.+)$", page, re.MULTILINE)
    code = [line.partition("  #")[0] for line in LOSS.splitlines()]
    assert removed and all(code.count(line) == 1 for line in removed), (
        "loss.py has no such lines any more"
    )
    ast.parse("\n".join(line for line in code if line not in removed))


def test_each_exercise_has_wrong_answers_and_tests_that_exist():
    assert WRONG.keys() == PLACES.keys()
    for one in NUMBERED.values():
        assert one.tests and len(WRONG[one.place]) >= 2, (
            f"{one.place} wants tests, and wrong answers that they catch"
        )
        for test in one.tests:
            file, _, name = test.partition("::")
            assert f"def {name.partition('[')[0]}(" in (REPO / "tests" / file).read_text(), (
                f"{test} is not there"
            )


def test_what_a_student_writes_in_a_file_of_the_top_is_what_training_calls():
    wings = {one.place for one in NUMBERED.values() if "/" in one.file}
    assert wings == {
        "ablations/variants.py:sinkhorn_knopp",
        "evals/video_segmentation.py:propagate",
    }


def answer(number: int, changes: list[tuple[str, str]] | str) -> str:
    """The file with a wrong answer: a whole body, or changes of the reference's function."""
    one = NUMBERED[number]
    source = reference_text(one)
    if isinstance(changes, str):
        return with_body(source, one.name, changes)
    text = function_text(source, one.name)
    for old, new in changes:
        assert text.count(old) == 1, (
            f"{one.place}: {old!r} stands {text.count(old)} times in the reference"
        )
        text = text.replace(old, new)
    return with_function(source, one.name, text)


@pytest.mark.parametrize("place", PLACES)
def test_each_wrong_answer_changes_text_that_is_there(place):
    for changes in WRONG[place].values():
        assert answer(PLACES[place], changes) != reference_text(NUMBERED[PLACES[place]])


class Failures:
    """What failed, and how pytest puts it: "AssertionError: words" only where an assertion has
    words of its own.
    """

    def __init__(self):
        self.messages: list[str] = []

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.messages.append(report.longrepr.reprcrash.message)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.messages.append(str(report.longrepr))


def outcome(folder: Path, arguments: list[str]) -> list[str]:
    """In a fresh process: run these tests of the copied sources -> the messages of those that
    failed.
    """
    os.chdir(folder)
    gc.freeze()  # pytest collects garbage, and need not look at what was loaded before
    failures = Failures()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        status = pytest.main(arguments, plugins=[failures])
    assert status in (0, 1), said.getvalue()
    return failures.messages


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[tuple[int, str], list[str]]:
    """(exercise, blank, reference or wrong answer) -> messages; each in a process of its own,
    forked where it can be.

    The processes begin with torch loaded, and with nothing of the project's own.
    """
    folder, found = tmp_path_factory.mktemp("exercises") / "copy", {}
    exercises.copy_sources(folder, set(), set())
    server = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if server else "spawn")
    if server:
        context.set_forkserver_preload(
            [
                "pytest",
                "torchvision",
                "torchvision.transforms.v2",
                "einops",
                "torch._dynamo",
                "matplotlib.figure",
            ]
        )
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        for number, one in NUMBERED.items():
            blanked = with_function(reference_text(one), one.name, exercises.blank(number))
            sources = {"blank": blanked, "reference": reference_text(one)}
            for name, changes in WRONG[one.place].items():
                sources[name] = answer(number, changes)
            for name, source in sources.items():
                (folder / one.file).write_text(source)
                for cache in (folder / one.file).parent.glob(
                    f"__pycache__/{Path(one.file).stem}.*"
                ):
                    # two versions of one second and one size would be taken for the same
                    cache.unlink()
                found[number, name] = pool.submit(
                    outcome, folder, exercises.pytest_arguments(one)
                ).result()
            shutil.copyfile(REPO / one.file, folder / one.file)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERED)
def test_an_exercises_tests_tell_blank_right_and_wrong_apart_in_words(outcomes, number):
    """A wrong answer fails by assertions with words of their own, never by a crash or by bare
    numbers alone.
    """
    assert outcomes[number, "reference"] == [], "the reference must pass its tests"
    blank = outcomes[number, "blank"]
    assert blank and all(f"exercise {number}: write" in message for message in blank), blank
    for name in WRONG[NUMBERED[number].place]:
        messages = outcomes[number, name]
        assert messages, f"{name}: passes, though it is wrong"
        for message in messages:
            first = message.splitlines()[0]
            assert first.startswith("AssertionError: ") and "not close" not in first, (
                f"{name}: does not teach: {first}"
            )


def in_process(workbook: Path, *flags: str) -> subprocess.CompletedProcess:
    """python -m classroom FLAGS, with this workbook."""
    script = (
        "import pathlib; from classroom import __main__ as exercises, workbook as attempts; "
        f"attempts.WORKBOOK = pathlib.Path({str(workbook)!r}); exercises.main()"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *flags], cwd=REPO, capture_output=True, text=True
    )


@pytest.mark.slow
def test_check_and_run_take_the_students_file_also_in_a_process_that_imports_it(workbook):
    """A check fails and then passes, which is kept; train.py, in a process of its own, meets what
    the file does.
    """
    schedules = PLACES["optimizer.py:cosine"]
    command("start", schedules)
    write(workbook, schedules, "    return start\n")
    wrong = in_process(workbook, "check", str(schedules))
    assert (
        wrong.returncode == 1
        and "step 50 must have 0.22" in wrong.stdout
        and "not yet" in wrong.stdout
    ), wrong
    for word in ("Traceback", "/tmp", "tests/", ".py:"):
        assert word not in wrong.stdout + wrong.stderr, wrong
    assert len(wrong.stdout.splitlines()) < 25, wrong.stdout
    assert exercises.state(schedules) == "begun"

    write(workbook, schedules, "    return start +\\\n        ends\n")
    crashed = in_process(workbook, "check", str(schedules))
    line = (workbook / "optimizer.py").read_text().splitlines().index("        ends") + 1
    assert "NameError: name 'ends' is not defined" in crashed.stdout, crashed
    assert f"raised in workbook/optimizer.py, line {line}" in crashed.stdout, crashed
    full = in_process(workbook, "check", str(schedules), "--full")
    assert full.returncode == 1 and "E   NameError: name 'ends'" in full.stdout, full

    write(workbook, schedules, body_of(reference_text(NUMBERED[schedules]), "cosine"))
    right = in_process(workbook, "check", str(schedules))
    assert right.returncode == 0 and exercises.state(schedules) == "passes", right
    (workbook / "optimizer.py").write_text(
        "raise SystemExit('mine')\n" + (workbook / "optimizer.py").read_text()
    )
    ran = in_process(workbook, "run", "-m", "bench")
    assert ran.returncode == 1 and ran.stderr.splitlines()[-1] == "mine", (
        "the current folder's modules came first"
    )
    script = workbook / "start_exercises.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(REPO)!r})\n"
        "import pathlib; from classroom import __main__ as exercises, workbook as attempts\n"
        f"attempts.WORKBOOK = pathlib.Path({str(workbook)!r})\nexercises.main()\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ran = subprocess.run(
        [*torchrun, str(script), "run", "train.py"], capture_output=True, text=True
    )
    assert "mine" in ran.stderr.splitlines(), (
        "what torchrun starts must meet the student's file too"
    )

    (workbook / "optimizer.py").write_text(
        "import os\nos._exit(0)\n" + (workbook / "optimizer.py").read_text()
    )
    quit_early = in_process(workbook, "check", str(schedules))
    assert quit_early.returncode == 1 and "ended without a word" in quit_early.stdout, quit_early


def test_grade_reports_each_exercise_of_each_workbook(tmp_path, monkeypatch, capsys):
    """One function right, one wrong, one blank and a file that is no Python; nobody's fault is
    another's."""
    monkeypatch.setattr(attempts, "WORKBOOK", tmp_path / "mine")
    few = {number: NUMBERED[number] for number in (CENTER, FORWARD, TEACHER)}
    monkeypatch.setattr(exercises, "NUMBERED", few)
    ran = []

    def tests_of(number, keep, folder, limit):
        """The reference's text passes, as it does in test_an_exercises_tests_tell_..."""
        exercises.copy_sources(folder, {few[number].file}, keep)
        name = few[number].name
        ran.append(number)
        copied = (folder / few[number].file).read_text()
        right = function_text(copied, name) == function_text(reference_text(few[number]), name)
        return right, "", ""

    monkeypatch.setattr(exercises, "run_tests", tests_of)
    ada, bob = tmp_path / "class" / "ada", tmp_path / "class" / "bob" / "workbook"
    ada.mkdir(parents=True)
    bob.mkdir(parents=True)
    wrong = with_body(LOSS, NUMBERED[FORWARD].name, "        return 0\n")
    (ada / "loss.py").write_text(wrong)
    (ada / "teacher.py").write_text("def update_teacher(:\n")
    blanked = with_function(LOSS, NUMBERED[CENTER].name, exercises.blank(CENTER))
    (bob / "loss.py").write_text(blanked)

    command("grade", "--json", tmp_path / "class")
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    passed = {(line["workbook"], line["exercise"]) for line in lines if line["passed"]}
    assert passed == {("ada", CENTER), ("bob", FORWARD)}
    why = {(line["workbook"], line["exercise"]): line["reason"] for line in lines}
    assert why["bob", CENTER] == "blank" and why["bob", FORWARD] == ""
    assert "workbook/teacher.py, line 1" in why["ada", TEACHER]
    assert len(lines) == 2 * len(few) and all(line["seconds"] >= 0 for line in lines)
    assert ran == [CENTER, FORWARD, FORWARD], "what is blank or broken needs no tests"
    command("grade", tmp_path / "class")
    assert capsys.readouterr().out.count("passes") == 2
    assert "no workbooks in" in refusal(capsys, "grade", tmp_path / "mine")


def test_the_ladder_begins_with_the_papers_loss():
    assert NUMBERED[1].place == "loss.py:DINOLoss.forward"


def test_the_other_commands_load_no_torch():
    """The race needs it; a list or a start is there at once."""
    script = "import sys; from classroom import __main__; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], cwd=REPO, check=True)
