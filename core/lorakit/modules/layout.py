"""Where the documents of a micro-batch lie."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

V = TypeVar("V")
Segments = tuple[slice, ...]
"""Where a document's tokens lie on the token axis, in order."""


class Layout:
    """Documents along a single token axis `[T]`, one after the other.

    Documents that begin alike may have on it once what they have in common: see
    `lorakit.data.prefixes`.  Then S, the documents' tokens together, is more than T.

    Attributes:
        lengths: Tokens of each document; their sum is S.
        positions: `[T]` each token's place in its own document, from 0 (or from where a cached
            prefix ends).
        segments: For each document, where its tokens lie.  The last slice is its own; those before
            it, if any, belong to documents before it.
        places: `[S]` for each token of each document, where it lies; None where S is T.
        owners: `[T]` for each token, which of the S it is in the document that it belongs to; None
            where S is T.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        positions: Tensor,
        *,
        segments: Sequence[Segments] = (),
        places: Tensor | None = None,
        owners: Tensor | None = None,
    ) -> None:
        self.lengths = tuple(lengths)
        self.positions = positions
        self.segments = tuple(segments) or apart(self.lengths)
        self.places, self.owners = places, owners
        self._derived: dict[Hashable, Any] = {}

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device | None = None) -> Layout:
        """Documents of these lengths, each starting at position 0."""
        return cls(lengths, torch.cat([torch.arange(n, device=device) for n in lengths]))

    @classmethod
    def of_segments(cls, segments: Sequence[Segments]) -> Layout:
        """Documents whose tokens lie there, each starting at position 0; on the CPU."""
        lengths = [sum(map(_size, parts)) for parts in segments]
        if all(len(parts) == 1 for parts in segments):
            return cls.of_lengths(lengths)
        own = [
            torch.arange(n - _size(parts[-1]), n)
            for parts, n in zip(segments, lengths, strict=True)
        ]
        starts = accumulate(lengths, initial=0)
        return cls(
            lengths,
            torch.cat(own),
            segments=segments,
            places=torch.cat([torch.arange(p.start, p.stop) for parts in segments for p in parts]),
            owners=torch.cat([inside + start for inside, start in zip(own, starts, strict=False)]),
        )

    @classmethod
    def continued(cls, start: int, length: int, device: torch.device | None = None) -> Layout:
        """One document of which the first `start` tokens are in a cache already."""
        return cls((length,), torch.arange(start, start + length, device=device))

    def followed_by(self, length: int) -> Layout:
        """With one document more, which shares nothing."""
        own = torch.arange(length, device=self.positions.device)
        here, whole = len(self.positions), sum(self.lengths)
        places, owners = self.places, self.owners
        if places is not None and owners is not None:
            places, owners = torch.cat([places, own + here]), torch.cat([owners, own + whole])
        return Layout(
            (*self.lengths, length),
            torch.cat([self.positions, own]),
            segments=(*self.segments, (slice(here, here + length),)),
            places=places,
            owners=owners,
        )

    def derived(self, key: Hashable, make: Callable[[], V]) -> V:
        """What every block needs alike (RoPE tables, masks), computed once a micro-batch."""
        if key not in self._derived:
            self._derived[key] = make()
        found: V = self._derived[key]
        return found

    def to(self, device: torch.device) -> Layout:
        return self._each(lambda x: x.to(device, non_blocking=True))

    def pinned(self) -> Layout:
        """In page-locked memory."""
        return self._each(lambda x: x.pin_memory())

    def _each(self, move: Callable[[Tensor], Tensor]) -> Layout:
        return Layout(
            self.lengths,
            move(self.positions),
            segments=self.segments,
            places=None if self.places is None else move(self.places),
            owners=None if self.owners is None else move(self.owners),
        )


def apart(lengths: Sequence[int]) -> tuple[Segments, ...]:
    """Where documents of these lengths lie that share nothing."""
    return tuple((slice(a, b),) for a, b in pairwise(accumulate(lengths, initial=0)))


def _size(part: slice) -> int:
    size: int = part.stop - part.start
    return size
