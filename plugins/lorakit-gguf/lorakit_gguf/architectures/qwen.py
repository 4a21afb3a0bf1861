"""Architectures `qwen2` (Qwen 2 and 2.5: biases on query, key and value) and `qwen3` (norms of
query and key heads instead)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorakit_gguf.architectures.decoder import (
    ATTENTION,
    HEAD_NORMS,
    MLP,
    QUERY_KEY_VALUE_BIASES,
    TOP,
    decoder_config,
    refuse_unknown_keys,
    sizes,
)
from lorakit_gguf.architectures.rope import rope_scaling
from lorakit_gguf.architectures.table import Architecture

if TYPE_CHECKING:
    from lorakit_gguf.file import GGUFFile


def _config(file: GGUFFile, name: str) -> dict[str, Any]:
    refuse_unknown_keys(file, name)
    config = decoder_config(file, name)
    config["rope_scaling"] = rope_scaling(file, name, config["rope_theta"], config["head_dim"])
    return {"model_type": name, **config, "use_sliding_window": False}


def _qwen2(file: GGUFFile) -> dict[str, Any]:
    return {"architectures": ["Qwen2ForCausalLM"], **_config(file, "qwen2")}


def _qwen3(file: GGUFFile) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        **_config(file, "qwen3"),
        "attention_bias": False,
    }


QWEN2 = Architecture(
    name="qwen2",
    config=_qwen2,
    sizes=sizes,
    slots=TOP | ATTENTION | QUERY_KEY_VALUE_BIASES | MLP,
)
QWEN3 = Architecture(
    name="qwen3", config=_qwen3, sizes=sizes, slots=TOP | ATTENTION | HEAD_NORMS | MLP
)
