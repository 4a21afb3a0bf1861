"""Architecture `llama`: Llama 1 to 3, SmolLM2, Mistral 7B and others of the same build.

Nothing but its name tells a Mistral file from a Llama file, and the window of Mistral 7B v0.1
(4096 tokens) is not in it: see `_mistral`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import evolve

from lorakit_gguf.architectures.decoder import (
    ATTENTION,
    MLP,
    QUERY_KEY_VALUE_BIASES,
    TOP,
    all_or_none,
    decoder_config,
    layer,
    refuse_unknown_keys,
    sizes,
    sliding_window,
)
from lorakit_gguf.architectures.rope import rope_scaling
from lorakit_gguf.architectures.table import Architecture, Slot

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit_gguf.file import GGUFFile

_ROPE_FREQS = "rope_freqs.weight"
_NAME_KEYS = ("general.name", "general.basename", "general.base_model.0.name")
_FIRST_MISTRAL = {"rope_theta": 10000.0, "max_position_embeddings": 32768}
_FIRST_WINDOW = 4096


def unpermute(rows: Tensor, heads: int) -> Tensor:
    """Undoes llama.cpp's reordering of the query and key rows.

    Its RoPE turns neighbouring rows (2j, 2j+1), Hugging Face's turns rows (j, j + D/2).  The
    converter therefore interleaves the two halves of each head: row `d` of half `h` goes to
    `2d + h`.  This is the way back.

    Args:
        rows: `[heads * D, in]`, or `[heads * D]` for a bias.
        heads: How many heads the rows belong to.
    """
    halves = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return halves.transpose(1, 2).reshape(rows.shape)


def _query(rows: Tensor, config: Mapping[str, Any]) -> Tensor:
    return unpermute(rows, config["num_attention_heads"])


def _key(rows: Tensor, config: Mapping[str, Any]) -> Tensor:
    return unpermute(rows, config["num_key_value_heads"])


def _permuted(slots: Mapping[str, Slot], **changes: Any) -> dict[str, Slot]:
    fixes = {"attn_q": _query, "attn_k": _key}
    return {
        name: evolve(slot, fix=fixes.get(name.split(".")[2]), **changes)
        for name, slot in slots.items()
    }


_ATTENTION_BIASES = {
    **_permuted(QUERY_KEY_VALUE_BIASES, optional=True),
    "blk.{}.attn_output.bias": layer("self_attn.o_proj.bias", "hidden", optional=True),
}
_MLP_BIASES = {
    "blk.{}.ffn_gate.bias": layer("mlp.gate_proj.bias", "inner", optional=True),
    "blk.{}.ffn_up.bias": layer("mlp.up_proj.bias", "inner", optional=True),
    "blk.{}.ffn_down.bias": layer("mlp.down_proj.bias", "hidden", optional=True),
}


def _config(file: GGUFFile) -> dict[str, Any]:
    refuse_unknown_keys(file, "llama", "attention.sliding_window")
    config = decoder_config(file, "llama")
    theta, head_dim = config["rope_theta"], config["head_dim"]
    layers = config["num_hidden_layers"]
    config["rope_scaling"] = rope_scaling(file, "llama", theta, head_dim, _ROPE_FREQS)
    biases = {
        "attention_bias": all_or_none(file, layers, _ATTENTION_BIASES),
        "mlp_bias": all_or_none(file, layers, _MLP_BIASES),
    }
    window = sliding_window(file, "llama")
    named = any("mistral" in file.get(key, str, "").lower() for key in _NAME_KEYS)
    if window or (named and not any(biases.values())):
        return config | _mistral(config, window)
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **config, **biases}


def _mistral(config: Mapping[str, Any], window: int | None) -> dict[str, Any]:
    """Mistral's model with what is not in the file: only v0.1 has a window, and only v0.1 has
    this base of RoPE with this context."""
    if all(config[key] == value for key, value in _FIRST_MISTRAL.items()):
        window = window or _FIRST_WINDOW
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": window,
    }


LLAMA = Architecture(
    name="llama",
    config=_config,
    sizes=sizes,
    slots=TOP | _permuted(ATTENTION) | MLP | _ATTENTION_BIASES | _MLP_BIASES,
    in_config=frozenset([_ROPE_FREQS]),
)
