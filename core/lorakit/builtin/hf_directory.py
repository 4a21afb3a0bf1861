"""Hugging Face model directories: config.json and safetensors, in one file or in shards.

Format: https://github.com/huggingface/safetensors (each file starts with a JSON header), and
transformers' `model.safetensors.index.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import UserError
from lorakit.protocols import TensorSpec
from lorakit.weights.safetensors_file import read_header, read_tensors

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LARGEST_SIDE_FILE = 100_000_000
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx")


def claims(path: Path) -> bool:
    """A directory with config.json and safetensors."""
    if not (path / "config.json").is_file():
        return False
    return (path / INDEX).is_file() or any(path.glob("*.safetensors"))


class HuggingFaceDirectory:
    """A `lorakit.protocols.BaseCheckpoint` over a model directory.

    Raises:
        UserError: config.json or the index is malformed, or a shard is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config: Mapping[str, Any] = read_json(path / "config.json")

    def files(self) -> Mapping[str, bytes]:
        return {
            p.name: p.read_bytes()
            for p in sorted(self.path.iterdir())
            if _is_side_file(p) and p.name != "config.json"
        }

    @cached_property
    def _shard_names(self) -> list[str]:
        if (self.path / INDEX).is_file():
            weight_map = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{self.path / INDEX}: no weight_map")
            names = sorted(set(weight_map.values()))
        else:
            names = [SINGLE] if (self.path / SINGLE).is_file() else []
            names = names or sorted(p.name for p in self.path.glob("*.safetensors"))
        missing = [n for n in names if not (self.path / n).is_file()]
        if missing:
            raise UserError(
                f"{self.path}: {len(missing)} of {len(names)} weight files are missing: "
                f"{', '.join(missing[:4])}",
                "The download may have been cut off; fetch the directory again.",
            )
        return names

    def shards(self) -> Mapping[str, Mapping[str, TensorSpec]]:
        return {name: read_header(self.path / name) for name in self._shard_names}

    def tensors(self, shard: str | None = None) -> Iterator[tuple[str, Tensor]]:
        for name in [shard] if shard else self._shard_names:
            yield from read_tensors(self.path / name)


def _is_side_file(path: Path) -> bool:
    if not path.is_file() or path.name.startswith("."):
        return False
    if path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json"):
        return False
    return path.stat().st_size <= LARGEST_SIDE_FILE


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: The file is missing, or is no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no file {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def claims_local(path: str) -> bool:
    """A path that exists here."""
    try:
        return bool(path) and Path(path).expanduser().exists()
    # A user that does not exist, a name that is too long: nothing is there.
    except (OSError, RuntimeError, ValueError):
        return False


def fetch_local(path: str, progress: Any) -> Path:
    """The path itself, absolute."""
    return Path(path).expanduser().resolve()
