"""Killed at any moment: the same command goes on, and ends bit for bit where an undisturbed run
ends.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from killing import REPO, SIGNALS, Death, start, status_of, train_until
from PIL import Image
from test_runs import STATE, TINY, equal

from training.checkpoint import read_checkpoint

pytestmark = [pytest.mark.faults, pytest.mark.slow]
CALLS = {  # what a run of these three epochs calls, by place, and about how often
    "train_step": 18,
    "backward": 18,
    "update_teacher": 18,
    "extract_features": 8,
    "knn_votes": 8,
    "write_record": 2500,
    "posix.replace": 15,
    "write_text": 7,
    "load_strictly": 3,
    "savefig": 2,
}


def write_hard_photos(folder: Path) -> Path:
    """24 images in two classes that differ little, and 20 to evaluate on, so that k-NN is neither 0
    nor 100 %.
    """
    rng = np.random.default_rng(2)
    for i in range(44):
        path = (
            folder
            / ("train" if i < 24 else "val")
            / ("dark" if i % 2 else "bright")
            / f"{i:02d}.png"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 100, (40, 50, 3)) + rng.integers(0, 60, 3) + (0 if i % 2 else 10)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_hard_photos(tmp_path_factory.mktemp("photos"))


def command(photos: Path, output: Path) -> list[str]:
    learning = ["--lr", "0.03", "--momentum_teacher", "0.9"]  # so that k-NN moves
    return [*TINY, *learning, "--data_path", str(photos), "--output_dir", str(output)]


def train_undisturbed(photos: Path, folder: Path) -> Path:
    """A run that nothing happens to -> its folder."""
    assert status_of(start(command(photos, folder / "run"), folder / "said")) == 0, (
        folder / "said"
    ).read_text()
    return folder / "run"


@pytest.fixture(scope="module")
def undisturbed(photos, tmp_path_factory) -> Path:
    return train_undisturbed(photos, tmp_path_factory.mktemp("undisturbed"))


def log_lines(output: Path) -> list[dict]:
    """log.txt without the clock; an assertion fails where a line is torn, missing or repeated."""
    text = (output / "log.txt").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    assert text.endswith("\n") and [one["epoch"] for one in records] == list(
        range(-1, len(records) - 1)
    ), text
    return [{key: value for key, value in one.items() if key != "images_per_s"} for one in records]


def assert_whole(output: Path) -> None:
    """Whatever is there under its own name can be read."""
    for file in output.glob("[!.]*.pth"):
        read_checkpoint(file)
    if (output / "log.txt").exists():
        log_lines(output)


def assert_same(output: Path, undisturbed: Path) -> None:
    """The same files, weights, center, optimiser and log."""
    assert sorted(os.listdir(output)) == sorted(os.listdir(undisturbed)), (
        "the same files, and no part of one"
    )
    for name in ("checkpoint.pth", "checkpoint0002.pth"):
        found, wanted = read_checkpoint(output / name), read_checkpoint(undisturbed / name)
        for part in STATE:
            assert equal(found[part], wanted[part]), f"{part} of {name} differs"
    assert log_lines(output) == log_lines(undisturbed), (
        "the log's numbers and k-NN must be those of one run"
    )


def test_the_undisturbed_run_has_something_to_lose(undisturbed):
    """Its k-NN moves through training, so that equal figures say something."""
    for network in ("knn_teacher", "knn_student"):
        figures = {one[network] for one in log_lines(undisturbed) if network in one}
        assert len(figures) > 1, f"{network} is {figures} all the time"


@pytest.mark.parametrize("seed", range(5))
def test_ten_kills_at_random_moments_change_nothing(seed, photos, undisturbed, tmp_path):
    """By SIGKILL, SIGTERM or SIGINT, at a random time or at a random call; a run that ends is
    compared, and the next begins.
    """
    rng, kills, runs = random.Random(seed), [], 0
    while len(kills) < 10 or not (tmp_path / str(runs) / "done").exists():
        output, number = tmp_path / str(runs) / "run", rng.choice(SIGNALS)
        (tmp_path / str(runs)).mkdir(exist_ok=True)
        flags, said = command(photos, output), tmp_path / str(runs) / "said"
        before = said.read_text() if said.exists() else ""
        if len(kills) >= 10:  # let it end
            status, death = status_of(start(flags, said)), "none"
        elif rng.random() < 0.4:
            death = f"{rng.uniform(0, 1):.2f} s"
            status = train_until(flags, said, float(death.split()[0]), number)
        else:
            function = rng.choice(list(CALLS))
            death = Death(function, rng.randint(1, 1 + CALLS[function] // 8), number)
            status = status_of(start(flags, said, death))
        text = said.read_text() if said.exists() else ""
        unborn = (
            status == 1 and number == signal.SIGINT and text == before
        )  # the child was not yet at its first line
        assert unborn or status in (0, -signal.SIGKILL, -signal.SIGTERM, 130, 143), (
            f"{death}: {text}"
        )
        assert "Traceback" not in text.replace(
            "Traceback (most recent call last):\nKeyboardInterrupt", ""
        )
        assert_whole(output)
        if status == 0:
            assert_same(output, undisturbed)
            (tmp_path / str(runs) / "done").touch()
            runs += len(kills) < 10
        else:
            kills.append(death)
    print(f"{len(kills)} kills of {runs + 1} runs: {kills}")


@pytest.mark.parametrize("number", SIGNALS)
def test_kills_inside_a_checkpoints_write_and_an_evaluation_lose_neither(
    number, photos, undisturbed, tmp_path
):
    """While k-NN votes; with the second checkpoint half written; with one written but not yet
    renamed.

    Only a signal in the last epoch's end comes too late to stop the run.
    """
    flags = command(photos, tmp_path / "run")
    for call, n in (("knn_votes", 3), ("write_record", 300), ("posix.replace", 4)):
        status = status_of(start(flags, tmp_path / "said", Death(call, n, number)))
        stopped = {128 + number} | ({0} if "replace" in call else set())
        expected = {-number} if number == signal.SIGKILL else stopped
        assert status in expected, f"{call}: {(tmp_path / 'said').read_text()}"
        if number == signal.SIGKILL and call != "knn_votes":
            assert list((tmp_path / "run").glob(".*.part.*")), (
                "it was to die with a file unfinished"
            )
        assert_whole(tmp_path / "run")
    assert status_of(start(flags, tmp_path / "said")) == 0, (tmp_path / "said").read_text()
    assert_same(tmp_path / "run", undisturbed)


def processes_of(command: list[str]) -> list[str]:
    """Those that this command or its loader started: zombies have no command line."""
    return [
        path.parent.name
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if path.exists() and command[-1].encode() in path.read_bytes()
    ]


def test_the_command_itself_killed_twice_goes_on_and_leaves_no_process_behind(
    photos, undisturbed, tmp_path
):
    """With a loader's worker, which must not outlive it."""
    flags = [*command(photos, tmp_path / "run"), "--num_workers", "1"]
    flags = [sys.executable, "train.py", *flags, "--output_dir", str(tmp_path / "run")]
    one_thread = os.environ | {
        "OMP_NUM_THREADS": "1"
    }  # as the undisturbed run: more threads sum in another order
    for lines in (1, 3):
        process = subprocess.Popen(
            flags, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=one_thread
        )
        while not (tmp_path / "run/log.txt").exists() or len(log_lines(tmp_path / "run")) < lines:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.02)
        process.kill()
        process.wait()
        assert_whole(tmp_path / "run")
    deadline = time.monotonic() + 30
    while processes_of(flags):
        assert time.monotonic() < deadline, "the loader's workers outlive the training"
        time.sleep(0.5)
    subprocess.run(flags, cwd=REPO, check=True, capture_output=True, env=one_thread)
    assert_same(tmp_path / "run", undisturbed)
