"""Where a program runs: its processes, device, precision and compilation.

One process works without a launcher. torchrun starts several: one a GPU (nccl), or on CPUs (gloo).
"""

import atexit
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from runtime.commandline import InputError, brief


class World(NamedTuple):
    """All processes, as one of them sees them: its number, its device, its precision."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype
    rates: str = ""  # why this dtype, where it was measured

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Multiply matrices in the world's precision inside."""
        low = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=low):
            if low and self.device.type == "cpu" and torch.is_grad_enabled():
                # a CPU's fused attention goes backward slowly in bf16
                with AttentionByFormula():
                    yield
            else:
                yield

    def total(self, tensor: Tensor, operation=dist.ReduceOp.SUM) -> Tensor:
        """Return the sum over all processes, entry by entry."""
        if self.size == 1:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor, operation)
        return tensor

    def largest(self, tensor: Tensor) -> Tensor:
        """Return the maximum over all processes, entry by entry."""
        return self.total(tensor, dist.ReduceOp.MAX)

    def mean(self, tensor: Tensor) -> Tensor:
        """Return the mean over all processes, entry by entry."""
        return self.total(tensor) / self.size

    def gather_rows(self, rows: Tensor) -> Tensor:
        """Return all processes' rows on the CPU, any number from each, in the processes' order."""
        if self.size == 1:
            return rows.cpu()
        parts: list = [None] * self.size
        dist.all_gather_object(parts, rows.cpu())
        return torch.cat([part for part in parts if len(part)])

    def any(self, flag: bool) -> bool:
        """Return whether the flag is up in any process; a GPU's queue is not waited for."""
        if self.size == 1:
            return flag
        return bool(self.largest(torch.tensor(int(flag))))  # over the CPUs

    def all_see(self, path: Path) -> bool:
        """Return whether the file is there; raises InputError if only some processes see it."""
        there = os.path.exists(path)
        if not self.any(there):
            return False
        if self.any(not there):
            raise InputError(
                f"not all hosts see {str(path)!r}: put --output_dir on a folder that they share"
            )
        return True

    @contextmanager
    def main_first(self, downloads: bool) -> Iterator[None]:
        """Where the block downloads, run it in turns.

        First the main process, then one of each host, since hosts may share no files, then the
        others, which find the files there.
        """
        if not downloads:
            yield
            return
        turn = 2
        if self.is_main:
            turn = 0
        elif os.environ.get("LOCAL_RANK") == "0":
            turn = 1
        for _ in range(turn):
            self.wait()
        yield
        for _ in range(turn, 2):
            self.wait()

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.size > 1:
            dist.barrier()


class AttentionByFormula(TorchFunctionMode):
    """Computes scaled_dot_product_attention by its formula inside: softmax(q k^T / sqrt(d)) v.

    On a CPU in bf16 a step of a small ViT is then 3 to 11 % faster (docs/log.md) than with
    PyTorch's own form, which also looks for rows without a single key.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention or kwargs:
            return function(*args, **kwargs)
        q, k, v = args
        scale = q.shape[-1] ** -0.5
        return (q * scale @ k.transpose(-2, -1)).softmax(dim=-1) @ v


def choose_device(wanted: str) -> torch.device:
    """Return the device that auto, cuda, mps or cpu means; raises InputError if it is not there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        wanted = next(name for name in there if there[name])
    if not there[wanted]:
        raise InputError(f"--device {wanted} is not available here: take --device auto, or cpu")
    if wanted != "cuda":
        return torch.device(wanted)

    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise InputError(f"torchrun --nproc_per_node is more than the {gpus} GPUs here: lower it")
    return torch.device("cuda", local_rank)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_dtype(wanted: str, device: torch.device, width: int) -> tuple[torch.dtype, str]:
    """Return the type that a --precision means, and words about it.

    auto: bf16 where the hardware is faster with it, in a ViT of this width.
    """
    if wanted != "auto":
        return DTYPES[wanted], ""
    if device.type == "cpu":
        return faster_dtype(width)
    has_bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return DTYPES["bf16" if has_bf16 else "fp32"], ""


def name_of(dtype: torch.dtype) -> str:
    """Return what --precision calls a type."""
    return next(name for name in DTYPES if DTYPES[name] == dtype)


def faster_dtype(width: int) -> tuple[torch.dtype, str]:
    """Return fp32, or bf16 where this CPU multiplies it at least 10 % faster, and both rates.

    There are CPUs that have instructions for bf16 and are half as fast with them.
    Measured on one thread, on the product of an image's tokens and the weights of a ViT's MLP.
    """
    tokens = 197  # of an image of 224 pixels
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # several wait for each other on a busy machine
    seconds = {"fp32": [], "bf16": []}
    for _ in range(8):  # in turn: both meet the same other programs
        for name, times in seconds.items():
            x = torch.ones(tokens, width, dtype=DTYPES[name])
            weight = torch.ones(width, 4 * width, dtype=DTYPES[name])
            began = time.perf_counter()
            x @ weight
            times.append(time.perf_counter() - began)
    torch.set_num_threads(threads)

    gflop = 2 * tokens * width * 4 * width / 1e9
    fp32 = gflop / min(seconds["fp32"])
    bf16 = gflop / min(seconds["bf16"])
    name = "bf16" if bf16 > 1.1 * fp32 else "fp32"
    return DTYPES[name], f" (GFLOP/s a core: fp32 {fp32:.0f}, bf16 {bf16:.0f})"


