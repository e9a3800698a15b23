"""What the tests of a check said, in a few lines for a student.

pytest writes its report as XML. The lines of a failed test that begin with E hold the message.
"""

import re
from difflib import SequenceMatcher
from xml.etree import ElementTree

from classroom.workbook import lines_of

MOST_LINES = 6  # of one message: its first ones say what is wrong


def failed_tests(report: str, file: str, numbers: dict[int, int]) -> dict[str, list[str]]:
    """Return the failed tests, and what the first failed case of each said.

    report: pytest's, as XML. file: the student's. numbers: of its lines, as matching_lines.
    """
    found = {}
    for case in ElementTree.fromstring(report).iter("testcase"):
        for part in [*case.findall("failure"), *case.findall("error")]:
            test = case.get("name", "").partition("[")[0]  # all cases of a test are one claim
            found.setdefault(test, message(part.text or "", file, numbers))
    return found


def all_passed(report: str) -> bool:
    """Return whether a test of pytest's report passed, and none failed."""
    outcomes = set()
    for case in ElementTree.fromstring(report).iter("testcase"):
        outcomes |= {part.tag for part in case} or {"passed"}
    return "passed" in outcomes and not outcomes & {"failure", "error"}


def last_words(output: str, file: str, numbers: dict[int, int]) -> list[str]:
    """Return what pytest printed last, where no failed test says what is wrong."""
    said = message(output, file, numbers)
    if not said:
        lines = [line.strip() for line in output.splitlines()]
        said = [line for line in lines if line][-MOST_LINES:]
    return said or ["Python ended without a word, as by sys.exit()"]


def message(text: str, file: str, numbers: dict[int, int]) -> list[str]:
    """Return the last message of pytest's text, and the last line of the student's behind it."""
    blocks = re.findall(r"(?:^E .*\n?)+", text, re.MULTILINE)
    lines = re.findall(r"^E +(.*)", "".join(blocks[-1:]), re.MULTILINE)
    said = []
    for line in lines[:MOST_LINES]:
        if said and line.startswith("assert "):  # how the numbers came about
            break
        said.append(line.removeprefix("AssertionError: "))

    places = re.findall(rf"^{re.escape(file)}:(\d+): ", text, re.MULTILINE)
    mine = [numbers[int(line)] for line in places if int(line) in numbers]
    if mine:  # the error may come from what this line calls, such as PyTorch
        said.append(f"raised in workbook/{file}, line {mine[-1]}")
    return said


def matching_lines(copied: str, mine: str) -> dict[int, int]:
    """Return the student's number of each line of the copy that the student's file has too.

    They differ, since the copy has the reference's functions in place of some.
    """
    matcher = SequenceMatcher(None, lines_of(copied), lines_of(mine), autojunk=False)
    numbers = {}
    for block in matcher.get_matching_blocks():
        for i in range(1, block.size + 1):
            numbers[block.a + i] = block.b + i
    return numbers


def claim(test: str) -> str:
    """Return a test's name as the sentence that it is."""
    if not test:
        return "the tests did not run to their end"
    if not test.startswith("test_"):
        return "the tests did not start"
    return test.removeprefix("test_").replace("_", " ")
