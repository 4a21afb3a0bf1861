"""Keys and values of tokens already seen, for generation."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """One document's keys and values, by attention layer.

    Attributes:
        length: Tokens cached before the current forward pass.
    """

    def __init__(self) -> None:
        self.length = 0
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Appends `[T, H, Dh]` of one layer; returns all of it, `[length + T, H, Dh]`."""
        if layer in self._keys:
            keys = torch.cat([self._keys[layer], keys])
            values = torch.cat([self._values[layer], values])
        self._keys[layer], self._values[layer] = keys, values
        return keys, values

    def advance(self, tokens: int) -> None:
        """Counts `tokens` as cached, once every layer has extended."""
        self.length += tokens
