"""How a process's cores are divided between its network and its loader."""

import os

import torch


def share_cores(wanted: int, device: torch.device, most: int = 10) -> int:
    """Divide this process's cores between loader and network; return the number of workers.

    wanted: that many; -1: one a core, at most `most`. A network on the CPU needs cores itself.
    Then -1 is one worker in four cores, and the network's threads get the other cores.
    """
    if wanted >= 0:
        return wanted
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))  # fewer in a container or a Slurm job
    cores = max(1, cores // processes)
    if device.type != "cpu":
        return min(most, cores)

    workers = min(most, cores // 4)
    threads = os.environ.get("OMP_NUM_THREADS")
    set_by_torchrun = threads == "1" and processes > 1  # which nobody asked it to
    if threads is None or set_by_torchrun:
        torch.set_num_threads(cores - workers)
    return workers
