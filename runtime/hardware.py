"""Where a run happens: its processes, device, precision and compilation. Networks and losses know nothing of these.

One process works without a launcher; under torchrun there are several, one a GPU (nccl) or on CPUs (gloo).
"""
import atexit
import multiprocessing
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel

from runtime.commandline import InputError, brief


class World(NamedTuple):
    """This process's number among all, its device, and the type that its matrices are multiplied in."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Multiply matrices in the world's type inside."""
        on_cpu = self.device.type == "cpu" and self.dtype == torch.bfloat16
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            if on_cpu and torch.is_grad_enabled():
                # a CPU's fused attention goes backward slowly in bf16, several times so on small images
                with plain_attention():
                    yield
            else:
                yield

    def total(self, tensor: Tensor, operation=dist.ReduceOp.SUM) -> Tensor:
        """The sum over all processes, entry by entry, the same in each."""
        if self.size == 1:
            return tensor
        tensor = tensor.clone()
        dist.all_reduce(tensor, operation)
        return tensor

    def largest(self, tensor: Tensor) -> Tensor:
        """The maximum over all processes, entry by entry."""
        return self.total(tensor, dist.ReduceOp.MAX)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over all processes, entry by entry."""
        return self.total(tensor) / self.size

    def gather(self, rows: Tensor) -> Tensor:
        """All processes' rows, of which each has equally many, on the device: (n, ...) -> (world n, ...)."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process (asked over the CPUs: the GPU's queue is not waited for)."""
        if self.size == 1:
            return flag
        return bool(self.largest(torch.tensor(int(flag))))

    def all_see(self, path: Path) -> bool:
        """Whether the file is there, the same for all processes; raises InputError if only some see it."""
        there = os.path.exists(path)  # where the path cannot be looked at, writing will say why
        if not self.any(there):
            return False
        if self.any(not there):
            raise InputError(f"not all hosts see {str(path)!r}: put --output_dir on a folder that they share")
        return True

    @contextmanager
    def main_first(self, downloads: bool) -> Iterator[None]:
        """If the block downloads: the main process first, then one of each host, which may share no files, then all."""
        turn = 0 if self.is_main else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
        for passed in range(2 if downloads else 0):
            if passed == turn:
                break
            self.wait()
        yield
        for _ in range(turn, 2 if downloads else 0):
            self.wait()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def gather_rows(self, rows: Tensor) -> Tensor:
        """All processes' rows, of any number, in the order of the processes: (n_r, ...) -> (n, ...), on the CPU."""
        if self.size == 1:
            return rows.cpu()
        parts: list = [None] * self.size
        dist.all_gather_object(parts, rows.cpu())
        return torch.cat([part for part in parts if len(part)])


