"""The learning rate's factor, for any schedule and any length of run."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.options import ScheduleOptions
from lorakit.schedule import lr_factor

NAMES = ("constant", "linear", "cosine")
names = st.sampled_from(NAMES)
warmups = st.integers(0, 500)
totals = st.integers(1, 2000)


def factors(name, warmup, total):
    options = ScheduleOptions(name=name, warmup_steps=warmup)
    return [lr_factor(step, total, options) for step in range(total)]


@given(names, warmups, totals)
def test_no_step_of_a_run_is_wasted_at_zero(name, warmup, total):
    assert all(0 < factor <= 1 for factor in factors(name, warmup, total))


@given(names, warmups, totals)
def test_warm_up_rises_evenly_to_the_peak(name, warmup, total):
    rising = factors(name, warmup, total)[:warmup]
    assert rising == pytest.approx([(i + 1) / warmup for i in range(len(rising))])
    assert all(a < b for a, b in pairwise(rising))


@given(names, warmups, totals)
def test_behind_the_warm_up_it_starts_at_the_peak_and_never_rises(name, warmup, total):
    falling = factors(name, warmup, total)[warmup:]
    assert falling[:1] in ([], [1.0])
    assert all(a >= b for a, b in pairwise(falling))


@given(warmups, totals)
def test_constant_stays_at_the_peak(warmup, total):
    assert set(factors("constant", warmup, total)[warmup:]) <= {1.0}


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_decay_would_reach_zero_one_step_after_the_last(name):
    options = ScheduleOptions(name=name, warmup_steps=10)
    assert lr_factor(100, 100, options) == pytest.approx(0, abs=1e-12)
    assert lr_factor(99, 100, options) > 0


@given(names, warmups, totals, st.integers(0, 5000))
def test_steps_past_the_end_stay_within_bounds(name, warmup, total, beyond):
    options = ScheduleOptions(name=name, warmup_steps=warmup)
    assert 0 <= lr_factor(total + beyond, total, options) <= 1


def test_values_are_those_of_the_formulas():
    assert factors("linear", 0, 4) == pytest.approx([1, 0.75, 0.5, 0.25])
    expected = [0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)]
    assert factors("cosine", 0, 4) == pytest.approx(expected)
    assert factors("cosine", 2, 6) == pytest.approx([0.5, 1.0, *expected])


@given(names, st.floats(0, 0.9), totals)
def test_a_ratio_is_that_share_of_the_run(name, ratio, total):
    by_ratio = ScheduleOptions(name=name, warmup_ratio=ratio)
    by_steps = ScheduleOptions(name=name, warmup_steps=int(ratio * total))
    for step in range(0, total, 7):
        assert lr_factor(step, total, by_ratio) == lr_factor(step, total, by_steps)


def test_steps_and_ratio_together_are_refused():
    with pytest.raises(ValueError, match="not both"):
        ScheduleOptions(warmup_steps=10, warmup_ratio=0.1)
