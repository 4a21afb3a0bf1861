"""Memory for large tensors: nothing that is in use is handed out again, and what is not, is."""

from __future__ import annotations

import gc
import resource
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lorakit import arena
from lorakit.arena import (
    PAGE,
    SMALLEST,
    Arena,
    arena_is_on,
    empty,
    empty_like,
    fakes_told,
    use_arena,
)

LARGE = SMALLEST // 4
"""Elements of fp32 from which on a tensor is the arena's."""


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="arenas are for Linux")


@pytest.fixture
def in_arena() -> Iterator[Arena]:
    use_arena(False)
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
    assert memory.most >= most
    before = memory.most
    held.clear()
    memory.give_back()
    assert memory.most == 0, "holes next to each other did not become one"
    if before:
        whole = memory.take(before)
        assert whole is not None
        assert not any(whole)


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
    views = [memory.take(4 * PAGE) for _ in range(4)]
    for view in views:
        assert view is not None
        view[:] = b"x" * len(view)
    del view
    # A hole between two that are held, and the end.
    views[1] = views[3] = None
    memory.give_back()
    assert memory.most == 12 * PAGE
    again = [memory.take(4 * PAGE) for _ in range(2)]
    assert memory.most == 16 * PAGE
    assert not any(any(view) for view in again if view is not None), "its pages are the old ones"
    assert all(bytes(view) == b"x" * len(view) for view in views if view is not None)


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
    assert in_arena.most > 0


def test_another_thread_may_leave_it(in_arena: Arena) -> None:
    held = [empty((LARGE,), torch.empty(0)) for _ in range(8)]
    threads = [threading.Thread(target=held.pop) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    assert in_arena.most > 0
    in_arena.give_back()
    assert in_arena.most == 0


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
    assert in_arena.most > 0


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


def test_where_addresses_are_limited_none_are_reserved(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_arena(False)
    strict = tmp_path / "overcommit_memory"
    strict.write_text("2\n")
    with monkeypatch.context() as patched:
        patched.setattr(arena, "_OVERCOMMIT", strict)
        assert not use_arena(True)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (2**36, 2**36))
    assert not use_arena(True)


def test_the_next_run_in_a_process_begins_with_what_is_in_use(in_arena: Arena) -> None:
    kept = empty((LARGE,), torch.empty(0))
    passing = [empty((LARGE,), kept) for _ in range(3)]
    del passing
    assert in_arena.most > kept.nbytes
    assert use_arena(True)
    assert arena._arenas == [in_arena]
    assert in_arena.most == kept.nbytes


def test_who_counts_is_told_of_fakes_that_would_be_in_it(in_arena: Arena) -> None:
    told: list[Tensor] = []
    with FakeTensorMode(), fakes_told(told.append):
        x = torch.empty(LARGE, 2)
        found = [empty_like(x), empty((2,), x)]
    assert [one is two for one, two in zip(told, found, strict=False)] == [True]
    assert in_arena.most == 0
