"""A checkpoint of random weights from a config.json alone, as large as the model is.

    python -m tests.bench.random_checkpoint CONFIG.json DIR [--tokenizer DIR]

Names and shapes are those lorakit's family builds, which tests hold equal to transformers'.
Shards are written tensor by tensor, so that 14.5 GB are made with little memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import torch

DTYPES = {"bfloat16": ("BF16", torch.bfloat16, 2), "float32": ("F32", torch.float32, 4)}


def shapes(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    """Parameter names and shapes of the family that owns the config."""
    from lorakit.base_model import build_on_meta
    from lorakit.catalog import load_catalog
    from lorakit.weights.base import family_of

    family = family_of(config, load_catalog(), Path("config.json"))
    model = build_on_meta(family, config, family.options(path="-"))
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def shards(
    wanted: dict[str, tuple[int, ...]], item: int, largest: int
) -> Iterator[dict[str, tuple[int, ...]]]:
    """Consecutive tensors, up to `largest` bytes together."""
    shard: dict[str, tuple[int, ...]] = {}
    size = 0
    for name, shape in wanted.items():
        count = item * int(torch.Size(shape).numel())
        if shard and size + count > largest:
            yield shard
            shard, size = {}, 0
        shard[name] = shape
        size += count
    yield shard


def write_shard(path: Path, shard: dict[str, tuple[int, ...]], dtype: str, seed: int) -> None:
    word, torch_dtype, item = DTYPES[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shard.items():
        end = offset + item * torch.Size(shape).numel()
        header[name] = {"dtype": word, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(seed)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shard.items():
            value = torch.ones(shape)
            if "norm" not in name:
                value = torch.randn(shape, generator=generator).mul_(0.02)
            file.write(value.to(torch_dtype).view(torch.uint8).flatten().numpy().data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="its files are copied")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--shard-gigabytes", type=float, default=5.0)
    given = parser.parse_args()
    given.directory.mkdir(parents=True, exist_ok=True)
    config = json.loads(given.config.read_text(encoding="utf-8"))
    (given.directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    parts = list(shards(shapes(config), DTYPES[given.dtype][2], int(given.shard_gigabytes * 10**9)))
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(parts, 1):
        name = f"model-{index:05d}-of-{len(parts):05d}.safetensors"
        print(f"{name}: {len(shard)} tensors", flush=True)
        write_shard(given.directory / name, shard, given.dtype, index)
        weight_map |= dict.fromkeys(shard, name)
    index_file = given.directory / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    if given.tokenizer:
        # The directory may be a whole model's.
        for file in given.tokenizer.glob("*token*"):
            shutil.copy(file, given.directory / file.name)


if __name__ == "__main__":
    main()
