"""A bar on a terminal; in a file or a pipe a line, at most one a minute."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from tqdm import tqdm

from runtime.commandline import bar_style

REPO = Path(__file__).parent.parent

COUNT = """
import sys, time
from tqdm import tqdm
from runtime.commandline import bar_style

for leave in (True, False):
    with tqdm(total=30, desc="counting", leave=leave, **bar_style(float(sys.argv[1]))) as bar:
        for _ in range(30):
            time.sleep(0.02)
            bar.update()
"""


def test_in_a_pipe_each_state_is_a_line_and_none_comes_before_its_time():
    done = subprocess.run(
        [sys.executable, "-c", COUNT, "0.25"], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert "\r" not in done.stderr
    lines = done.stderr.splitlines()
    assert 2 <= len(lines) <= 6, lines
    assert all(line.startswith("counting ") and "/30 [" in line for line in lines), lines


def test_what_ends_within_a_minute_prints_no_line():
    done = subprocess.run(
        [sys.executable, "-c", COUNT, "60"], cwd=REPO, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_thread_of_tqdm_prints_a_line_earlier():
    """tqdm's monitor refreshes bars of more than one iteration a print after 10 seconds."""
    with tqdm(total=3, **bar_style(60)) as bar:
        assert bar.mininterval == bar.delay == 60
        assert bar.miniters == 1 and not bar.dynamic_miniters


def test_on_a_terminal_there_is_a_bar():
    pty = pytest.importorskip("pty", reason="Windows has no such terminals")
    termios = pytest.importorskip("termios")
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    counting = subprocess.Popen([sys.executable, "-c", COUNT, "60"], cwd=REPO, stderr=theirs)
    os.close(theirs)
    said = ""
    with suppress(OSError):  # Linux's end of a terminal
        while text := os.read(ours, 1000).decode():
            said += text
    os.close(ours)
    assert counting.wait() == 0
    assert said.count("\rcounting:") > 3 and "%|" in said
