"""The schedules: end points, shapes, and the release's rule for the warm-up."""
import math

import pytest

from optimizer import cosine, linear


def test_the_cosine_falls_from_start_to_end_through_the_middle():
    for step, value in ((0, 0.04), (50, 0.22), (100, 0.4)):
        assert cosine(step, 100, 0.04, 0.4) == pytest.approx(value), \
            f"from start 0.04 to end 0.4 in 100 steps: step {step} must have {value}"


def test_the_warm_up_is_linear_from_zero_and_reaches_the_start_value_on_its_last_step():
    values = [cosine(step, 100, 0.5, 0.0, warmup_steps=11) for step in range(12)]
    for step, value in ((0, 0), (5, 0.25), (10, 0.5), (11, 0.5)):
        assert values[step] == pytest.approx(value), f"a warm-up of 11 steps to 0.5: step {step} must have {value}"
    assert cosine(0, 100, 0.5, 0.0, warmup_steps=1) == 0, "step 0 has 0, also where it is the whole warm-up"


def test_after_the_warm_up_it_is_the_releases_closed_form():
    for step in range(7, 53):
        expected = 0.1 + 0.5 * (0.9 - 0.1) * (1 + math.cos(math.pi * (step - 7) / (53 - 7)))
        assert cosine(step, 53, 0.9, 0.1, warmup_steps=7) == pytest.approx(expected), \
            f"step {step}: the cosine must begin where the warm-up of 7 steps ends, and take the other 46"


def test_the_teacher_momentum_rises_to_one_and_never_beyond():
    values = [cosine(step, 997, 0.996, 1.0) for step in range(998)]
    assert values == sorted(values) and values[0] == pytest.approx(0.996) and values[-1] == pytest.approx(1.0)


def test_the_temperature_warms_up_linearly_and_stays():
    assert [linear(step, 4, 0.04, 0.08) for step in (0, 1, 2, 4, 99)] == pytest.approx([0.04, 0.05, 0.06, 0.08, 0.08])
    assert linear(0, 0, 0.04, 0.07) == 0.07, "without a warm-up the final value holds from the start"
