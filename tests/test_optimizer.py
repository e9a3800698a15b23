"""The schedules: end points, shapes, and the release's rule for the warm-up; clipping, and what
decays.
"""

import math

import pytest
import torch
from torch import nn

from optimizer import clip_gradients, cosine, linear, parameter_groups


def test_the_cosine_falls_from_start_to_end_through_the_middle():
    for step, value in ((0, 0.04), (50, 0.22), (100, 0.4)):
        assert cosine(step, 100, 0.04, 0.4) == pytest.approx(value), (
            f"from start 0.04 to end 0.4 in 100 steps: step {step} must have {value}"
        )


def test_the_warm_up_is_linear_from_zero_and_reaches_the_start_value_on_its_last_step():
    values = [cosine(step, 100, 0.5, 0.0, warmup_steps=11) for step in range(12)]
    for step, value in ((0, 0), (5, 0.25), (10, 0.5), (11, 0.5)):
        assert values[step] == pytest.approx(value), (
            f"a warm-up of 11 steps to 0.5: step {step} must have {value}"
        )
    assert cosine(0, 100, 0.5, 0.0, warmup_steps=1) == 0, (
        "step 0 has 0, also where it is the whole warm-up"
    )


def test_after_the_warm_up_it_is_the_releases_closed_form():
    for step in range(7, 53):
        expected = 0.1 + 0.5 * (0.9 - 0.1) * (1 + math.cos(math.pi * (step - 7) / (53 - 7)))
        assert cosine(step, 53, 0.9, 0.1, warmup_steps=7) == pytest.approx(expected), (
            f"step {step}: the cosine must begin where the warm-up of 7 steps ends, "
            "and take the other 46"
        )


def test_the_teacher_momentum_rises_to_one_and_never_beyond():
    values = [cosine(step, 997, 0.996, 1.0) for step in range(998)]
    assert (
        values == sorted(values)
        and values[0] == pytest.approx(0.996)
        and values[-1] == pytest.approx(1.0)
    )


def test_the_temperature_warms_up_linearly_and_stays():
    assert [linear(step, 4, 0.04, 0.08) for step in (0, 1, 2, 4, 99)] == pytest.approx(
        [0.04, 0.05, 0.06, 0.08, 0.08]
    )
    assert linear(0, 0, 0.04, 0.07) == 0.07, (
        "without a warm-up the final value holds from the start"
    )


def layer_with_gradients(weight: float, bias: float) -> nn.Linear:
    layer = nn.Linear(3, 5)
    layer.weight.grad, layer.bias.grad = torch.full((5, 3), weight), torch.full((5,), bias)
    return layer


def test_each_gradient_is_clipped_by_its_own_norm_and_the_largest_norm_is_returned():
    layer = layer_with_gradients(2.0, 0.1)
    norm = clip_gradients(layer, 3.0)
    assert norm.item() == pytest.approx(2 * 15**0.5), "the largest norm, as it was before"
    assert layer.weight.grad.norm().item() == pytest.approx(3, abs=1e-5)
    assert layer.bias.grad.eq(0.1).all(), (
        "a gradient below the limit stays as it is, to the last bit"
    )


def test_a_gradient_that_is_nan_is_seen_in_the_norm_that_is_returned():
    assert clip_gradients(layer_with_gradients(2.0, math.nan), 3.0).isnan()


def test_each_weight_that_takes_a_gradient_is_in_one_group():
    layer = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 7))
    layer[2].weight.requires_grad_(False)
    decaying, others = parameter_groups(layer)
    assert [id(param) for param in decaying["params"]] == [id(layer[0].weight)], (
        "only matrices decay"
    )
    assert len(others["params"]) == 4 and decaying["decays"] and not others["decays"]


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_clipping_is_that_of_a_loop_over_the_tensors(max_norm):
    """g <- g min(1, max_norm / ||g||) for each tensor by itself; one has no gradient."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    for number, param in enumerate(network.parameters()):
        param.grad = torch.randn_like(param) * 10.0 ** (number - 3)
    network[1].bias.grad = None
    wanted = []
    norms = []
    for param in network.parameters():
        if param.grad is None:
            continue
        norm = param.grad.square().sum().sqrt()
        norms.append(norm)
        factor = min(1.0, max_norm / norm.item()) if max_norm else 1.0
        wanted.append(param.grad * factor)
    assert clip_gradients(network, max_norm).item() == pytest.approx(max(norms).item())
    found = [param.grad for param in network.parameters() if param.grad is not None]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
