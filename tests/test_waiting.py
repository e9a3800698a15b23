"""Neither crops nor step wait for the device: a GPU would stand idle while the CPU reads from it.

For the crops the device is torch's "meta", which has no values; the step's is the CPU.
"""

from dataclasses import replace

import pytest
import torch
from test_bench import TINY
from torch.utils._python_dispatch import TorchDispatchMode

from bench import step as bench_step
from multicrop import MultiCrop
from runtime.hardware import World
from runtime.sampling import CropsInMemory, EpochBatches

READS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")
METHODS = ("tolist", "numpy", "cpu")  # on the CPU these call no operation


def refuse_methods(monkeypatch, device: str) -> None:
    """Fail at the methods of a tensor of this device that read it."""
    for name in METHODS:
        method = getattr(torch.Tensor, name)

        def read(tensor, *args, method=method, name=name, **kwargs):
            assert tensor.device.type != device, f"{name} waits for the device"
            return method(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, read)


class NoWaiting(TorchDispatchMode):
    """Fails at what reads a value from this device, and at copies to it that wait."""

    def __init__(self, device: str):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operation.overloadpacket.__name__
        if name in READS:
            assert args[0].device.type != self.device, f"{name} waits for the device"
        if name in ("index", "index_put", "index_put_"):  # by True and False it must count first
            kinds = [index.dtype for index in args[1] if index is not None]
            assert torch.bool not in kinds, "an index of True and False waits for the device"
        if name == "_to_copy":
            moves = kwargs.get("device") not in (None, args[0].device)
            assert not moves or kwargs.get("non_blocking"), "this copy waits: non_blocking=True"
        return operation(*args, **kwargs)


def zero_the_negative(x: torch.Tensor) -> None:
    x[x < 0] = 0


WAITS = [
    lambda x: x.sum().item(),
    lambda x: x[x > 0],
    lambda x: x.to("meta"),
    lambda x: x.tolist(),
    lambda x: x.cpu(),
    zero_the_negative,
]


@pytest.mark.parametrize("wait", WAITS)
def test_what_waits_is_seen(wait, monkeypatch):
    refuse_methods(monkeypatch, "cpu")
    with pytest.raises(AssertionError, match="waits"), NoWaiting("cpu"):
        wait(torch.ones(3))


def test_crops_of_a_batch_wait_for_nothing(monkeypatch):
    """Enough images that each operation is for some of them, and the second blur for none."""
    images = torch.empty(31, 3, 41, 37, dtype=torch.uint8, device="meta")
    sides = torch.tensor([[41, 37]] * 31)
    batches = EpochBatches(31, 31, 1, rank=0, world_size=1, seed=0)
    crop = MultiCrop(23, 13, local_number=2, blur=(1.0, 0.0, 0.5))
    refuse_methods(monkeypatch, "meta")
    with NoWaiting("meta"):
        (views,) = list(CropsInMemory(images, sides, crop, batches, seed=0))
    assert [tuple(view.shape) for view in views] == [(31, 3, 23, 23)] * 2 + [(31, 3, 13, 13)] * 2
    assert all(view.device.type == "meta" for view in views)


@pytest.mark.parametrize(("clip", "bn"), [(0.0, False), (3.0, True)])
def test_a_step_waits_for_nothing(clip, bn, monkeypatch):
    """Algorithm 1 with drop path, in bf16."""
    settings = replace(TINY, drop_path_rate=0.1, clip_grad=clip, use_bn_in_head=bn)
    world = World(0, 1, torch.device("cpu"), torch.bfloat16)
    step = bench_step.make_ours(settings, world).step
    crops = bench_step.random_crops(settings, world)
    step(crops)
    refuse_methods(monkeypatch, "cpu")
    with NoWaiting("cpu"):
        step(crops)
