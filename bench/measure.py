"""Time and memory: how the bench measures them. Work is counted in runtime/flops.py.

Time is the wall clock's, the device's queue included.
Memory on a GPU is the most that PyTorch's tensors held. On a CPU it is the largest resident size of
the process, so only a fresh process shows the memory of one network.
"""

import multiprocessing
import platform
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from runtime.commandline import InputError, brief
from runtime.hardware import World


class FullMemory(InputError):
    """The memory does not suffice; the message names the flag to lower."""


def now(device: torch.device) -> float:
    """Return the clock's seconds, after all that the device was given to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def seconds(work: Callable, device: torch.device) -> float:
    """Return the time of one call."""
    began = now(device)
    work()
    return now(device) - began


def in_turn(
    works: list[Callable], most: int, budget: float, device: torch.device
) -> list[list[float]]:
    """Call all works once, unmeasured, then in turns; return the seconds of each, turn by turn.

    There are at most `most` turns. After two of them, none begins later than `budget` seconds.
    """
    for work in works:
        work()

    turns = []
    began = time.perf_counter()
    while len(turns) < most:
        if len(turns) >= 2 and time.perf_counter() - began > budget:
            break
        # every second turn goes backwards: a machine that grows slower favours neither
        backwards = len(turns) % 2 == 1
        order = works[::-1] if backwards else works
        times = [seconds(work, device) for work in order]
        if backwards:
            times.reverse()
        turns.append(times)
    return turns


def square_matmul(device: torch.device, dtype: torch.dtype) -> tuple[Callable, int]:
    """Return a product of large square matrices, to be timed, and its operations."""
    largest = 2048 if device.type == "cpu" else 8192
    n = 256
    while True:
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        work = partial(torch.matmul, a, b)
        work()  # the first call is slower
        if n == largest or seconds(work, device) > 0.05:  # large enough for a slow device
            return work, 2 * n**3
        n *= 2


def peak_mib(device: torch.device) -> float | None:
    """Return the most memory held so far, in MiB; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")  # of Linux
    if device.type != "cpu" or not status.exists():
        return None
    kib = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
    return int(kib[1]) / 2**10 if kib else None


def in_fresh_process(work: Callable, *args):
    """Return work(*args), computed in a new process; raise MemoryError if that is killed."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the new process may need what this one has kept
    spawn = multiprocessing.get_context("spawn")
    with memory_errors(), ProcessPoolExecutor(1, spawn) as pool:
        try:
            return pool.submit(work, *args).result()
        except BrokenProcessPool:
            raise MemoryError("the process was killed") from None


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn PyTorch's several errors about full memory into MemoryError."""
    try:
        yield
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        raise MemoryError(brief(error)) from None


@contextmanager
def full_memory_in_one_line(flag: str = "--batch_size") -> Iterator[None]:
    """Turn a MemoryError into a FullMemory that names the flag to lower."""
    try:
        with memory_errors():
            yield
    except MemoryError as error:
        raise FullMemory(
            f"the memory does not suffice ({brief(error)}): lower {flag}"
        ) from None


def machine(world: World) -> dict[str, str]:
    """Return what the numbers belong to: device, its name, the type of numbers, torch's version."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = re.search(r"model name\s+: (.*)", info.read_text())
        name = model[1] if model else name
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name()
    return {
        "device": world.device.type,
        "name": name,
        "dtype": str(world.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }
