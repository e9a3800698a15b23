"""Several hosts, as network namespaces with names and addresses of their own: each gets
docs/running.md's command.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from killing import REPO
from test_faults_kills import command, log_lines, write_hard_photos
from test_faults_processes import NEW_STORE
from test_runs import STATE, equal

from training.checkpoint import read_checkpoint

pytestmark = [pytest.mark.faults, pytest.mark.slow]
NAMES = ("host1", "host2")
TORCHRUN = (
    "-m torch.distributed.run --nnodes=2 --nproc_per_node={processes} --rdzv_backend=c10d "
    "--rdzv_endpoint=host1:29500 --max-restarts=3 train.py"
)


def ip(*words: str) -> None:
    subprocess.run(["ip", *" ".join(words).split()], check=True, capture_output=True)


def space(host: str) -> str:
    """The namespace of a host of these tests alone."""
    return f"{host}-{os.getpid()}"


@pytest.fixture
def hosts(tmp_path) -> Iterator[Path]:
    """Two namespaces joined by a cable -> the file of their names and addresses."""
    names = tmp_path / "hosts"
    names.write_text("127.0.0.1 localhost\n10.77.0.1 host1\n10.77.0.2 host2\n")
    try:
        ip(f"netns add {space('host1')}")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only the superuser can make network namespaces, with iproute2's ip")
    try:
        ip(f"netns add {space('host2')}")
        ip(f"link add eth1 netns {space('host1')} type veth peer name eth1 netns {space('host2')}")
        for number, name in enumerate(NAMES, start=1):
            ip(f"-n {space(name)} link set lo up")
            ip(f"-n {space(name)} addr add 10.77.0.{number}/24 dev eth1")
            ip(f"-n {space(name)} link set eth1 up")
        yield names
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", space(name)], capture_output=True)


def launch(
    name: str, names: Path, flags: list[str], said: Path, processes: int = 1
) -> subprocess.Popen:
    """The command of docs/running.md on a host, with its own name, address and file of names."""
    inside = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
    torchrun = [sys.executable, *TORCHRUN.format(processes=processes).split()]
    with open(said, "a") as file:
        return subprocess.Popen(
            [
                "ip",
                "netns",
                "exec",
                space(name),
                "unshare",
                "--uts",
                "--mount",
                "sh",
                "-c",
                inside,
                name,
                str(names),
                *torchrun,
                *flags,
            ],
            cwd=REPO,
            stdout=file,
            stderr=file,
            env=os.environ | NEW_STORE | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


def wait_for_epoch(output: Path, epochs: int, seconds: float = 600) -> None:
    """Until the log has so many epochs."""
    deadline = time.monotonic() + seconds
    while not (output / "log.txt").exists() or len(log_lines(output)) <= epochs:
        assert time.monotonic() < deadline, "it does not train"
        time.sleep(0.1)


def end(*processes: subprocess.Popen) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_the_command_of_the_docs_is_the_one_that_is_tried():
    """But for the restarts, which its text adds."""
    tried = TORCHRUN.format(processes=8).replace("--max-restarts=3 ", "")
    assert (
        tried.replace("-m torch.distributed.run", "torchrun")
        in (REPO / "docs/running.md").read_text()
    )


def test_two_hosts_of_two_processes_are_one_host_of_four(hosts, tmp_path):
    """Which process sits where is nothing to the numbers: equal bit for bit."""
    photos = write_hard_photos(tmp_path / "photos")
    flags = lambda name: [
        *command(photos, tmp_path / name),
        "--batch_size_per_gpu",
        "1",
        "--epochs",
        "2",
    ]
    both = [launch(name, hosts, flags("joined"), tmp_path / name, processes=2) for name in NAMES]
    try:
        assert [process.wait(600) for process in both] == [0, 0], (tmp_path / "host1").read_text()
    finally:
        end(*both)
    alone = [
        sys.executable,
        *"-m torch.distributed.run --standalone --nproc_per_node=4 train.py".split(),
    ]
    subprocess.run(
        [*alone, *flags("alone")],
        cwd=REPO,
        check=True,
        capture_output=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    found, wanted = (
        read_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("joined", "alone")
    )
    for part in STATE:
        assert equal(found[part], wanted[part]), f"{part} differs"


def test_a_host_that_is_cut_off_ends_the_other_with_a_line_and_a_late_one_joins_the_restart(
    hosts, tmp_path
):
    """The cable is pulled: no connection is closed, and only patience ends the wait. Later the host
    comes back.

    The second host, which has lost the one that holds the rendezvous, says the same line.
    """
    photos = write_hard_photos(tmp_path / "photos")
    flags = [
        *command(photos, tmp_path / "run"),
        "--batch_size_per_gpu",
        "2",
        "--epochs",
        "60",
        "--knn_every",
        "0",
        "--saveckp_freq",
        "0",
        "--patience",
        "0.25",
    ]
    first, second = (launch(name, hosts, flags, tmp_path / name) for name in NAMES)
    late = None
    try:
        wait_for_epoch(tmp_path / "run", 3)
        ip(f"-n {space('host2')} link set eth1 down")
        began = time.monotonic()
        for name in NAMES:
            while "error: another process of this run is lost" not in (tmp_path / name).read_text():
                assert time.monotonic() - began < 120, (tmp_path / name).read_text()
                time.sleep(0.1)
            print(f"the line of {name} came {time.monotonic() - began:.0f} s after the cut")
        end(second)
        ip(f"-n {space('host2')} link set eth1 up")
        before = len(log_lines(tmp_path / "run"))
        late = launch("host2", hosts, flags, tmp_path / "late")
        wait_for_epoch(tmp_path / "run", before + 2)
        print(f"two more epochs {time.monotonic() - began:.0f} s after the cut")
        assert "continuing" in (tmp_path / "host1").read_text() + (tmp_path / "late").read_text()
    finally:
        end(first, second, *([late] if late else []))
