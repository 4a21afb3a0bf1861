"""Folding an adapter into the base weights, as the base is stored on disk.

No model is built: a tensor is read, merged if its layer is adapted, and written to the file of
the same name before the next is read.  Everything else of the base directory is kept as it is.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor

from lorakit.atomic import replaced_directory, why_not_writable, write_bytes
from lorakit.errors import RunError, UserError, disk_size
from lorakit.protocols import BaseCheckpoint, Progress, TensorSpec
from lorakit.records import AdapterMethod
from lorakit.runtime import tensors_in_own_pages
from lorakit.weights.dtypes import torch_dtype
from lorakit.weights.part import named_tensors
from lorakit.weights.shard_plan import (
    Plan,
    plan_bytes,
    plan_shards,
    shard_metadata,
    write_index,
)
from lorakit.weights.shard_writer import ShardWriter

Tensors = Mapping[str, Mapping[str, Tensor]]
BaseWeight = Callable[[str, Tensor], Tensor]
"""`(name, stored) -> tensor`: what stands for a stored tensor of the base when it is merged."""

MERGEABLE = ("F64", "F32", "F16", "BF16")
"""Dtypes that a merged weight can be rounded to without scales of its own."""


@frozen
class Merge:
    """What becomes of each tensor of the base.

    Attributes:
        method: Merges one weight.
        options: Its options.
        tensors: The adapter's, by layer and then by name within the adapter.
        base_weight: Stands between the base and the adapter.
    """

    method: AdapterMethod
    options: Any
    tensors: Tensors
    base_weight: BaseWeight | None = None

    @torch.no_grad()
    def __call__(self, name: str, stored: Tensor) -> Tensor:
        """In fp32 where the adapter has a part in it, to be rounded to what is stored."""
        weight = self.base_weight(name, stored) if self.base_weight else stored
        layer = name.removesuffix(".weight")
        if layer not in self.tensors:
            return weight
        return self.method.merge(weight, self.tensors[layer], self.options, layer)


@frozen
class MergedCheckpoint:
    """The merged model as a `lorakit.protocols.BaseCheckpoint`, with the values that
    `merge_adapter` writes."""

    base: BaseCheckpoint
    merge: Merge

    @property
    def path(self) -> Path:
        return self.base.path

    @property
    def config(self) -> Mapping[str, Any]:
        return self.base.config

    def files(self) -> Mapping[str, bytes]:
        return self.base.files()

    def shards(self) -> Mapping[str, Mapping[str, TensorSpec]]:
        return self.base.shards()

    def tensors(self, shard: str | None = None) -> Iterator[tuple[str, Tensor]]:
        names = [n for file, specs in self.shards().items() if shard in (None, file) for n in specs]
        return self.named_tensors(names)

    def named_tensors(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        specs = {
            name: spec for found in plan_shards(self.base).values() for name, spec in found.items()
        }
        for name, stored in named_tensors(self.base, names):
            yield name, self.merge(name, stored).to(torch_dtype(specs[name].dtype))


def merge_adapter(
    base: BaseCheckpoint,
    method: AdapterMethod,
    options: Any,
    tensors: Tensors,
    directory: Path,
    *,
    files: Mapping[str, bytes],
    progress: Progress,
    replace: bool = False,
    base_weight: BaseWeight | None = None,
) -> None:
    """Writes the merged model as a Hugging Face directory, whole or not at all.

    A merged weight is computed in fp32 and rounded once, to the dtype it has in the base.

    Args:
        base: Read tensor by tensor.
        method: Merges one weight.
        options: Its options.
        tensors: The adapter's, by layer and then by name within the adapter.
        directory: Must not exist, or be empty, or be replaced.
        files: Replace or join the base's own side files: the tokenizer training used.
        progress: Counts tensors.
        replace: Take the place of what is in the directory.
        base_weight: Stands between the base and the adapter: for an adapter that was trained
            on other weights than are stored, as on quantized ones.

    Raises:
        UserError: The directory holds something or cannot be made, the disk has too little room,
            or the adapter has a layer that the base lacks.
        RunError: Writing failed; the directory is as it was.
    """
    why = why_not_writable(directory)
    if why:
        raise UserError(f"{directory} cannot be made: {why}", "Name another --output.")
    if not replace and directory.exists() and any(directory.iterdir()):
        raise UserError(f"{directory} exists and is not empty", "Name another --output.")
    merged = Merge(method, options, tensors, base_weight)
    plan = plan_shards(base)
    _check_layers(base, plan, tensors)
    check_room(directory, plan_bytes(plan))
    try:
        with tensors_in_own_pages(), replaced_directory(directory) as folder:
            with ExitStack() as opened:
                files_of = _open_writers(base, plan, folder, opened)
                task = opened.enter_context(progress.task("merging", len(files_of), "tensors"))
                for name, tensor in base.tensors():
                    files_of[name].write(name, merged(name, tensor))
                    task.advance()
            write_index(base, plan, folder)
            _write_side_files(base, files, folder)
    except OSError as error:
        raise RunError(
            f"{directory}: the merged model could not be written: {error}. Nothing is left of it."
        ) from None


def _open_writers(
    base: BaseCheckpoint, plan: Plan, folder: Path, opened: ExitStack
) -> dict[str, ShardWriter]:
    """Tensor name -> the file it goes to."""
    writers = {}
    for shard, specs in plan.items():
        writer = ShardWriter(folder / shard, specs, shard_metadata(base, shard))
        writers.update(dict.fromkeys(specs, opened.enter_context(writer)))
    return writers


def _check_layers(base: BaseCheckpoint, plan: Plan, tensors: Tensors) -> None:
    stored = {name: spec for specs in plan.values() for name, spec in specs.items()}
    lacking = sorted(layer for layer in tensors if f"{layer}.weight" not in stored)
    if lacking:
        raise UserError(
            f"{base.path}: the adapter's {lacking[0]} has no weight in the base "
            f"({len(lacking)} such layers)",
            "The adapter was trained on another base model.",
        )
    for layer in tensors:
        dtype = stored[f"{layer}.weight"].dtype
        if dtype not in MERGEABLE:
            raise UserError(
                f"{base.path}: {layer}.weight is stored as {dtype}, which nothing can be merged "
                "into",
                "Merge into the model in bf16 or fp16.",
            )


def check_room(
    directory: Path, needed: int, fix: str = "Name a directory on another disk."
) -> None:
    """Refuses what the disk of a directory would not take.

    Raises:
        UserError: With both sizes, and the fix.
    """
    place = next(p for p in (directory, *directory.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"{directory}: the merged model takes {disk_size(needed)}, the disk has "
            f"{disk_size(free)} left",
            fix,
        )


def _write_side_files(base: BaseCheckpoint, files: Mapping[str, bytes], folder: Path) -> None:
    stored = base.path / "config.json"
    text = stored.read_bytes() if stored.is_file() else json.dumps(dict(base.config), indent=2)
    config = text if isinstance(text, bytes) else text.encode()
    for name, content in {"config.json": config, **base.files(), **files}.items():
        write_bytes(folder / name, content)
