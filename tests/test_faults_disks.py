"""Disks that are full or read-only, images that vanish, a loader's worker that is killed: one line,
nothing lost.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from killing import REPO, Death, start, status_of
from test_faults_kills import (
    assert_same,
    assert_whole,
    command,
    train_undisturbed,
    write_hard_photos,
)

import eval_knn
from training.checkpoint import read_checkpoint

pytestmark = [pytest.mark.faults, pytest.mark.slow]


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_hard_photos(tmp_path / "photos")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    return train_undisturbed(write_hard_photos(folder / "photos"), folder)


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A file system of 4 MB, which `mount -o remount` may make larger or read-only."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("only the superuser can mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def error_line(said: Path) -> str:
    """The last line, an error's; an assertion fails on a traceback."""
    text = said.read_text()
    assert "Traceback" not in text, text
    line = text.strip().splitlines()[-1]
    assert line.startswith("error: "), text
    return line


def test_a_full_disk_is_one_line_and_a_larger_one_goes_on_from_the_last_checkpoint(
    photos, undisturbed, disk, tmp_path
):
    """Full at the first checkpoint (of 13 MB); then, with room for one, at the second; then there
    is room for all.
    """
    flags, said = command(photos, disk / "run"), tmp_path / "said"
    for size, there in (
        ("4m", {".lock", "log.txt"}),
        ("20m", {".lock", "log.txt", "checkpoint.pth"}),
    ):
        remount(disk, f"size={size}")
        assert status_of(start(flags, said)) == 2
        assert "cannot write" in error_line(said) and "free some space" in error_line(said)
        assert set(os.listdir(disk / "run")) == there, "a part of a file takes room that is wanted"
        assert_whole(disk / "run")
    assert read_checkpoint(disk / "run/checkpoint.pth")["epoch"] == 0
    remount(disk, "size=200m")
    assert status_of(start(flags, said)) == 0, said.read_text()
    assert_same(disk / "run", undisturbed)


def test_a_disk_that_becomes_read_only_is_one_line(photos, undisturbed, disk, tmp_path, capsys):
    """At the start of a run, and of one that goes on; an evaluation's results too."""
    flags, said = command(photos, disk / "run"), tmp_path / "said"
    remount(disk, "size=99m,ro")
    assert status_of(start(flags, said)) == 2 and "cannot write" in error_line(said)
    remount(disk, "rw")
    assert status_of(start(flags, said, Death("train_step", 14, signal.SIGKILL))) == -signal.SIGKILL
    remount(disk, "ro")
    assert status_of(start(flags, said)) == 2 and "cannot write" in error_line(said)
    with pytest.raises(SystemExit) as stopped:
        eval_knn.main(
            [
                "--pretrained_weights",
                str(disk / "run/checkpoint.pth"),
                "--data_path",
                str(photos),
                "--device",
                "cpu",
                "--num_workers",
                "0",
                "--results",
                str(disk / "results.jsonl"),
            ]
        )
    assert stopped.value.code == 2 and "cannot append" in capsys.readouterr().err
    assert_whole(disk / "run")
    remount(disk, "rw")
    assert status_of(start(flags, said)) == 0, said.read_text()
    assert_same(disk / "run", undisturbed)


@pytest.mark.parametrize(
    ("harm", "workers"), [("lost", "0"), ("lost", "1"), ("broken", "1"), ("a pipe", "0")]
)
def test_a_image_that_is_lost_or_breaks_during_the_run_is_named(
    harm, workers, photos, undisturbed, tmp_path
):
    """In the second epoch. Once it is back the run goes on, and ends as if nothing had been."""
    flags, said = [*command(photos, tmp_path / "run"), "--num_workers", workers], tmp_path / "said"
    assert (
        status_of(start(flags, said, Death("train_step", 9, signal.SIGTERM)))
        == 128 + signal.SIGTERM
    )
    victim = photos / "train/dark/03.png"
    whole = victim.read_bytes()
    child = start(
        [*flags, "--epochs", "3"], said, Death("start_run", 1, signal.SIGSTOP)
    )  # its list is made by now
    wait_until_stopped(child.pid)
    victim.unlink()
    if harm == "broken":
        victim.write_bytes(whole[: len(whole) // 2])
    elif harm == "a pipe":
        os.mkfifo(victim)
    os.kill(child.pid, signal.SIGCONT)
    assert status_of(child) == 2
    assert "03.png" in error_line(said)
    assert_whole(tmp_path / "run")
    victim.unlink(missing_ok=True)
    victim.write_bytes(whole)
    assert status_of(start(flags, said)) == 0, said.read_text()
    assert_same(tmp_path / "run", undisturbed)


def test_a_script_that_a_worker_ends_by_its_error_does_not_wait_for_that_worker(photos, tmp_path):
    """The error's frames hold the loader, whose workers leave SIGTERM to training: Python by itself
    would wait.
    """
    (photos / "train/dark/03.png").write_bytes(b"torn")
    flags = [*command(photos, tmp_path / "run"), "--num_workers", "1", "--knn_every", "0"]
    done = subprocess.run(
        [sys.executable, REPO / "train.py", *flags], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and "03.png" in done.stderr.splitlines()[-1], done.stderr


def wait_until_stopped(pid: int) -> None:
    """Until it stands still; an assertion fails if it ends, or goes on for a minute."""
    for _ in range(1200):
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        if state == "T":
            return
        assert state != "Z", "it ended before it was to be stopped"
        time.sleep(0.05)
    raise AssertionError("it goes on")


@pytest.mark.parametrize("stands_still", [0, 3])
def test_a_loaders_worker_that_is_killed_is_one_line_and_the_run_goes_on(
    stands_still, photos, undisturbed, tmp_path
):
    """As when memory is full, which takes the largest process; at once, or when training has long
    waited for it.
    """
    flags, said = [*command(photos, tmp_path / "run"), "--num_workers", "2"], tmp_path / "said"
    child = start(flags, said, Death("train_step", 8, signal.SIGSTOP))
    wait_until_stopped(child.pid)
    workers = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    assert len(workers) == 2
    if stands_still:
        os.kill(int(workers[1]), signal.SIGSTOP)
        os.kill(child.pid, signal.SIGCONT)
        time.sleep(stands_still)
        assert child.is_alive(), "a slow worker is waited for"
    os.kill(int(workers[1]), signal.SIGKILL)
    os.kill(child.pid, signal.SIGCONT)
    assert status_of(child) == 2
    assert "a process of the loader was killed" in error_line(
        said
    ) and "--num_workers" in error_line(said)
    assert_whole(tmp_path / "run")
    assert status_of(start(flags, said)) == 0, said.read_text()
    assert_same(tmp_path / "run", undisturbed)
