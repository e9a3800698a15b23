"""A CPU's cores: how many the network's threads and the loader's workers take.

The threads of one operation wait for each other, and spin while they wait. One whose core another
program has taken holds up all. So beside one busy program a training on two threads of two cores
is several times slower than on one thread.
"""

import math
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

import torch

STAT = Path("/proc/stat")  # where Linux counts what each core has done
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # a container's: so much work in so much time


def own_cores() -> set[int]:
    """Return the cores that this process may run on: fewer than all in a Slurm job."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def quota() -> float:
    """Return how many cores' time a container may use; infinity without a limit."""
    try:
        limit, period = QUOTA.read_text().split()
        return int(limit) / int(period)
    except (OSError, ValueError):  # another system, or "max": no limit
        return math.inf


def core_count() -> int:
    """Return how many cores this process and those beside it can keep busy."""
    return max(1, int(min(len(own_cores()), quota())))


def may_choose() -> bool:
    """Return whether the number of threads is ours to choose, and not set by OMP_NUM_THREADS."""
    threads = os.environ.get("OMP_NUM_THREADS")
    several = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1
    set_by_torchrun = threads == "1" and several  # which nobody asked it to
    return threads is None or set_by_torchrun


def share_cores(wanted: int, device: torch.device, most: int = 10) -> int:
    """Divide this process's cores between loader and network; return the number of workers.

    wanted: that many; -1: one a core, at most `most`. A network on the CPU needs cores itself.
    Then -1 is one worker in four cores, and the network's threads get the other cores.
    """
    if wanted >= 0:
        return wanted
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = max(1, core_count() // processes)
    if device.type != "cpu":
        return min(most, cores)
    workers = min(most, cores // 4)
    if may_choose():
        torch.set_num_threads(cores - workers)
    return workers


def busy_seconds(stat: str, cores: set[int]) -> float:
    """Return how long these cores have worked, for all programs. stat: the text of STAT."""
    ticks = 0
    for line in stat.splitlines():
        name, *numbers = line.split()
        if not re.fullmatch(r"cpu\d+", name) or int(name.removeprefix("cpu")) not in cores:
            continue
        user, nice, system, _idle, _waiting, irq, softirq, stolen = map(int, numbers[:8])
        ticks += user + nice + system + irq + softirq + stolen
    return ticks / os.sysconf("SC_CLK_TCK")


class Look(NamedTuple):
    """What was spent up to a moment, in seconds: by the clock, by all programs, by this process."""

    clock: float
    everyone: float
    own: float


def look(cores: set[int]) -> Look:
    """Return what was spent up to now, on these cores."""
    return Look(time.monotonic(), busy_seconds(STAT.read_text(), cores), time.process_time())


def free_cores(before: Look, after: Look, cores: int) -> int:
    """Return how many of the cores other programs left free between two looks, 1 at least."""
    everyone = after.everyone - before.everyone
    own = after.own - before.own
    others = (everyone - own) / (after.clock - before.clock)
    return max(1, round(cores - others))


class FreeCores:
    """Keeps a network on the CPU to the cores that other programs leave free.

    Does nothing on other devices, on other systems than Linux, and where OMP_NUM_THREADS is set, as
    torchrun sets it for several processes. Nor beside a loader's workers, which would look like
    another program, and for compiled code, which would be compiled anew.
    """

    def __init__(self, device: torch.device, workers: int = 0, compiled: bool = False):
        self.cores = own_cores()
        self.most = min(torch.get_num_threads(), core_count())
        self.chooses = (
            device.type == "cpu"
            and self.most > 1
            and "OMP_NUM_THREADS" not in os.environ
            and STAT.exists()
            and not workers
            and not compiled
        )
        if self.chooses:
            self.last = look(self.cores)

    def take(self) -> None:
        """Set the number of threads, once a second, by what happened since the last time."""
        if not self.chooses or time.monotonic() < self.last.clock + 1:
            return
        now = look(self.cores)
        free = free_cores(self.last, now, len(self.cores))
        torch.set_num_threads(min(self.most, free))
        self.last = now
