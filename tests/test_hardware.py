"""Which number type a program computes in, and how much memory it may take."""

import shutil
from functools import partialmethod

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters

from multicrop import MultiCropNetwork
from runtime import hardware
from runtime.commandline import InputError
from runtime.hardware import World
from settings import VITS
from teacher import make_teacher
from training.backbone import build_backbone
from vit import VisionTransformer

CPU = torch.device("cpu")


@pytest.mark.parametrize("slower", ["fp32", "bf16"])
def test_auto_takes_the_type_that_this_cpu_multiplies_faster(slower, monkeypatch):
    """Whatever its flags say: one of the two is made slow."""
    multiply = torch.Tensor.__matmul__

    def slow(x, weight):
        if x.dtype == hardware.DTYPES[slower]:
            multiply(torch.ones(2000, 2000), torch.ones(2000, 500))
        return multiply(x, weight)

    monkeypatch.setattr(torch.Tensor, "__matmul__", slow)
    threads = torch.get_num_threads()
    dtype, rates = hardware.choose_dtype("auto", CPU, 128)
    assert dtype != hardware.DTYPES[slower]
    assert "fp32" in rates and "bf16" in rates
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_type_that_is_asked_for_is_taken_unmeasured(name, dtype):
    assert hardware.choose_dtype(name, CPU, 128) == (dtype, "")
    assert hardware.name_of(dtype) == name


def test_attention_by_its_formula_is_attention():
    """Outputs and gradients, of several queries and of one; with a mask PyTorch does it."""
    torch.manual_seed(0)
    for queries in (7, 1):
        q = torch.randn(2, 3, queries, 5, dtype=torch.double, requires_grad=True)
        k, v = torch.randn(2, 2, 3, 7, 5, dtype=torch.double, requires_grad=True).unbind()
        expected = F.scaled_dot_product_attention(q, k, v)
        with hardware.AttentionByFormula():
            found = F.scaled_dot_product_attention(q, k, v)
            masked = F.scaled_dot_product_attention(q, k, v, attn_mask=torch.zeros(queries, 7))
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(masked, expected)
        weights = torch.randn_like(expected)
        gradients = torch.autograd.grad(found, (q, k, v), weights, retain_graph=True)
        wanted = torch.autograd.grad(expected, (q, k, v), weights, retain_graph=True)
        torch.testing.assert_close(gradients, wanted)


def test_a_bf16_step_on_a_cpu_takes_the_formula(monkeypatch):
    """And evaluations do not: without gradients the fused kernel is the faster one."""
    calls = []
    formula = hardware.AttentionByFormula.__torch_function__

    def counted(self, function, *others):
        calls.append(function)
        return formula(self, function, *others)

    monkeypatch.setattr(hardware.AttentionByFormula, "__torch_function__", counted)
    network = VisionTransformer(8, img_size=16, embed_dim=12, depth=2, num_heads=3)
    for dtype, expected in ((torch.bfloat16, 2), (torch.float32, 0)):
        calls.clear()
        with World(0, 1, CPU, dtype).autocast():
            network(torch.rand(5, 3, 16, 16)).sum().backward()
        assert calls.count(F.scaled_dot_product_attention) == expected
        with torch.no_grad(), World(0, 1, CPU, dtype).autocast():
            network(torch.rand(5, 3, 16, 16))
        assert calls.count(F.scaled_dot_product_attention) == expected


@pytest.mark.parametrize("arch", VITS)
def test_auto_multiplies_matrices_as_wide_as_the_vit(arch):
    assert VITS[arch] == build_backbone(arch).embed_dim


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="there is no compiler here")
def test_each_size_of_crops_has_a_compiled_graph_of_its_own(monkeypatch):
    """Three: the student's globals and locals, the teacher's globals; none with unknown sizes.

    What is evaluated in between is not compiled, so that Dynamo's limit is far.
    """
    # the graphs are counted, and need no code
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    torch.manual_seed(0)
    torch.compiler.reset()
    counters.clear()
    backbone = VisionTransformer(7, 35, embed_dim=22, depth=3, num_heads=2, drop_path_rate=0.3)
    student = MultiCropNetwork(backbone, nn.Linear(22, 5))
    teacher = make_teacher(student)
    crops = [torch.randn(3, 3, size, size) for size in (35, 35, 14, 14, 14)]
    eager = teacher(crops[:2])
    hot_path = [student.backbone, teacher.backbone]
    said = hardware.compile_hot_path(hot_path, "true", World(0, 1, CPU, torch.float32))
    assert said.startswith("compiled"), said
    counters.clear()  # of the compiler's trial
    for images in (3, 11):
        with torch.no_grad():
            compiled = teacher(crops[:2])
        student(crops).sum().backward()
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            teacher.backbone(torch.randn(images, 3, 21, 21))
    torch.compiler.reset()
    torch.testing.assert_close(compiled, eager, atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["recompile_limit"] and not counters["graph_break"]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        ConnectionResetError("reset by peer"),  # a batch was announced and not handed over
        EOFError(),
    ],
)
def test_a_killed_worker_of_the_loader_is_one_line(error):
    """But an error of the worker's own, which a student's crops may raise, keeps its traceback."""
    own = RuntimeError("Caught RuntimeError in DataLoader worker process 0.")
    with pytest.raises(RuntimeError, match="process 0"), hardware.losses_in_one_line(False):
        raise own
    with pytest.raises(InputError, match="a process of the loader was killed"):
        with hardware.losses_in_one_line(launched=False):
            raise error
