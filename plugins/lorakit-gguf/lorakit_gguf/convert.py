"""Writes any base checkpoint as a Hugging Face model directory.

The weights are streamed: the headers say beforehand where each tensor goes, so that one tensor
is in memory at a time, however large the model.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lorakit.protocols import TensorSpec
from lorakit.weights.dtypes import dtype_name
from lorakit.weights.shard_plan import LARGEST_SHARD, fill_shards, write_index
from lorakit.weights.shard_writer import ShardWriter

if TYPE_CHECKING:
    from lorakit.protocols import BaseCheckpoint, Progress


def write_directory(
    checkpoint: BaseCheckpoint,
    directory: Path,
    progress: Progress,
    *,
    dtype: torch.dtype = torch.float32,
    most_shard_bytes: int = LARGEST_SHARD,
) -> None:
    """Writes config.json, the tokenizer's and other small files, and the weights.

    Args:
        checkpoint: What to write.
        directory: Where to; it exists.
        progress: Shows a task, counted in tensors.
        dtype: All tensors are converted to it: float32, float16 or bfloat16.
        most_shard_bytes: Tensors of more bytes than this are spread over several files.

    Raises:
        UserError: The checkpoint cannot be read.
        OSError: The directory cannot be written to.
    """
    config = {**checkpoint.config, "torch_dtype": str(dtype).removeprefix("torch.")}
    _write_json(directory / "config.json", config)
    for name, content in checkpoint.files().items():
        (directory / name).write_bytes(content)
    _write_weights(checkpoint, directory, progress, dtype, most_shard_bytes)


def _write_weights(
    checkpoint: BaseCheckpoint,
    directory: Path,
    progress: Progress,
    dtype: torch.dtype,
    most_shard_bytes: int,
) -> None:
    specs = {
        name: TensorSpec(spec.shape, dtype_name(dtype))
        for shard in checkpoint.shards().values()
        for name, spec in shard.items()
    }
    plan = fill_shards(specs, most_shard_bytes)
    with ExitStack() as stack:
        file_of: dict[str, ShardWriter] = {}
        for name, tensors in plan.items():
            writer = ShardWriter(directory / name, tensors, {"format": "pt"})
            file_of |= dict.fromkeys(tensors, stack.enter_context(writer))
        title = f"Converting {checkpoint.path.name}"
        task = stack.enter_context(progress.task(title, len(specs), "tensors"))
        for name, tensor in checkpoint.tensors():
            file_of[name].write(name, tensor)
            task.advance()
    write_index(checkpoint, plan, directory)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
