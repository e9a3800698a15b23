"""One of two processes is killed or stands still: the other says so and ends, and the same command
goes on.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killing import REPO, Death, start_ranks, status_of
from test_faults_kills import assert_same, assert_whole, command, write_hard_photos

from training.checkpoint import read_checkpoint

pytestmark = [pytest.mark.faults, pytest.mark.slow]
PATIENCE = 0.1  # minutes
# else torchrun keeps one store through all restarts,
# and new processes may read from it where the old ones listened
NEW_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_hard_photos(tmp_path_factory.mktemp("photos"))


def flags_of_two(photos: Path, output: Path) -> list[str]:
    return [*command(photos, output), "--batch_size_per_gpu", "2", "--patience", str(PATIENCE)]


def finish_both(flags: list[str], folder: Path) -> None:
    assert [status_of(child) for child in start_ranks(flags, folder, {})] == [0, 0], (
        folder / "said-0"
    ).read_text()


@pytest.fixture(scope="module")
def undisturbed(photos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    finish_both(flags_of_two(photos, folder / "run"), folder)
    return folder / "run"


def last_line(file: Path) -> str:
    return file.read_text().strip().splitlines()[-1]


def assert_ends_with_a_line(child, file: Path) -> float:
    """The process whose peer is gone ends within a minute, with one line -> the seconds it took."""
    began = time.monotonic()
    assert status_of(child, 60) == 2, file.read_text()
    assert "error: another process of this run is lost" in last_line(file), file.read_text()
    assert "Traceback" not in file.read_text()
    return time.monotonic() - began


def test_when_a_process_is_killed_the_other_ends_with_a_line_and_the_run_goes_on(
    photos, undisturbed, tmp_path
):
    """In a step, in the exchange of gradients, in an evaluation, and in a checkpoint's write, one
    after the other.
    """
    flags = flags_of_two(photos, tmp_path / "run")
    for victim, call, n in (
        (1, "train_step", 3),
        (0, "knn_votes", 3),
        (0, "write_record", 300),
        (1, "backward", 4),
    ):
        ranks = start_ranks(flags, tmp_path, {victim: Death(call, n, signal.SIGKILL)})
        assert status_of(ranks[victim]) == -signal.SIGKILL, (
            tmp_path / f"said-{victim}"
        ).read_text()
        seconds = assert_ends_with_a_line(ranks[1 - victim], tmp_path / f"said-{1 - victim}")
        print(f"process {victim} killed in {call}: the other ended {seconds:.1f} s later")
        assert_whole(tmp_path / "run")
    finish_both(flags, tmp_path)
    assert_same(tmp_path / "run", undisturbed)


def test_a_process_that_stands_still_is_given_up_after_the_patience(photos, undisturbed, tmp_path):
    """Its connections stay open, so that only the clock tells."""
    flags = flags_of_two(photos, tmp_path / "run")
    ranks = start_ranks(flags, tmp_path, {1: Death("train_step", 9, signal.SIGSTOP)})
    seconds = assert_ends_with_a_line(ranks[0], tmp_path / "said-0")
    os.kill(ranks[1].pid, signal.SIGKILL)
    ranks[1].join()
    print(f"the other ended after {seconds:.1f} s")
    finish_both(flags, tmp_path)
    assert_same(tmp_path / "run", undisturbed)


def test_a_signal_to_one_process_stops_both_after_the_same_step(photos, undisturbed, tmp_path):
    flags = flags_of_two(photos, tmp_path / "run")
    ranks = start_ranks(flags, tmp_path, {1: Death("train_step", 8, signal.SIGTERM)})
    assert [status_of(child) for child in ranks] == [128 + signal.SIGTERM] * 2
    assert "the same command continues there" in (tmp_path / "said-0").read_text()
    saved = read_checkpoint(tmp_path / "run/checkpoint.pth")
    assert (saved["epoch"], saved["images_done"]) == (1, 2 * 4), (
        "eight steps were made, of six an epoch: none is lost"
    )
    finish_both(flags, tmp_path)
    assert_same(tmp_path / "run", undisturbed)


def test_torchrun_restarts_a_run_whose_process_was_killed_and_it_ends_the_same(
    photos, undisturbed, tmp_path
):
    """Twice: the first time it loses process 1, the second time process 0, which keeps the
    checkpoints.
    """
    torchrun = [
        sys.executable,
        *"-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=3".split(),
    ]
    deaths = [[0, 1, "train_step", 10, signal.SIGKILL], [1, 0, "write_record", 300, signal.SIGKILL]]
    environment = (
        os.environ
        | NEW_STORE
        | {"DEATHS": json.dumps(deaths), "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    )
    began = time.monotonic()
    ended = subprocess.run(
        [*torchrun, "tests/killing.py", *flags_of_two(photos, tmp_path / "run"), "--patience", "1"],
        cwd=REPO,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stdout
    assert (
        ended.stdout.count("continuing") == 2
        and "error: another process of this run is lost" in ended.stdout
    )
    print(f"{time.monotonic() - began:.0f} s with two restarts")
    assert_same(tmp_path / "run", undisturbed)
