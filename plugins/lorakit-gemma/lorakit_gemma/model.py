"""Gemma, Gemma 2 and Gemma 3 (text) from their config.json.

Reference: transformers' GemmaForCausalLM, Gemma2ForCausalLM and Gemma3ForCausalLM, whose
parameter names and layout these have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lorakit.errors import UserError
from lorakit.model_config import ModelConfig
from lorakit.modules import (
    Attention,
    CausalDecoder,
    Decoder,
    DecoderBlock,
    GatedMLP,
    RMSNorm,
    Rotary,
    SandwichBlock,
    build_rotary,
    gelu_tanh,
    read_rotary,
)

ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
# What transformers takes where a file leaves these out.
LATER = {"num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 256, "num_key_value_heads": 16},
    "gemma2": {"head_dim": 256, **LATER, **CAPS},
    "gemma3_text": {"head_dim": 256, **LATER},
}


def build(config: Mapping[str, Any]) -> CausalDecoder:
    """The model, on whatever device is the default one.

    Args:
        config: The contents of config.json.

    Raises:
        UserError: A field is missing, of the wrong type, or asks for what Gemma models here do
            not do.
    """
    kind = str(config.get("model_type"))
    if kind == "gemma3":
        raise UserError(
            "config.json: model_type = 'gemma3': this Gemma 3 reads images and text, and the "
            "gemma family builds text models only",
            "Gemma 3 270M and 1B (model_type gemma3_text) are text models.",
        )
    c = ModelConfig({**DEFAULTS[kind], **config}, "gemma")
    c.require_architecture(ARCHITECTURES[kind])
    dim, vocabulary = c.integer("hidden_size"), c.integer("vocab_size")
    shape = c.attention_shape()
    hidden, layers = c.integer("intermediate_size"), c.integer("num_hidden_layers")
    eps = c.number("rms_norm_eps", default=1e-6)
    bias = c.flag("attention_bias")
    tied = c.flag("tie_word_embeddings", default=True)
    # The first files said `gelu` and meant its approximation.
    c.require("hidden_act", ("gelu_pytorch_tanh", "gelu", None), default=None)
    c.require("hidden_activation", ("gelu_pytorch_tanh", None), default=None)
    windows: list[int | None] = [None] * layers
    scale = logit_softcap = softcap = None
    if kind != "gemma":
        windows = read_windows(c, layers, every=2 if kind == "gemma2" else 6)
        scale = c.number("query_pre_attn_scalar") ** -0.5
        logit_softcap = c.optional_number("final_logit_softcapping")
    if kind == "gemma2":
        softcap = c.optional_number("attn_logit_softcapping")
    if kind == "gemma3_text":
        # transformers has the field, but its attention does not apply it.
        c.require("attn_logit_softcapping", None, default=None)
        local, everywhere = read_two_rotaries(c, shape.head_dim)
    else:
        local = everywhere = read_rotary(c, shape.head_dim)
    c.refuse_unread()

    def norm(width: int = dim) -> RMSNorm:
        return RMSNorm(width, eps, unit_offset=True)

    def block(layer: int) -> nn.Module:
        attention = Attention(
            dim,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            rotary=everywhere if windows[layer] is None else local,
            layer=layer,
            qkv_bias=bias,
            out_bias=bias,
            window=windows[layer],
            scale=scale,
            softcap=softcap,
            q_norm=norm(shape.head_dim) if kind == "gemma3_text" else None,
            k_norm=norm(shape.head_dim) if kind == "gemma3_text" else None,
        )
        mlp = GatedMLP(dim, hidden, gelu_tanh)
        if kind == "gemma":
            return DecoderBlock(norm=norm(), attention=attention, mlp_norm=norm(), mlp=mlp)
        return SandwichBlock(
            norm=norm(),
            attention=attention,
            attention_out_norm=norm(),
            mlp_norm=norm(),
            mlp=mlp,
            mlp_out_norm=norm(),
        )

    decoder = Decoder(
        vocabulary=vocabulary,
        dim=dim,
        blocks=[block(layer) for layer in range(layers)],
        norm=norm(),
        embedding_scale=dim**0.5,
        switches_at=everywhere.switches_at,
    )
    return CausalDecoder(
        decoder, vocabulary=vocabulary, dim=dim, tied=tied, logit_softcap=logit_softcap
    )


def read_windows(c: ModelConfig, layers: int, every: int) -> list[int | None]:
    """What each layer sees: of `every` layers, the last sees all and the others a window, unless
    `sliding_window_pattern` or `layer_types` says otherwise."""
    window = c.optional_integer("sliding_window")
    # Gemma 2's first files gave the window twice.
    c.require("sliding_window_size", (window, None), default=None)
    every = c.integer("sliding_window_pattern", default=every)
    usual = [
        "full_attention" if (layer + 1) % every == 0 else "sliding_attention"
        for layer in range(layers)
    ]
    return c.windows(layers, window, usual)


def read_two_rotaries(c: ModelConfig, head_dim: int) -> tuple[Rotary, Rotary]:
    """Gemma 3's RoPE of layers with a window, and that of layers without."""
    kinds = ("default", "linear", "llama3", "yarn")
    both = c.table("rope_parameters")
    rotaries = []
    for table, key, usual in (
        (both.table("sliding_attention"), "rope_local_base_freq", 10_000.0),
        (both.table("full_attention") or c.table("rope_scaling"), "rope_theta", 1_000_000.0),
    ):
        table.ignore("type")
        base = table.number("rope_theta", default=c.number(key, default=usual))
        rotaries.append(build_rotary(c, table, head_dim, base=base, kinds=kinds))
    return rotaries[0], rotaries[1]
