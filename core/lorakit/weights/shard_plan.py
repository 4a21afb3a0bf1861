"""Which file each tensor of a written model goes to."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from lorakit.atomic import write_bytes
from lorakit.protocols import BaseCheckpoint, TensorSpec
from lorakit.weights.dtypes import torch_dtype
from lorakit.weights.shard_writer import stored_bytes

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LARGEST_SHARD = 5_000_000_000
"""In bytes, where the base has no safetensors files whose names could be kept."""

Plan = Mapping[str, Mapping[str, TensorSpec]]


def plan_shards(base: BaseCheckpoint, largest: int = LARGEST_SHARD) -> Plan:
    """File name -> tensor name -> spec, in the base's order.

    A base of safetensors files keeps them.  Of any other, all tensors go into `model.safetensors`,
    or into several files of at most `largest` bytes; those that safetensors has no dtype for
    (`Q4_1`) are written as they are read, in F32.
    """
    shards = base.shards()
    if keeps_shards(base):
        return shards
    return fill_shards(
        {
            name: TensorSpec(stored.shape, stored.dtype if torch_dtype(stored.dtype) else "F32")
            for specs in shards.values()
            for name, stored in specs.items()
        },
        largest,
    )


def fill_shards(specs: Mapping[str, TensorSpec], largest: int = LARGEST_SHARD) -> Plan:
    """`model.safetensors`, or several files, each filled until the next tensor would not fit."""
    filled: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if filled[-1] and size + stored_bytes(spec) > largest:
            filled.append({})
            size = 0
        filled[-1][name] = spec
        size += stored_bytes(spec)
    if len(filled) == 1:
        return {SINGLE: filled[0]}
    count = len(filled)
    return {
        f"model-{number:05d}-of-{count:05d}.safetensors": specs
        for number, specs in enumerate(filled, 1)
    }


def keeps_shards(base: BaseCheckpoint) -> bool:
    """Whether the base is made of safetensors files."""
    return all(n.endswith(".safetensors") and (base.path / n).is_file() for n in base.shards())


def plan_bytes(plan: Plan) -> int:
    return sum(stored_bytes(spec) for specs in plan.values() for spec in specs.values())


def shard_metadata(base: BaseCheckpoint, shard: str) -> dict[str, str]:
    """The base file's `__metadata__`; readers insist on its `format`."""
    from safetensors import safe_open

    kept: dict[str, str] = {}
    if keeps_shards(base):
        with safe_open(base.path / shard, framework="pt") as opened:
            kept = opened.metadata() or {}
    return {"format": "pt", **kept}


def write_index(base: BaseCheckpoint, plan: Plan, folder: Path) -> None:
    """The base's index as it is; a new one where it has none and one is needed."""
    index = base.path / INDEX
    if keeps_shards(base) and index.is_file():
        write_bytes(folder / INDEX, index.read_bytes())
    elif list(plan) != [SINGLE]:
        weight_map = {name: shard for shard, specs in plan.items() for name in specs}
        content = {"metadata": {"total_size": plan_bytes(plan)}, "weight_map": weight_map}
        write_bytes(folder / INDEX, json.dumps(content, indent=2).encode())
