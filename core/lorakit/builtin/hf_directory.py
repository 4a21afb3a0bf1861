"""Hugging Face model directories: config.json and weights, in one file or in shards.

The weights are safetensors or, failing those, pytorch_model*.bin; shards are listed in
transformers' `model.safetensors.index.json` or `pytorch_model.bin.index.json`.
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
TORCH_INDEX = "pytorch_model.bin.index.json"
TORCH_SINGLE = "pytorch_model.bin"
LARGEST_SIDE_FILE = 100_000_000
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx")


def claims(path: Path) -> bool:
    """A directory with config.json and safetensors."""
    if not (path / "config.json").is_file():
        return False
    return (path / INDEX).is_file() or any(path.glob("*.safetensors"))


def claims_torch(path: Path) -> bool:
    """A directory with config.json and pytorch_model*.bin, without safetensors."""
    if claims(path) or not (path / "config.json").is_file():
        return False
    return (path / TORCH_INDEX).is_file() or any(path.glob("pytorch_model*.bin"))


class HuggingFaceDirectory:
    """A `lorakit.protocols.BaseCheckpoint` over a model directory with safetensors.

    Raises:
        UserError: config.json or the index is malformed, or a shard is missing.
    """

    _index, _single, _pattern = INDEX, SINGLE, "*.safetensors"

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
        index = self.path / self._index
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if (
                not isinstance(weight_map, dict)
                or not weight_map
                or not all(isinstance(file, str) for file in weight_map.values())
            ):
                raise UserError(f"{index}: no weight_map of file names")
            names = sorted(set(weight_map.values()))
        else:
            names = [self._single] if (self.path / self._single).is_file() else []
            names = names or sorted(p.name for p in self.path.glob(self._pattern))
        missing = [n for n in names if not (self.path / n).is_file()]
        if missing:
            raise UserError(
                f"{self.path}: {len(missing)} of {len(names)} weight files are missing: "
                f"{', '.join(missing[:4])}",
                "The download may have been cut off; fetch the directory again.",
            )
        return names

    @cached_property
    def _headers(self) -> Mapping[str, Mapping[str, TensorSpec]]:
        return {name: read_header(self.path / name) for name in self._shard_names}

    def shards(self) -> Mapping[str, Mapping[str, TensorSpec]]:
        return self._headers

    def tensors(self, shard: str | None = None) -> Iterator[tuple[str, Tensor]]:
        for name in [shard] if shard else self._shard_names:
            yield from read_tensors(self.path / name)


class TorchDirectory(HuggingFaceDirectory):
    """The same over pytorch_model*.bin; its shards go by the names they have as safetensors.

    Raises:
        UserError: As `HuggingFaceDirectory`; from a file: see `lorakit.weights.torch_file`.
    """

    _index, _single, _pattern = TORCH_INDEX, TORCH_SINGLE, "pytorch_model*.bin"

    @cached_property
    def _headers(self) -> Mapping[str, Mapping[str, TensorSpec]]:
        from lorakit.weights.torch_file import read_header

        return {as_safetensors(name): read_header(self.path / name) for name in self._shard_names}

    def tensors(self, shard: str | None = None) -> Iterator[tuple[str, Tensor]]:
        from lorakit.weights.torch_file import read_tensors

        for name in self._shard_names:
            if shard in (None, as_safetensors(name)):
                yield from read_tensors(self.path / name)


def as_safetensors(name: str) -> str:
    """`pytorch_model-00001-of-00002.bin` -> `model-00001-of-00002.safetensors`."""
    return name.removeprefix("pytorch_").removesuffix(".bin") + ".safetensors"


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
