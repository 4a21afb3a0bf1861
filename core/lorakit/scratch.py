"""Memory that is written to and done with over and over, and so is kept between uses."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lorakit.runtime import tensors_in_own_pages

_ALIGNMENT = 64
Kept = dict[tuple[str, torch.device, int], Tensor]
"""By use, device and slot."""
_kept: Kept = {}
_kept_fakes: list[Kept] = []


_slot = threading.local()


def slot() -> int:
    """Whose memory the calling thread writes to: 0, but within `in_slot`."""
    return getattr(_slot, "number", 0)


@contextmanager
def in_slot(number: int) -> Iterator[None]:
    """Within it, the calling thread has memory of its own: each of the threads that run at the same
    time takes another number.  A thread that waits for them meanwhile may have one of theirs."""
    before, _slot.number = slot(), number
    try:
        yield
    finally:
        _slot.number = before


def scratch(
    use: str, like: Tensor, *wanted: tuple[Sequence[int], torch.dtype]
) -> tuple[Tensor, ...]:
    """Tensors with no values yet, all in one piece of memory that stays the process's.

    On a CPU, a large tensor made anew each time costs a page fault for every 4 KB, or, where
    malloc keeps it, leaves holes that the next one does not fit into: 216 MB resident were
    measured for one of 64 MB.

    Args:
        use: The next call for the same use in the same slot writes over what this one returned; two
            uses, and two slots, never share memory.
        like: Gives the device.
        wanted: A shape and a dtype each.
    """
    fake = isinstance(like, FakeTensor)
    if torch.compiler.is_compiling() or like.is_meta or (fake and not _kept_fakes):
        # A compiler plans memory itself, and what has no memory needs none kept.
        return tuple(like.new_empty(shape, dtype=dtype) for shape, dtype in wanted)
    sizes = [prod(shape) * dtype.itemsize for shape, dtype in wanted]
    places = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    memory = _memory(_kept_fakes[-1] if fake else _kept, (use, like.device, slot()), sum(places))
    parts = memory[: sum(places)].split(places)
    return tuple(
        part[:size].view(dtype).view(*shape)
        for part, size, (shape, dtype) in zip(parts, sizes, wanted, strict=True)
    )


@contextmanager
def fakes_kept() -> Iterator[Kept]:
    """Within it, fake tensors' scratch memory is kept too, in the mapping given: whoever counts
    what a run allocates has it count this once."""
    _kept_fakes.append({})
    try:
        yield _kept_fakes[-1]
    finally:
        _kept_fakes.pop()


def _memory(kept: Kept, key: tuple[str, torch.device, int], size: int) -> Tensor:
    found = kept.get(key)
    if found is None or len(found) < size:
        # Dropped first, so that old and new are never held at once.
        del found
        kept.pop(key, None)
        with torch.inference_mode(False), tensors_in_own_pages():
            found = kept[key] = torch.empty(size, dtype=torch.uint8, device=key[1])
    return found
