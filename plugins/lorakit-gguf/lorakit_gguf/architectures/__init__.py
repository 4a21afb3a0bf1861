"""The model architectures this plugin can read, one table each.

To add one: a module beside `llama.py` with an `Architecture`, and its line in `ARCHITECTURES`.
"""

from __future__ import annotations

from lorakit.errors import UserError, listing
from lorakit_gguf.architectures.gemma import GEMMA, GEMMA2, GEMMA3
from lorakit_gguf.architectures.llama import LLAMA
from lorakit_gguf.architectures.phi3 import PHI3
from lorakit_gguf.architectures.qwen import QWEN2, QWEN3
from lorakit_gguf.architectures.table import Architecture
from lorakit_gguf.file import GGUFFile

_ALL = (LLAMA, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI3)
ARCHITECTURES = {architecture.name: architecture for architecture in _ALL}
"""By the value of `general.architecture`."""


def architecture_of(file: GGUFFile) -> Architecture:
    """Raises `UserError` for an architecture without a table."""
    name = file.get("general.architecture", str)
    if name not in ARCHITECTURES:
        raise UserError(
            f"{file.path}: of architecture {name!r}; supported: {listing(ARCHITECTURES)}",
            "Take the model in Hugging Face's format (config.json and safetensors).",
        )
    return ARCHITECTURES[name]
