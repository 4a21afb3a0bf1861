"""The model of malloc's heap."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lorakit.estimate.heap import Heap

SIZES = st.lists(st.integers(1, 1 << 20), min_size=1, max_size=40)
NEVER = 1 << 40


def step(heap: Heap, sizes: list[int], number: int) -> None:
    for index, size in enumerate(sizes):
        heap.allocate((number, index), size)
    for index in range(len(sizes)):
        heap.free((number, index))
    heap.settle()


@given(SIZES)
def test_it_is_never_smaller_than_what_is_in_use(sizes: list[int]):
    heap = Heap(NEVER)
    step(heap, sizes, 0)
    assert sum(sizes) <= heap.peak <= sum(sizes) + 128 * len(sizes)


@given(SIZES)
def test_the_same_step_again_takes_no_more(sizes: list[int]):
    heap = Heap(NEVER)
    step(heap, sizes, 0)
    first = heap.peak
    for number in (1, 2, 3):
        step(heap, sizes, number)
    assert heap.peak == first


@given(SIZES)
def test_tensors_in_their_own_pages_take_what_is_in_use(sizes: list[int]):
    heap = Heap(1)
    step(heap, sizes, 0)
    assert heap.peak == sum(-(-size // 4096) * 4096 for size in sizes)


def test_a_hole_does_not_take_a_tensor_of_its_own_size_before_the_step_is_done():
    heap = Heap(NEVER)
    heap.allocate("kept before", 4096)
    heap.allocate("first", 1 << 20)
    heap.allocate("kept after", 4096)
    heap.free("first")
    heap.allocate("second", 1 << 20)
    assert heap.peak > 2 << 20


def test_a_larger_hole_does():
    heap = Heap(NEVER)
    heap.allocate("first", 1 << 20)
    heap.allocate("kept", 4096)
    heap.free("first")
    heap.allocate("second", 1 << 19)
    assert heap.peak < (1 << 20) + 8192