@contextmanager
def start(
    device: str = "auto", precision: str = "auto", patience: float = 30, width: int = 384
) -> Iterator[World]:
    """Join the processes that torchrun started, if it did, and leave them at the end.

    patience: minutes to wait for a process that is late. width: of the ViT; others are a ViT-S.
    Raises InputError if another process, or one of the loader, is lost.
    """
    chosen = choose_device(device)
    dtype, rates = choose_dtype(precision, chosen, width)
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if launched and chosen.type == "mps":
        raise InputError(
            "several processes cannot share a Mac's GPU: start one, with python, or take "
            "--device cpu"
        )
    with losses_in_one_line(launched):
        if not launched:
            yield World(0, 1, chosen, dtype, rates)
            return
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=patience))
        try:
            same = [(dtype, rates)]
            dist.broadcast_object_list(same)  # the main process measures for all
            yield World(dist.get_rank(), dist.get_world_size(), chosen, *same[0])
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


# the words of PyTorch's errors about a process that is gone
LOST = r"gloo|NCCL|[Cc]onnection|[Tt]imed? ?out|[Ss]ocket|recvValue|TCPStore"


def loader_lost(error: Exception) -> InputError:
    """Return the error about a killed worker of the loader."""
    print(file=sys.stderr)  # its signal may have come in the middle of a bar's line
    return InputError(
        f"a process of the loader was killed ({brief(error)}), as when memory is full: start "
        "again, with a lower --num_workers if that was it; what was saved is untouched"
    )


@contextmanager
def losses_in_one_line(launched: bool) -> Iterator[None]:
    """Turn PyTorch's RuntimeError about a lost process, or worker, into an InputError."""
    try:
        yield
    except (ConnectionResetError, ConnectionRefusedError, EOFError) as error:
        # the worker was killed after it had announced a batch, which it can no longer hand over
        raise loader_lost(error) from None
    except RuntimeError as error:
        # "Caught ... in DataLoader worker process 0" is an error of the worker's own
        if re.search(r"DataLoader worker \(pid", str(error)):
            raise loader_lost(error) from None
        if launched and re.search(LOST, str(error)):
            raise InputError(
                "another process of this run is lost, or was not heard for too long "
                f"({brief(error)}): look for its own message; the same command continues from "
                "what was saved"
            ) from None
        raise


def compile_hot_path(modules: list[nn.Module], wanted: str, world: World) -> str:
    """Compile ViTs' blocks, and other modules whole, in place; return words that say what was done.

    wanted: true, false, or auto, which compiles on a GPU. On a CPU compiling gains nothing.
    """
    if wanted == "false" or (wanted == "auto" and world.device.type != "cuda"):
        return "not compiled"
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=world.device))
    except Exception as error:  # whatever the compiler lacks, training can do without it
        return f"not compiled: torch.compile does not work here ({brief(error)})"
    for module in modules:
        if hasattr(module, "blocks"):
            # A graph serves all of them. Each size of crops gets its own (dynamic=False), faster
            # than one for all sizes. The last block, which computes [CLS] alone, gets none.
            for block in module.blocks[:-1]:
                block.compile(dynamic=False)
        else:
            module.compile()
    return "compiled: the first steps take about half a minute"


def average_gradients(network: nn.Module, world: World) -> nn.Module:
    """Return the network as a step calls it: backward() averages gradients over the processes."""
    if world.size == 1:
        return network
    device_ids = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=device_ids)


def unwrap(network: nn.Module) -> nn.Module:
    """Return the network that average_gradients was given."""
    if isinstance(network, DistributedDataParallel):
        return network.module
    return network


def free_memory(device: torch.device) -> float:
    """Return the free bytes of a GPU, or this process's part of the host's; 0 if not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = []
    try:
        meminfo = Path("/proc/meminfo").read_text()
        free.append(1024 * int(re.search(r"MemAvailable: +(\d+)", meminfo)[1]))
        limit = Path("/sys/fs/cgroup/memory.max").read_text()  # of a container
        used = Path("/sys/fs/cgroup/memory.current").read_text()
        free.append(int(limit) - int(used))
    except (OSError, ValueError):  # another system, or "max": no limit
        pass
    if not free and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):  # macOS: half of all
        free.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2)
    return min(free, default=0) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list that SIGTERM and Ctrl-C append to, so that the step at work can end first.

    A second Ctrl-C ends the program at once.
    """
    received: list[int] = []

    def receive(number: int, frame) -> None:
        received.append(number)
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            print("stopping after this step; Ctrl-C once more: at once", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals_to_training(worker: int) -> None:
    """Make a loader's worker ignore signals, also those that a scheduler sends to all processes.

    It ends when training no longer wants it, when training is gone, or by `end_workers`.
    """
    if hasattr(os, "setsid"):
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """Kill the workers that an error left: Python would wait for them at exit, without end."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's takes their end for an accident
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
