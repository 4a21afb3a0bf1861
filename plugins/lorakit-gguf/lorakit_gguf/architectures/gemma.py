"""Architectures `gemma`, `gemma2` and `gemma3` (text).

Gemma scales by 1 + weight after each norm; llama.cpp stores that sum.  Not in the files: Gemma 2's
and 3's pattern of layers with and without a window (newer files have it), the base of RoPE in
layers with a window, and the scale of the 27B models' attention, which llama.cpp too tells by the
number of layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import evolve

from lorakit_gguf.architectures.decoder import (
    ATTENTION,
    HEAD_NORMS,
    MLP,
    TOP,
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

_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
_PERIOD = {"gemma2": 2, "gemma3": 6}
_LOCAL_ROPE_BASE = 10000.0


def _minus_one(weight: Tensor, config: Mapping[str, Any]) -> Tensor:
    return weight - 1


def _shifted(slots: Mapping[str, Slot]) -> dict[str, Slot]:
    """Every norm's weight stored plus one."""
    return {
        name: evolve(slot, fix=_minus_one) if name.endswith("norm.weight") else slot
        for name, slot in slots.items()
    }


_SANDWICH = {
    "blk.{}.post_attention_norm.weight": layer("post_attention_layernorm.weight", "hidden"),
    "blk.{}.ffn_norm.weight": layer("pre_feedforward_layernorm.weight", "hidden"),
    "blk.{}.post_ffw_norm.weight": layer("post_feedforward_layernorm.weight", "hidden"),
}


def _base(file: GGUFFile, name: str, *known: str) -> dict[str, Any]:
    refuse_unknown_keys(file, name, *known)
    config = decoder_config(file, name, act="gelu_pytorch_tanh")
    config["hidden_activation"] = config["hidden_act"]
    config["attention_bias"] = False
    return config


def _gemma(file: GGUFFile) -> dict[str, Any]:
    config = _base(file, "gemma")
    scaling = rope_scaling(file, "gemma", config["rope_theta"], config["head_dim"])
    return {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        **config,
        "rope_scaling": scaling,
    }


def _windows(file: GGUFFile, name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Which layers see a window only, and the scale of attention."""
    layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    if layers == _LAYERS_OF_27B[name]:
        head_dim = config["hidden_size"] // config["num_attention_heads"]
    key = f"{name}.attention.sliding_window_pattern"
    if isinstance(file.fields.get(key), list):
        local = [bool(value) for value in file.get(key, list)]
    else:
        period = file.get(key, int, _PERIOD[name])
        local = [(i + 1) % period != 0 for i in range(layers)]
    return {
        "query_pre_attn_scalar": head_dim,
        "sliding_window": sliding_window(file, name) or config["max_position_embeddings"],
        "layer_types": ["sliding_attention" if near else "full_attention" for near in local],
    }


def _gemma2(file: GGUFFile) -> dict[str, Any]:
    config = _base(
        file,
        "gemma2",
        *("attention.sliding_window", "attention.sliding_window_pattern"),
        *("attn_logit_softcapping", "final_logit_softcapping"),
    )
    scaling = rope_scaling(file, "gemma2", config["rope_theta"], config["head_dim"])
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        **config,
        **_windows(file, "gemma2", config),
        "rope_scaling": scaling,
        "attn_logit_softcapping": file.get("gemma2.attn_logit_softcapping", float, 50.0),
        "final_logit_softcapping": file.get("gemma2.final_logit_softcapping", float, 30.0),
    }


def _gemma3(file: GGUFFile) -> dict[str, Any]:
    config = _base(
        file,
        "gemma3",
        *("attention.sliding_window", "attention.sliding_window_pattern"),
        *("rope.freq_base_swa", "final_logit_softcapping"),
    )
    # Of layers without a window: those with one are never scaled.
    config["rope_theta"] = theta = file.get("gemma3.rope.freq_base", float, 1e6)
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        **config,
        **_windows(file, "gemma3", config),
        "rope_scaling": rope_scaling(file, "gemma3", theta, config["head_dim"]),
        "rope_local_base_freq": file.get("gemma3.rope.freq_base_swa", float, _LOCAL_ROPE_BASE),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": file.get("gemma3.final_logit_softcapping", float, None),
    }


GEMMA = Architecture(
    name="gemma", config=_gemma, sizes=sizes, slots=_shifted(TOP | ATTENTION | MLP)
)
GEMMA2 = Architecture(
    name="gemma2", config=_gemma2, sizes=sizes, slots=_shifted(TOP | ATTENTION | MLP | _SANDWICH)
)
GEMMA3 = Architecture(
    name="gemma3",
    config=_gemma3,
    sizes=sizes,
    slots=_shifted(TOP | ATTENTION | HEAD_NORMS | MLP | _SANDWICH),
)