@contextmanager
def plain_attention() -> Iterator[None]:
    """Compute scaled_dot_product_attention by its formula inside, and in bf16 where q, k and v are."""
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # it is in "cuda", and for CPUs too
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def choose_device(wanted: str) -> torch.device:
    """auto, cuda, mps or cpu -> the device; raises InputError for one that is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        wanted = next(name for name in there if there[name])
    if not there[wanted]:
        raise InputError(f"--device {wanted} is not available here: take --device auto, or cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if wanted == "cuda" and local_rank >= torch.cuda.device_count():
        raise InputError(f"torchrun --nproc_per_node is more than the {torch.cuda.device_count()} GPUs here: lower it")
    return torch.device("cuda", local_rank) if wanted == "cuda" else torch.device(wanted)


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """auto, fp32 or bf16 -> the type; auto takes bf16 where the hardware multiplies it."""
    if wanted == "auto":
        fast = {"cuda": lambda: torch.cuda.get_device_capability() >= (8, 0), "mps": lambda: False,
                "cpu": lambda: torch.cpu.get_capabilities().get("avx512_bf16", False)}
        wanted = "bf16" if fast[device.type]() else "fp32"
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[wanted]


@contextmanager
def start(device: str = "auto", precision: str = "auto", patience: float = 30) -> Iterator[World]:
    """Join the processes that torchrun started, if it did; leave them at the end. patience: minutes, with a late one.

    Raises InputError where another process, or one of the loader's, is lost.
    """
    chosen = choose_device(device)
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if launched and chosen.type == "mps":
        raise InputError("several processes cannot share a Mac's GPU: start one, with python, or take --device cpu")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    with losses_named(launched):
        if launched:
            dist.init_process_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo",
                                    timeout=timedelta(minutes=patience))
        try:
            yield World(dist.get_rank() if launched else 0, dist.get_world_size() if launched else 1, chosen,
                        choose_dtype(precision, chosen))
        finally:
            if launched and dist.is_initialized():
                dist.destroy_process_group()


LOST = r"gloo|NCCL|[Cc]onnection|[Tt]imed? ?out|[Ss]ocket|recvValue|TCPStore"  # what is said of a process that is gone


@contextmanager
def losses_named(launched: bool) -> Iterator[None]:
    """A loader's worker that was killed, another process that is gone: PyTorch's RuntimeErrors -> InputError."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" in str(error):
            raise InputError(f"a process of the loader was killed ({brief(error)}), as when memory is full: start "
                             "again, with a lower --num_workers if that was it; what was saved is untouched") from None
        if launched and re.search(LOST, str(error)):
            raise InputError(f"another process of this run is lost, or was not heard for too long ({brief(error)}): "
                             "look for its own message; the same command goes on from what was saved") from None
        raise


def compile_hot_path(modules: list[nn.Module], wanted: str, world: World) -> str:
    """Compile ViTs' blocks in place, convnets and the loss whole -> words that say what was done.

    One graph serves all blocks but the last, whose single row would make second graphs of each, up to Dynamo's limit.
    auto: on a GPU. On a CPU it gains nothing and costs minutes. Without a compiler training goes on as it is.
    """
    if wanted == "false" or (wanted == "auto" and world.device.type != "cuda"):
        return "not compiled"
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=world.device))
    except Exception as error:  # whatever the toolchain lacks, it must not stop the training
        return f"not compiled: torch.compile does not work here ({brief(error)})"
    for module in modules:
        for part in module.blocks[:-1] if hasattr(module, "blocks") else [module]:
            part.compile()
    return "compiled"


def average_gradients(network: nn.Module, world: World) -> nn.Module:
    """The network as a training step calls it: with several processes, backward() averages its gradients over them."""
    if world.size == 1:
        return network
    return DistributedDataParallel(network, device_ids=[world.device] if world.device.type == "cuda" else None)


def share_cores(wanted: int, device: torch.device) -> int:
    """Divide this process's cores between loader and network -> the number of loader workers.

    As many as wanted; with -1 one a core, at most 10. A network on the CPU needs the cores itself: then -1 is one in
    four of them (of three and less none: training decodes between its steps), and the network's threads get the
    others, unless OMP_NUM_THREADS says otherwise.
    """
    if wanted >= 0:
        return wanted
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = max(1, cores // processes)
    if device.type != "cpu":
        return min(10, cores)
    workers = min(10, cores // 4)
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is None or (threads == "1" and processes > 1):  # torchrun sets 1 for several processes, unasked
        torch.set_num_threads(cores - workers)
    return workers


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and Ctrl-C append to, so that the step at work can end first; a second Ctrl-C is at once."""
    received: list[int] = []

    def receive(number: int, frame) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_signals_to_training(worker: int) -> None:
    """For loader workers: signals are the training process's affair, also those that a scheduler sends to all.

    So a worker ends when training no longer wants it, when training's process is gone, or by `end_workers`.
    """
    if hasattr(os, "setsid"):
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def end_workers() -> None:
    """At exit, end the workers that an error left: Python waits for them, but sends only the SIGTERM they ignore."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's own takes a worker's end for an accident
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
