"""Architecture `llama`: Llama 1 to 3, SmolLM2, Mistral 7B and others of the same build.

llama.cpp's names: gguf-py/gguf/constants.py and src/llama-model.cpp; what its converter does to
a checkpoint: class LlamaModel in convert_hf_to_gguf.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lorakit.errors import UserError
from lorakit_gguf.architectures.rope import rope_scaling
from lorakit_gguf.architectures.table import Architecture, Slot

if TYPE_CHECKING:
    from torch import Tensor

    from lorakit_gguf.file import GGUFFile

_ROPE_FREQS = "rope_freqs.weight"

_READ_KEYS = frozenset(
    [
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "vocab_size",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_rms_epsilon",
        "attention.causal",
        "attention.sliding_window",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.type",
        "rope.scaling.factor",
        "rope.scaling.attn_factor",
        "rope.scaling.original_context_length",
        "rope.scaling.finetuned",
        "rope.scaling.yarn_ext_factor",
        "rope.scaling.yarn_attn_factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
    ]
)
_IDLE_KEYS = frozenset(
    ["tensor_data_layout", "use_parallel_residual", "attention.layer_norm_epsilon"]
)
"""Written by some converters, without meaning for this architecture."""


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


def _layer(name: str, *shape: str, **more: Any) -> Slot:
    return Slot(name=f"model.layers.{{}}.{name}", shape=shape, **more)


_ATTENTION_BIASES = {
    "blk.{}.attn_q.bias": _layer("self_attn.q_proj.bias", "query", optional=True, fix=_query),
    "blk.{}.attn_k.bias": _layer("self_attn.k_proj.bias", "key", optional=True, fix=_key),
    "blk.{}.attn_v.bias": _layer("self_attn.v_proj.bias", "key", optional=True),
    "blk.{}.attn_output.bias": _layer("self_attn.o_proj.bias", "hidden", optional=True),
}
_MLP_BIASES = {
    "blk.{}.ffn_gate.bias": _layer("mlp.gate_proj.bias", "inner", optional=True),
    "blk.{}.ffn_up.bias": _layer("mlp.up_proj.bias", "inner", optional=True),
    "blk.{}.ffn_down.bias": _layer("mlp.down_proj.bias", "hidden", optional=True),
}
_WEIGHTS = {
    "token_embd.weight": Slot(name="model.embed_tokens.weight", shape=("vocab", "hidden")),
    "output_norm.weight": Slot(name="model.norm.weight", shape=("hidden",)),
    "output.weight": Slot(name="lm_head.weight", shape=("vocab", "hidden"), optional=True),
    "blk.{}.attn_norm.weight": _layer("input_layernorm.weight", "hidden"),
    "blk.{}.attn_q.weight": _layer("self_attn.q_proj.weight", "query", "hidden", fix=_query),
    "blk.{}.attn_k.weight": _layer("self_attn.k_proj.weight", "key", "hidden", fix=_key),
    "blk.{}.attn_v.weight": _layer("self_attn.v_proj.weight", "key", "hidden"),
    "blk.{}.attn_output.weight": _layer("self_attn.o_proj.weight", "hidden", "query"),
    "blk.{}.ffn_norm.weight": _layer("post_attention_layernorm.weight", "hidden"),
    "blk.{}.ffn_gate.weight": _layer("mlp.gate_proj.weight", "inner", "hidden"),
    "blk.{}.ffn_up.weight": _layer("mlp.up_proj.weight", "inner", "hidden"),
    "blk.{}.ffn_down.weight": _layer("mlp.down_proj.weight", "hidden", "inner"),
}


def _sizes(config: Mapping[str, Any]) -> dict[str, int]:
    return {
        "vocab": config["vocab_size"],
        "hidden": config["hidden_size"],
        "query": config["num_attention_heads"] * config["head_dim"],
        "key": config["num_key_value_heads"] * config["head_dim"],
        "inner": config["intermediate_size"],
    }


def _config(file: GGUFFile) -> dict[str, Any]:
    _refuse_unknown_keys(file)
    layers = file.get("llama.block_count", int)
    hidden = file.get("llama.embedding_length", int)
    heads = file.get("llama.attention.head_count", int)
    key_heads = file.get("llama.attention.head_count_kv", int, heads)
    if min(layers, hidden, heads, key_heads) < 1 or heads % key_heads or layers > len(file.tensors):
        raise UserError(
            f"{file.path}: impossible: {layers} layers of width {hidden}, {heads} heads and "
            f"{key_heads} key heads, in {len(file.tensors)} tensors"
        )
    head_dim = _head_dim(file, hidden // heads)
    context = file.get("llama.context_length", int)
    theta = file.get("llama.rope.freq_base", float, 10000.0)
    if context > file.get("llama.attention.sliding_window", int, 0) > 0:
        raise UserError(f"{file.path}: sliding-window attention is not supported here")
    if not file.get("llama.attention.causal", bool, True):
        raise UserError(f"{file.path}: attends to later tokens too, so it is no language model")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": file.get("llama.feed_forward_length", int),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": file.get("llama.attention.layer_norm_rms_epsilon", float),
        "max_position_embeddings": context,
        "rope_theta": theta,
        "rope_scaling": rope_scaling(file, "llama", theta, head_dim, _ROPE_FREQS),
        "attention_bias": _biased(file, layers, _ATTENTION_BIASES),
        "mlp_bias": _biased(file, layers, _MLP_BIASES),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }


def _head_dim(file: GGUFFile, usual: int) -> int:
    head_dim = file.get("llama.attention.key_length", int, usual)
    value_dim = file.get("llama.attention.value_length", int, head_dim)
    turned = file.get("llama.rope.dimension_count", int, head_dim)
    if not head_dim == value_dim == turned or head_dim < 2 or head_dim % 2:
        raise UserError(
            f"{file.path}: heads of {head_dim} key and {value_dim} value dimensions, {turned} of "
            "them rotary; a llama model needs the same even number of each"
        )
    return head_dim


def _biased(file: GGUFFile, layers: int, slots: Mapping[str, Slot]) -> bool:
    """Whether all of the biases are there, in all layers, or none is."""
    names = [name.format(i) for name in slots for i in range(layers)]
    present = [name for name in names if name in file.tensors]
    if present and len(present) < len(names):
        absent = next(name for name in names if name not in file.tensors)
        raise UserError(
            f"{file.path}: has {present[0]}, but not {absent}; Hugging Face's llama has all biases "
            "of a kind or none"
        )
    return bool(present)


def _refuse_unknown_keys(file: GGUFFile) -> None:
    """A key nobody reads may change what the model computes; only a neutral value may pass."""
    for key, value in file.fields.items():
        name = key.removeprefix("llama.")
        if name == key or name in _READ_KEYS or name in _IDLE_KEYS or not value:
            continue
        what = "a mixture of experts" if name.startswith("expert") else f"its {key} is {value}"
        raise UserError(
            f"{file.path}: {what}, which is not supported",
            "Take the model in Hugging Face's format (config.json and safetensors).",
        )


LLAMA = Architecture(
    name="llama",
    config=_config,
    sizes=_sizes,
    slots=_WEIGHTS | _ATTENTION_BIASES | _MLP_BIASES,
    in_config=frozenset([_ROPE_FREQS]),
)
