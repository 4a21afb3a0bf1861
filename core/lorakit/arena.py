"""Memory for large tensors of a CPU run: what one leaves is the next one's, whatever its size.

malloc has two ways with large tensors, and both cost.  Given back to the kernel as they are
freed, each is faulted in anew, page by page: a sixth of the time of a document of 4,096 tokens.
Kept, they are cut up: torch asks for 64-byte alignment, for which glibc looks for a hole 96 bytes
larger than the tensor, so that the hole one leaves does not take the next of its size
(malloc/malloc.c, `_int_memalign`), and its heap grows by 40%.  An arena keeps memory and hands it
out by whole pages, to a tensor of the same size first, else cut off the smallest hole that takes
it; holes next to each other become one.

Reference: Wilson et al. 1995, "Dynamic Storage Allocation: A Survey and Critical Review": best fit.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import weakref
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

PAGE = mmap.PAGESIZE
SPARE = 0.25
"""Share of the memory that is kept for tensors of the sizes it has had, before it is cut up for
others: a block's own come again in the next block, and what stays of each block fits between."""
SMALLEST = 2**18
"""Bytes from which on a tensor is the arena's: smaller ones malloc keeps in any case."""
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Memory is taken when it is written to.  Older Pythons have no name for it."""
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
"""2 where addresses count as memory whether they are used or not (proc(5))."""


class Arena:
    """Addresses enough for all memory that the machine has, of which what is used becomes memory.

    Args:
        size: Bytes of addresses.

    Raises:
        OSError: The system does not give as many.
    """

    def __init__(self, size: int) -> None:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
        self._mapping = mmap.mmap(-1, size, flags=flags)
        self._view = memoryview(self._mapping)
        self._lock = threading.Lock()
        self._lent: dict[int, weakref.ref[memoryview]] = {}
        self._returned: deque[tuple[int, int]] = deque()
        """What tensors have left, start and bytes.  Any thread, and the garbage collector in the
        midst of anything, may add to it, so adding takes no lock."""
        self._exact: dict[int, list[int]] = {}
        """Starts of what tensors have left, by bytes."""
        self._holes: list[tuple[int, int]] = []
        """Bytes and start of what is left of others, the smallest first."""
        self._end = self.most = 0
        """Where that begins which nothing holds, now, and where it ever began: no page from there
        on has become memory."""

    def take(self, size: int) -> memoryview | None:
        """So many bytes, the arena's again once nothing holds the view any more; None, if there is
        no room."""
        size = -(-size // PAGE) * PAGE
        with self._lock:
            start = self._place(size)
        if start is None:
            return None
        view = self._view[start : start + size]
        key = id(view)

        def left(_: object) -> None:
            del self._lent[key]
            self._returned.append((start, size))

        self._lent[key] = weakref.ref(view, left)
        return view

    def give_back(self) -> None:
        """Has the system take the memory that nothing holds."""
        with self._lock:
            self._join_holes()
            free = [(start, size) for size, start in self._holes]
            free.append((self._end, self.most - self._end))
            for start, size in free:
                if size:
                    self._mapping.madvise(mmap.MADV_DONTNEED, start, size)
            self.most = self._end

    def _place(self, size: int) -> int | None:
        self._sort_returned()
        same = self._exact.get(size)
        if same:
            return same.pop()
        start = self._cut_off(size)
        if start is not None:
            return start
        full = self._end + size > len(self._view)
        if full or sum(n * len(starts) for n, starts in self._exact.items()) > SPARE * self._end:
            self._join_holes()
            start = self._cut_off(size)
            if start is not None:
                return start
        if self._end + size > len(self._view):
            return None
        start = self._end
        self._end += size
        self.most = max(self.most, self._end)
        return start

    def _sort_returned(self) -> None:
        while self._returned:
            start, size = self._returned.popleft()
            self._exact.setdefault(size, []).append(start)

    def _cut_off(self, size: int) -> int | None:
        """The start of the smallest hole that is large enough; what is left of it stays one."""
        index = bisect_left(self._holes, (size, 0))
        if index == len(self._holes):
            return None
        found, start = self._holes.pop(index)
        if found > size:
            insort(self._holes, (found - size, start + size))
        return start

    def _join_holes(self) -> None:
        self._sort_returned()
        left = [(start, size) for size, starts in self._exact.items() for start in starts]
        joined = _joined([*left, *((start, size) for size, start in self._holes)])
        self._exact.clear()
        if joined and sum(joined[-1]) == self._end:
            self._end, _ = joined.pop()
        self._holes = sorted((size, start) for start, size in joined)


def _joined(parts: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Starts and sizes, in order, those that follow each other as one."""
    found: list[tuple[int, int]] = []
    for start, size in sorted(parts):
        if found and sum(found[-1]) == start:
            found[-1] = found[-1][0], found[-1][1] + size
        else:
            found.append((start, size))
    return found


_arenas: list[Arena] = []
"""The one in use, if there is one."""


def use_arena(on: bool) -> bool:
    """Has large tensors made in an arena, or by torch as others are; returns whether in one.  What
    tensors an arena of before holds stay as they are, and what it does not need the system gets."""
    give_back_memory()
    if not on:
        _arenas.clear()
    elif not _arenas and sys.platform.startswith("linux") and _addresses_are_free():
        try:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            _arenas.append(Arena(memory))
        except (OSError, ValueError, OverflowError):
            return False
    return bool(_arenas)


def _addresses_are_free() -> bool:
    """Whether to reserve more than is used takes nothing from anybody."""
    import resource

    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return False
    try:
        return _OVERCOMMIT.read_text(encoding="ascii").strip() != "2"
    except (OSError, ValueError):
        return False


def arena_is_on() -> bool:
    """Whether `use_arena` has made one."""
    return bool(_arenas)


def give_back_memory() -> None:
    """Has the system take what the arena in use does not need now."""
    for arena in _arenas:
        arena.give_back()


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """A contiguous tensor with no values yet, of another's dtype and on its device."""
    if _arenas and not torch.compiler.is_compiling():
        size = prod(shape) * like.dtype.itemsize
        if size >= SMALLEST and _is_memory(like):
            view = _arenas[0].take(size)
            if view is not None:
                flat = torch.frombuffer(view, dtype=like.dtype, count=prod(shape))
                # In place: a view's results may not be written over, to autograd's mind.
                return flat.resize_(shape)
        elif size >= SMALLEST and _fakes and isinstance(like, FakeTensor):
            made = like.new_empty(shape)
            _fakes[-1](made)
            return made
    return like.new_empty(shape)


def empty_like(x: Tensor) -> Tensor:
    """A contiguous tensor with no values yet, otherwise like another."""
    return empty(x.shape, x)


def _is_memory(tensor: Tensor) -> bool:
    """Not on another device, nor a fake one."""
    plain = type(tensor) is Tensor or type(tensor) is torch.nn.Parameter
    return plain and tensor.device.type == "cpu"


_fakes: list[Callable[[Tensor], None]] = []


@contextmanager
def fakes_told(tell: Callable[[Tensor], None]) -> Iterator[None]:
    """Within it, fake tensors that would be in the arena are told of: whoever counts what a run
    allocates has malloc make no holes for these."""
    _fakes.append(tell)
    try:
        yield
    finally:
        _fakes.pop()
