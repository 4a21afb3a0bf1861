"""Keys and values of tokens already seen, for generation."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """One document's keys and values, by attention layer.

    Attributes:
        tokens: `[length]` the tokens cached before the current forward pass.
    """

    def __init__(self) -> None:
        self.clear()

    @property
    def length(self) -> int:
        """Tokens cached before the current forward pass."""
        return len(self.tokens)

    def clear(self) -> None:
        """Forgets everything."""
        self.tokens = torch.empty(0, dtype=torch.long)
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends `[T, H, Dh]` of one layer; returns all of it, `[length + T, H, Dh]`."""
        if layer in self._keys:
            keys = torch.cat([self._keys[layer], keys])
            values = torch.cat([self._values[layer], values])
        self._keys[layer], self._values[layer] = keys, values
        return keys, values

    def advance(self, tokens: Tensor) -> None:
        """Counts `tokens [T]` as cached, once every layer has extended."""
        self.tokens = torch.cat([self.tokens.to(tokens.device), tokens])
