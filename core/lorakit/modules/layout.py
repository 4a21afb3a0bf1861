"""Where the documents of a micro-batch lie."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

V = TypeVar("V")


class Layout:
    """Documents one after the other along a single token axis.

    Attributes:
        lengths: Tokens of each document; their sum is T.
        positions: `[T]` each token's place in its own document, from 0 (or from where a cached
            prefix ends).
    """

    def __init__(self, lengths: Sequence[int], positions: Tensor) -> None:
        self.lengths = tuple(lengths)
        self.positions = positions
        self._derived: dict[Hashable, Any] = {}

    @classmethod
    def of_lengths(cls, lengths: Sequence[int], device: torch.device | None = None) -> Layout:
        """Documents of these lengths, each starting at position 0."""
        return cls(lengths, torch.cat([torch.arange(n, device=device) for n in lengths]))

    @classmethod
    def continued(cls, start: int, length: int, device: torch.device | None = None) -> Layout:
        """One document of which the first `start` tokens are in a cache already."""
        return cls((length,), torch.arange(start, start + length, device=device))

    def derived(self, key: Hashable, make: Callable[[], V]) -> V:
        """What every block needs alike (RoPE tables, masks), computed once a micro-batch."""
        if key not in self._derived:
            self._derived[key] = make()
        found: V = self._derived[key]
        return found

    def to(self, device: torch.device) -> Layout:
        return Layout(self.lengths, self.positions.to(device, non_blocking=True))
