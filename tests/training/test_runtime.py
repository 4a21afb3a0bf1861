"""The settings a run makes in its process: what they are where the C library refuses, or the
user."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from lorakit import runtime
from lorakit.arena import use_arena
from lorakit.modules import matmul
from lorakit.runtime import own_pages_from, tensors_in_own_pages, tune_process

CPU = torch.device("cpu")
MIB = 2**20
Malloc = Callable[[int], dict[int, int]]


@pytest.fixture
def malloc_that_takes(monkeypatch: pytest.MonkeyPatch) -> Malloc:
    """`malloc_that_takes(most)` stands for a C library that refuses a larger mmap threshold;
    returns the settings it has taken."""

    def malloc_that_takes(most: int) -> dict[int, int]:
        taken: dict[int, int] = {}

        def mallopt(setting: int, value: int) -> int:
            if setting == runtime.M_MMAP_THRESHOLD and value > most:
                return 0
            taken[setting] = value
            return 1

        monkeypatch.setattr(runtime, "_glibc_mallopt", lambda: mallopt)
        return taken

    monkeypatch.setattr(runtime, "_tuned", dict(runtime._tuned))
    monkeypatch.delenv("LORAKIT_TUNE", raising=False)
    return malloc_that_takes


@pytest.fixture
def as_before() -> Iterator[None]:
    """Puts back what other tests of this process would see."""
    yield
    use_arena(False)
    matmul.use_onednn(False)
    torch.set_flush_denormal(False)


@pytest.mark.parametrize(("most", "kept"), [(2**31, 1024 * MIB), (32 * MIB, 32 * MIB)])
def test_memory_is_kept_as_far_as_the_c_library_lets_it(
    most: int, kept: int, malloc_that_takes: Malloc, as_before: None
) -> None:
    taken = malloc_that_takes(most)
    for _ in range(2):
        assert "malloc keeps" in str(tune_process(CPU))
        assert taken == {
            runtime.M_MMAP_THRESHOLD: kept,
            runtime.M_TRIM_THRESHOLD: 1024 * MIB,
            runtime.M_ARENA_MAX: 1,
        }
        assert own_pages_from(CPU) == kept
    with tensors_in_own_pages():
        # Merging does, around loading, which does.
        with tensors_in_own_pages():
            assert taken[runtime.M_MMAP_THRESHOLD] == MIB
        assert taken[runtime.M_MMAP_THRESHOLD] == MIB
    assert taken[runtime.M_MMAP_THRESHOLD] == kept


def test_another_c_library_has_no_such_heap(
    malloc_that_takes: Malloc, monkeypatch: pytest.MonkeyPatch, as_before: None
) -> None:
    monkeypatch.setattr(runtime, "_glibc_mallopt", lambda: None)
    assert "malloc" not in str(tune_process(CPU))
    assert own_pages_from(CPU) == 0


@pytest.mark.parametrize("why", ["LORAKIT_TUNE=0", "another device", "another processor"])
def test_an_earlier_run_in_the_process_does_not_choose_the_library_for_the_next(
    why: str, malloc_that_takes: Malloc, monkeypatch: pytest.MonkeyPatch, as_before: None
) -> None:
    malloc_that_takes(2**31)
    x = torch.ones(2, 2)
    monkeypatch.setattr(runtime, "prefers_onednn", lambda: True)
    tune_process(CPU)
    if not matmul.by_onednn(x, x):
        pytest.skip("this build of torch has no oneDNN")
    if why == "LORAKIT_TUNE=0":
        monkeypatch.setenv("LORAKIT_TUNE", "0")
    elif why == "another processor":
        monkeypatch.setattr(runtime, "prefers_onednn", lambda: False)
    tune_process(torch.device("cuda") if why == "another device" else CPU)
    assert not matmul.by_onednn(x, x)
