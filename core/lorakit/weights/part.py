"""Some of a checkpoint's tensors, as a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from lorakit.protocols import BaseCheckpoint, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor


def named_tensors(
    checkpoint: BaseCheckpoint, names: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of these names, in the files' order; files without any are not opened."""
    offered = getattr(checkpoint, "named_tensors", None)
    if offered is not None:
        yield from offered(names)
        return
    for shard, specs in checkpoint.shards().items():
        if any(name in specs for name in names):
            for name, tensor in checkpoint.tensors(shard):
                if name in names:
                    yield name, tensor


@frozen
class Part:
    """A `lorakit.protocols.BaseCheckpoint` of a module of the model.

    Attributes:
        whole: Has all tensors.
        names: Those of the module, as the checkpoint names them.
        prefix: What these start with, and the names given out do not.
    """

    whole: BaseCheckpoint
    names: frozenset[str]
    prefix: str = ""

    @property
    def path(self) -> Path:
        return self.whole.path

    @property
    def config(self) -> Mapping[str, Any]:
        return self.whole.config

    def files(self) -> Mapping[str, bytes]:
        return self.whole.files()

    def shards(self) -> Mapping[str, Mapping[str, TensorSpec]]:
        return {
            shard: {n.removeprefix(self.prefix): specs[n] for n in specs if n in self.names}
            for shard, specs in self.whole.shards().items()
        }

    def tensors(self, shard: str | None = None) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named_tensors(self.whole, self.names):
            yield name.removeprefix(self.prefix), tensor
