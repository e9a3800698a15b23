"""Which number type a program computes in, and how much memory it may take."""

import pytest
import torch

from runtime import hardware
from settings import VITS
from training.backbone import build_backbone

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


@pytest.mark.parametrize("arch", VITS)
def test_auto_multiplies_matrices_as_wide_as_the_vit(arch):
    assert VITS[arch] == build_backbone(arch).embed_dim
