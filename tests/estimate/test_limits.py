"""The search for what fits."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lorakit.estimate.limits import LARGEST, most_tokens_that_fit


@given(
    base=st.integers(0, 10**9),
    slope=st.integers(1, 10**6),
    start=st.integers(2, 5000),
    true=st.integers(1, LARGEST),
)
def test_where_memory_grows_evenly_it_is_found(base: int, slope: int, start: int, true: int):
    def peak(tokens: int) -> int:
        return base + slope * tokens

    known = {start: peak(start), start // 2: peak(start // 2)}
    found = most_tokens_that_fit(peak, known, peak(true))
    assert 0.96 * true - 1 <= found <= true


@given(start=st.integers(2, 2000), true=st.integers(100, 20_000))
def test_what_is_found_fits_even_where_it_does_not(start: int, true: int):
    def peak(tokens: int) -> int:
        return 1000 + 10 * tokens + tokens**2 // 50

    known = {start: peak(start), start // 2: peak(start // 2)}
    found = most_tokens_that_fit(peak, known, peak(true))
    assert peak(found) <= peak(true)
    assert found >= 0.8 * true


def test_nothing_fits_where_the_weights_alone_do_not():
    assert most_tokens_that_fit(lambda n: 100 + n, {8: 108, 4: 104}, 50) == 0


def test_it_looks_no_further_than_it_is_told():
    calls = []

    def peak(tokens: int) -> int:
        calls.append(tokens)
        return tokens

    assert most_tokens_that_fit(peak, {8: 8, 4: 4}, 10**12, largest=1000) == 1000
    assert len(calls) <= 2
