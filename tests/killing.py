"""Trainings that are made to die: children of a process that has loaded everything, so that a start
costs no seconds.

As a script it is the training of one of torchrun's processes, of which DEATHS says where which of
them dies.

A child dies by a signal from outside, or by one that it sends itself at the n-th call of a
function, in Python or in C, which its profiler counts: nothing of the product is changed for that.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
from pathlib import Path
from typing import NamedTuple

REPO = Path(__file__).parent.parent
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


class Death(NamedTuple):
    """A signal to oneself at the n-th call of a function of this name."""

    function: str
    n: int
    signal: int


def die_at(death: Death) -> None:
    """Count the calls of the function from now on, and send the signal at the n-th."""
    left = death.n

    def count(frame, event: str, called) -> None:
        nonlocal left
        names = ()
        if event == "call":
            names = (frame.f_code.co_name,)
        elif event == "c_call":  # os.replace is called posix.replace, since text has a replace, too
            names = (called.__name__, f"{getattr(called, '__module__', '')}.{called.__name__}")
        if death.function in names:
            left -= 1
            if not left:
                os.kill(os.getpid(), death.signal)

    sys.setprofile(count)


def live(flags: list[str], said: str, death: Death | None, environment: dict[str, str]) -> None:
    """A child's life: train with these flags, all that it says into a file."""
    import torch

    import train
    from runtime import hardware

    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method(
        "fork", force=True
    )  # of the loader's workers, as in a training of its own
    # last: a signal that comes before the training leaves nothing in the file
    file = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if death:
        die_at(death)
    try:
        train.main(flags)
    finally:
        hardware.end_workers()  # as at a script's end


def start(
    flags: list[str], said: Path, death: Death | None = None, **environment: str
) -> multiprocessing.Process:
    """Start a training with these flags."""
    os.environ["PYTHONPATH"] = str(REPO)  # the forked server's, which loads all modules once
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    child = context.Process(target=live, args=(flags, str(said), death, environment))
    child.start()
    return child


def status_of(child: multiprocessing.Process, seconds: float = 300) -> int:
    """Its exit status, a signal's number negative; an assertion fails if it outlives so many
    seconds.
    """
    child.join(seconds)
    alive = child.is_alive()
    if alive:
        child.kill()
        child.join()
    assert not alive, f"still there after {seconds} seconds: a hang"
    return child.exitcode


def start_ranks(
    flags: list[str], folder: Path, deaths: dict[int, Death], world_size: int = 2
) -> list[multiprocessing.Process]:
    """Start all processes of a run, as a launcher would; process r says what it says into the file
    said-r.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        start(
            flags,
            folder / f"said-{rank}",
            deaths.get(rank),
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            **shared,
        )
        for rank in range(world_size)
    ]


def train_until(flags: list[str], said: Path, seconds: float, number: int) -> int:
    """Train, send the signal after so many seconds if it is still there -> its exit status."""
    child = start(flags, said)
    child.join(seconds)
    if child.is_alive():
        os.kill(child.pid, number)
    return status_of(child)


if __name__ == "__main__":
    import train

    for restart, rank, *death in json.loads(os.environ["DEATHS"]):
        if [restart, rank] == [
            int(os.environ[name]) for name in ("TORCHELASTIC_RESTART_COUNT", "RANK")
        ]:
            die_at(Death(*death))
    train.main(sys.argv[1:])
