"""Folding an adapter into the base weights, shard by shard, as the base is stored on disk.

No model is built: a shard is read, the adapted layers in it are merged, and it is written under
the same name.  Everything else of the base directory is kept as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.atomic import replaced_directory, write_bytes
from lorakit.errors import UserError
from lorakit.protocols import BaseCheckpoint, Progress
from lorakit.records import AdapterMethod

Tensors = Mapping[str, Mapping[str, Tensor]]


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
) -> None:
    """Writes the merged model as a Hugging Face directory, whole or not at all.

    Args:
        base: Read tensor by tensor; one shard is in memory at a time.
        method: Merges one weight.
        options: Its options.
        tensors: The adapter's, by layer and then by name within the adapter.
        directory: Must not exist, or be empty, or be replaced.
        files: Replace or join the base's own side files: the tokenizer training used.
        progress: Counts tensors.
        replace: Take the place of what is in the directory.

    Raises:
        UserError: The directory holds something, or the adapter has a layer the base lacks.
    """
    if not replace and directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists and is not empty", "Name another --output.")
    shards = base.shards()
    stored = {name for shard in shards.values() for name in shard}
    lacking = sorted(layer for layer in tensors if f"{layer}.weight" not in stored)
    if lacking:
        raise UserError(
            f"{base.path}: the adapter's {lacking[0]} has no weight in the base "
            f"({len(lacking)} such layers)",
            "The adapter was trained on another base model.",
        )
    with (
        replaced_directory(directory) as folder,
        progress.task("merging", len(stored), unit="tensors") as task,
    ):
        for shard in shards:
            merged: dict[str, Tensor] = {}
            for name, tensor in base.tensors(shard):
                layer = name.removesuffix(".weight")
                if layer in tensors:
                    merged[name] = _merge_one(tensor, method, options, tensors[layer], layer)
                else:
                    merged[name] = tensor
                task.advance()
            _save_shard(merged, folder / shard)
            del merged
        if len(shards) > 1:
            write_bytes(folder / "model.safetensors.index.json", _index(shards, base))
        write_bytes(folder / "config.json", (json.dumps(dict(base.config), indent=2)).encode())
        for name, content in {**base.files(), **files}.items():
            write_bytes(folder / name, content)


@torch.no_grad()
def _merge_one(
    weight: Tensor, method: AdapterMethod, options: Any, tensors: Mapping[str, Tensor], layer: str
) -> Tensor:
    return method.merge(weight, tensors, options, layer).to(weight.dtype).contiguous()


def _save_shard(tensors: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata={"format": "pt"})
    # safetensors writes with the owner's permissions alone.
    path.chmod(path.parent.stat().st_mode & 0o666)


def _index(shards: Mapping[str, Mapping[str, Any]], base: BaseCheckpoint) -> bytes:
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    index_path = base.path / "model.safetensors.index.json"
    metadata = {}
    if index_path.is_file():
        metadata = json.loads(index_path.read_text(encoding="utf-8")).get("metadata", {})
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2).encode()
