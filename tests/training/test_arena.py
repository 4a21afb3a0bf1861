"""Memory for large tensors: nothing that is in use is handed out again, and what is not, is."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lorakit import arena
from lorakit.arena import PAGE, SMALLEST, Arena, arena_is_on, empty, empty_like, use_arena

LARGE = SMALLEST // 4
"""Elements of fp32 from which on a tensor is the arena's."""


@pytest.fixture
def in_arena() -> Iterator[Arena]:
    if not use_arena(True):
        pytest.skip("no arena on this system")
    yield arena._arenas[0]
    use_arena(False)


@given(
    st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 5, 8, 13]), st.booleans(), st.integers(0, 30)),
        max_size=60,
    )
)
def test_what_is_in_use_is_nobody_elses(steps: list[tuple[int, bool, int]]) -> None:
    memory = Arena(2**24)
    held: list[tuple[memoryview, int]] = []
    most = number = 0
    for pages, drop, which in steps:
        if drop and held:
            del held[which % len(held)]
            continue
        view = memory.take(pages * PAGE - 5)
        assert view is not None
        assert len(view) == pages * PAGE
        number += 1
        view[0] = view[-1] = number
        held.append((view, number))
        most = max(most, sum(len(view) for view, _ in held))
        del view
    assert all(view[0] == view[-1] == mark for view, mark in held)
    in_use = sum(len(view) for view, _ in held)
    assert memory.free_bytes() == memory.most - in_use
    assert memory.most >= most
    held.clear()
    if steps and most:
        before = memory.most
        assert memory.free_bytes() == before
        whole = memory.take(before)
        assert whole is not None
        assert memory.most == before, "holes next to each other did not become one"


def test_the_next_of_a_size_has_what_the_last_left() -> None:
    memory = Arena(2**24)
    kept = [memory.take(3 * PAGE)]
    for _ in range(100):
        passing = memory.take(7 * PAGE)
        assert passing is not None
        del passing
        kept.append(memory.take(PAGE))
    assert memory.most == (3 + 7 + 100) * PAGE


def test_sizes_that_never_come_again_cost_a_quarter_at_most() -> None:
    memory = Arena(2**30)
    for step in range(50):
        kept = [memory.take((100 + 7 * step % 50 + i % 3) * PAGE) for i in range(30)]
        in_use = sum(len(view) for view in kept if view is not None)
        del kept
    assert memory.most <= 1.25 * 30 * 151 * PAGE
    assert in_use > 0


def test_a_full_one_hands_out_nothing_and_says_so() -> None:
    memory = Arena(8 * PAGE)
    first, second = memory.take(6 * PAGE), memory.take(PAGE)
    assert first is not None
    assert second is not None
    assert memory.take(4 * PAGE) is None
    del first
    assert memory.take(4 * PAGE) is not None


def test_memory_given_back_is_the_systems() -> None:
    memory = Arena(2**24)
    kept, left = memory.take(4 * PAGE), memory.take(4 * PAGE)
    assert kept is not None
    assert left is not None
    kept[:], left[:] = b"k" * len(kept), b"l" * len(left)
    del left
    memory.give_back()
    assert memory.free_bytes() == 0
    again = memory.take(4 * PAGE)
    assert again is not None
    assert not any(again), "its pages are the old ones"
    assert bytes(kept) == b"k" * len(kept)


def test_a_tensor_holds_its_memory_for_as_long_as_a_view_of_it(in_arena: Arena) -> None:
    x = empty((4, LARGE), torch.empty(0)).fill_(1.0)
    last = x[3]
    place = x.data_ptr()
    del x
    others = [empty((4, LARGE), last).fill_(2.0) for _ in range(3)]
    assert place not in [other.data_ptr() for other in others]
    assert bool((last == 1).all())
    del last
    assert empty((4, LARGE), others[0]).data_ptr() == place


def test_what_autograd_keeps_is_kept(in_arena: Arena) -> None:
    scale, values = torch.ones(LARGE, requires_grad=True), torch.randn(LARGE)
    x = empty_like(values).copy_(values)
    y = (scale * x).sum()
    del x
    noise = [empty_like(values).fill_(9.0) for _ in range(4)]
    y.backward()
    assert scale.grad is not None
    assert torch.equal(scale.grad, values)
    assert noise


def test_another_thread_may_leave_it(in_arena: Arena) -> None:
    held = [empty((LARGE,), torch.empty(0)) for _ in range(8)]
    threads = [threading.Thread(target=held.pop) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert in_arena.free_bytes() == in_arena.most


def test_many_threads_get_memory_of_their_own(in_arena: Arena) -> None:
    wrong: list[int] = []

    def work(number: int) -> None:
        for turn in range(200):
            tensors = [empty((LARGE + 1024 * (turn % 5),), torch.empty(0)) for _ in range(3)]
            for tensor in tensors:
                tensor.fill_(number)
            if not all(bool((tensor == number).all()) for tensor in tensors):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def _others() -> dict[str, Tensor]:
    with FakeTensorMode():
        fake = torch.empty(2)
    return {"fake": fake, "meta": torch.empty(2, device="meta"), "small": torch.empty(2)}


@pytest.mark.parametrize("which", ["fake", "meta", "small"])
def test_others_are_made_by_torch(which: str, in_arena: Arena) -> None:
    like = _others()[which]
    made = empty((8,) if which == "small" else (LARGE, 2), like)
    assert type(made) is type(like)
    assert made.device == like.device
    assert in_arena.most == 0


def test_a_result_in_it_may_be_written_over(in_arena: Arena) -> None:
    """Autograd refuses that for a view which a custom function has returned."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return torch.mul(x, 2, out=empty_like(x))

        @staticmethod
        def backward(ctx: object, *upstream: Tensor) -> Tensor:
            return upstream[0] * 2

    x = torch.ones(LARGE, requires_grad=True)
    y = Doubled.apply(x)
    y.add_(1)  # type: ignore[attr-defined]
    y.sum().backward()  # type: ignore[attr-defined]
    assert x.grad is not None
    assert bool((x.grad == 2).all())


def test_a_system_without_the_addresses_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(size: int) -> Arena:
        raise OSError

    use_arena(False)
    monkeypatch.setattr(arena, "Arena", refuse)
    assert not use_arena(True)
    assert not arena_is_on()
    assert len(empty((LARGE,), torch.empty(0))) == LARGE
