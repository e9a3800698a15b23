"""Time, work and memory: how the benches measure them.

Time is the wall clock's, the device's queue included. Work is what torch.utils.flop_counter sees: products of
matrices and convolutions, one multiplication and one addition being two. Memory on a GPU is what PyTorch's allocator
held at most; elsewhere it is the process's largest resident size, which only a fresh process can tell of one network.
"""
import multiprocessing
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from runtime.commandline import InputError, brief
from runtime.hardware import World


def now(device: torch.device) -> float:
    """Seconds of a clock that waits for all that the device was given to do."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def seconds(work: Callable, device: torch.device) -> float:
    """The time of one call."""
    began = now(device)
    work()
    return now(device) - began


def turns(most: int, budget: float) -> Iterator[int]:
    """0, 1 ... below `most`, but after two of them no more once they took `budget` seconds."""
    began = time.perf_counter()
    for turn in range(most):
        if turn >= 2 and time.perf_counter() - began > budget:
            return
        yield turn


def in_turn(works: list[Callable], most: int, budget: float, device: torch.device) -> list[list[float]]:
    """After a warm-up, call all forwards, backwards, forwards ... -> seconds of each work in each turn.

    So a machine that grows slower all the while does not favour the first of them.
    """
    for work in works:
        work()
    found = []
    for turn in turns(most, budget):
        order = 1 - 2 * (turn % 2)
        found.append([seconds(work, device) for work in works[::order]][::order])
    return found


def flops(work: Callable) -> int:
    """The operations of one call, as the formulas have them: fused attention is counted as its two products."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def square_matmul(device: torch.device, dtype: torch.dtype) -> tuple[Callable, int]:
    """A product of large square matrices, to be timed, and its operations; smaller where a device is slow at them."""
    n, largest = 256, 2048 if device.type == "cpu" else 8192
    while True:
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        work = lambda a=a, b=b: a @ b
        work()
        if n == largest or seconds(work, device) > 0.05:
            return work, 2 * n ** 3
        n *= 2


def peak_mib(device: torch.device) -> float | None:
    """The most memory held so far, in MiB, by tensors on a GPU or by this process; None where that is not told."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 20
    if device.type != "cpu":
        return None
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) / 2 ** 10  # Linux: what getrusage tells begins with the parent's own peak
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


def in_fresh_process(work: Callable, *args):
    """work(*args) in a process that has done nothing before; raises MemoryError if it does not survive that."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the new process may need what this one has kept
    with out_of_memory_named(), ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(work, *args).result()
        except BrokenProcessPool:
            raise MemoryError("the process was killed") from None


@contextmanager
def out_of_memory_named() -> Iterator[None]:
    """PyTorch's several ways to say that memory is full -> MemoryError."""
    try:
        yield
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        raise MemoryError(brief(error)) from None


@contextmanager
def full_memory_in_one_line() -> Iterator[None]:
    """A MemoryError -> an InputError with the mend."""
    try:
        with out_of_memory_named():
            yield
    except MemoryError as error:
        raise InputError(f"the memory does not suffice ({brief(error)}): lower --batch_size") from None


def machine(world: World) -> dict[str, str | int]:
    """What the numbers belong to."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s+: (.*)", info.read_text()) if info.exists() else None
    name = found[1] if found else platform.processor() or platform.machine()
    if world.device.type == "cuda":
        name = torch.cuda.get_device_name()
    return {"device": world.device.type, "name": name, "threads": torch.get_num_threads(),
            "dtype": str(world.dtype).removeprefix("torch."), "torch": torch.__version__}
