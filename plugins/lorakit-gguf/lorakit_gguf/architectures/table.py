"""What it takes to read an architecture: names, shapes, and what llama.cpp changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from attrs import frozen

from lorakit.errors import UserError, listing

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit_gguf.file import GGUFFile

Fix: TypeAlias = "Callable[[Tensor, Mapping[str, Any]], Tensor]"
"""`fix(tensor, config)` turns a tensor as llama.cpp stores it into Hugging Face's."""

_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]*)\.(.+)")


@frozen(kw_only=True)
class Slot:
    """A place for a tensor.

    Attributes:
        name: Hugging Face's; `{}` stands for the layer.
        shape: Names of sizes, looked up in what `Architecture.sizes` gives.
        optional: The file may leave it out, in all layers alike.
        fix: What has to be done to it.
    """

    name: str
    shape: tuple[str, ...]
    optional: bool = False
    fix: Fix | None = None


@frozen(kw_only=True)
class Architecture:
    """A model architecture of llama.cpp's.

    Attributes:
        name: The value of `general.architecture`.
        config: `config(file)` gives config.json.  Raises `UserError` for what it cannot honour.
        sizes: `sizes(config)` gives the sizes that slots' shapes name.
        slots: By llama.cpp's tensor name; `blk.{}.` starts those of a layer.
        in_config: Tensors that `config` has made use of and that are no parameters.
    """

    name: str
    config: Callable[[GGUFFile], dict[str, Any]]
    sizes: Callable[[Mapping[str, Any]], Mapping[str, int]]
    slots: Mapping[str, Slot]
    in_config: frozenset[str] = frozenset()

    def slot(self, tensor: str) -> tuple[Slot, str] | None:
        """The slot of llama.cpp's `tensor` and its Hugging Face name; None if there is none."""
        block = _BLOCK.fullmatch(tensor)
        slot = self.slots.get(f"blk.{{}}.{block[2]}" if block else tensor)
        if slot is None:
            return None
        return slot, slot.name.format(block[1]) if block else slot.name

    def expected(self, layers: int) -> Iterator[str]:
        """llama.cpp's names of all tensors that may not be missing."""
        for name, slot in self.slots.items():
            if not slot.optional:
                yield from (name.format(i) for i in range(layers if "{}" in name else 1))

    def check(self, file: GGUFFile, config: Mapping[str, Any]) -> None:
        """Holds the file's tensors against the table.

        Raises:
            UserError: Some are missing, unknown, or not of the shape the metadata implies.
        """
        layers = config["num_hidden_layers"]
        if missing := [name for name in self.expected(layers) if name not in file.tensors]:
            raise UserError(f"{file.path}: without the tensors {_some(missing)}")
        known = {name.format(i) for name in self.slots for i in range(layers)}
        if unknown := [n for n in file.tensors if n not in known and n not in self.in_config]:
            raise UserError(
                f"{file.path}: has tensors that a {self.name} model of {layers} layers has no "
                f"place for: {_some(unknown)}"
            )
        sizes = self.sizes(config)
        for name, stored in file.tensors.items():
            if (found := self.slot(name)) is None:
                continue
            shape = tuple(sizes[size] for size in found[0].shape)
            if stored.shape != shape:
                raise UserError(
                    f"{file.path}: the tensor {name} has shape {list(stored.shape)}, but by the "
                    f"metadata it should have {list(shape)}"
                )


def _some(names: list[str], most: int = 3) -> str:
    more = len(names) - most
    return listing(names) if more < 1 else f"{', '.join(names[:most])} and {more} more"
