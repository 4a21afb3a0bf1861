"""What the architectures have in common: a decoder of attention and gated MLP with RMSNorm.

llama.cpp's names: gguf-py/gguf/constants.py and src/llama-model.cpp; what its converter does to
a checkpoint: the class of the architecture in convert_hf_to_gguf.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from lorakit.errors import UserError
from lorakit_gguf.architectures.table import Fix, Slot

if TYPE_CHECKING:
    from lorakit_gguf.file import GGUFFile

HUGGING_FACE = "Take the model in Hugging Face's format (config.json and safetensors)."

_READ_KEYS = frozenset(
    [
        *("context_length", "embedding_length", "block_count", "feed_forward_length"),
        "vocab_size",
        *("attention.head_count", "attention.head_count_kv", "attention.key_length"),
        *("attention.value_length", "attention.layer_norm_rms_epsilon", "attention.causal"),
        *("rope.dimension_count", "rope.freq_base", "rope.scale_linear"),
        *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.attn_factor"),
        *("rope.scaling.original_context_length", "rope.scaling.finetuned"),
        *("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor"),
        *("rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow"),
    ]
)
_IDLE_KEYS = frozenset(
    ["tensor_data_layout", "use_parallel_residual", "attention.layer_norm_epsilon"]
)
"""Written by some converters, without meaning for these architectures."""


def layer(name: str, *shape: str, optional: bool = False, fix: Fix | None = None) -> Slot:
    """A slot in every layer."""
    return Slot(name=f"model.layers.{{}}.{name}", shape=shape, optional=optional, fix=fix)


TOP = {
    "token_embd.weight": Slot(name="model.embed_tokens.weight", shape=("vocab", "hidden")),
    "output_norm.weight": Slot(name="model.norm.weight", shape=("hidden",)),
    "output.weight": Slot(name="lm_head.weight", shape=("vocab", "hidden"), optional=True),
}
ATTENTION = {
    "blk.{}.attn_norm.weight": layer("input_layernorm.weight", "hidden"),
    "blk.{}.attn_q.weight": layer("self_attn.q_proj.weight", "query", "hidden"),
    "blk.{}.attn_k.weight": layer("self_attn.k_proj.weight", "key", "hidden"),
    "blk.{}.attn_v.weight": layer("self_attn.v_proj.weight", "key", "hidden"),
    "blk.{}.attn_output.weight": layer("self_attn.o_proj.weight", "hidden", "query"),
}
QUERY_KEY_VALUE_BIASES = {
    "blk.{}.attn_q.bias": layer("self_attn.q_proj.bias", "query"),
    "blk.{}.attn_k.bias": layer("self_attn.k_proj.bias", "key"),
    "blk.{}.attn_v.bias": layer("self_attn.v_proj.bias", "key"),
}
HEAD_NORMS = {
    "blk.{}.attn_q_norm.weight": layer("self_attn.q_norm.weight", "head"),
    "blk.{}.attn_k_norm.weight": layer("self_attn.k_norm.weight", "head"),
}
MLP = {
    "blk.{}.ffn_norm.weight": layer("post_attention_layernorm.weight", "hidden"),
    "blk.{}.ffn_gate.weight": layer("mlp.gate_proj.weight", "inner", "hidden"),
    "blk.{}.ffn_up.weight": layer("mlp.up_proj.weight", "inner", "hidden"),
    "blk.{}.ffn_down.weight": layer("mlp.down_proj.weight", "hidden", "inner"),
}


def sizes(config: Mapping[str, Any]) -> dict[str, int]:
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    return {
        "vocab": config["vocab_size"],
        "hidden": config["hidden_size"],
        "query": query,
        "key": key,
        "query_key_value": query + 2 * key,
        "head": config["head_dim"],
        "inner": config["intermediate_size"],
        "gate_and_up": 2 * config["intermediate_size"],
    }


def decoder_config(
    file: GGUFFile, name: str, *, act: str = "silu", partial: bool = False
) -> dict[str, Any]:
    """The part of config.json that all have.

    Args:
        file: The file.
        name: The architecture's, in metadata keys.
        act: The MLP's activation, which no key gives.
        partial: RoPE may turn a part of each head only: `partial_rotary_factor`.

    Raises:
        UserError: Sizes that no model has, or attention to later tokens.
    """
    layers = file.get(f"{name}.block_count", int)
    hidden = file.get(f"{name}.embedding_length", int)
    heads = file.get(f"{name}.attention.head_count", int)
    key_heads = file.get(f"{name}.attention.head_count_kv", int, heads)
    if min(layers, hidden, heads, key_heads) < 1 or heads % key_heads or layers > len(file.tensors):
        raise UserError(
            f"{file.path}: impossible: {layers} layers of width {hidden}, {heads} heads and "
            f"{key_heads} key heads, in {len(file.tensors)} tensors"
        )
    if not file.get(f"{name}.attention.causal", bool, True):
        raise UserError(f"{file.path}: attends to later tokens too, so it is no language model")
    head_dim, turned = _head_dim(file, name, hidden // heads, partial)
    return {
        "hidden_size": hidden,
        "intermediate_size": file.get(f"{name}.feed_forward_length", int),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_dim,
        **({"partial_rotary_factor": turned / head_dim} if partial else {}),
        "hidden_act": act,
        "rms_norm_eps": file.get(f"{name}.attention.layer_norm_rms_epsilon", float),
        "max_position_embeddings": file.get(f"{name}.context_length", int),
        "rope_theta": file.get(f"{name}.rope.freq_base", float, 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }


def _head_dim(file: GGUFFile, name: str, usual: int, partial: bool) -> tuple[int, int]:
    head_dim = file.get(f"{name}.attention.key_length", int, usual)
    value_dim = file.get(f"{name}.attention.value_length", int, head_dim)
    turned = file.get(f"{name}.rope.dimension_count", int, head_dim)
    fits = head_dim == value_dim and (0 < turned <= head_dim if partial else turned == head_dim)
    if not fits or head_dim < 2 or turned % 2:
        raise UserError(
            f"{file.path}: heads of {head_dim} key and {value_dim} value dimensions, {turned} of "
            f"them rotary; a {name} model needs the same even number of each"
        )
    return head_dim, turned


def sliding_window(file: GGUFFile, name: str) -> int | None:
    """How far attention sees; None where it sees the whole context."""
    window = file.get(f"{name}.attention.sliding_window", int, 0)
    return window if 0 < window < file.get(f"{name}.context_length", int) else None


def all_or_none(file: GGUFFile, layers: int, slots: Iterable[str]) -> bool:
    """Whether all of the biases are there, in all layers, or none is."""
    names = [name.format(i) for name in slots for i in range(layers)]
    present = [name for name in names if name in file.tensors]
    if present and len(present) < len(names):
        absent = next(name for name in names if name not in file.tensors)
        raise UserError(
            f"{file.path}: has {present[0]}, but not {absent}; Hugging Face's model has all biases "
            "of a kind or none"
        )
    return bool(present)


def refuse_unknown_keys(file: GGUFFile, architecture: str, *known: str) -> None:
    """A key nobody reads may change what the model computes; only a neutral value may pass."""
    for key, value in file.fields.items():
        name = key.removeprefix(f"{architecture}.")
        if name == key or name in _READ_KEYS or name in _IDLE_KEYS or name in known or not value:
            continue
        what = "a mixture of experts" if name.startswith("expert") else f"its {key} is {value}"
        raise UserError(f"{file.path}: {what}, which is not supported", HUGGING_FACE)
