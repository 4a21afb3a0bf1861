"""Qwen 2, 2.5 and 3 from their config.json.

Reference: transformers' Qwen2ForCausalLM and Qwen3ForCausalLM, whose parameter names and layout
these have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F

from lorakit.model_config import ModelConfig
from lorakit.modules import (
    Attention,
    CausalDecoder,
    Decoder,
    DecoderBlock,
    GatedMLP,
    RMSNorm,
    read_rotary,
)


def build(config: Mapping[str, Any]) -> CausalDecoder:
    """The model, on whatever device is the default one.

    Args:
        config: The contents of config.json.

    Raises:
        UserError: A field is missing, of the wrong type, or asks for what Qwen models here do
            not do.
    """
    third = config.get("model_type") == "qwen3"
    # What transformers takes where a file leaves it out.
    c = ModelConfig({"head_dim": 128, **config} if third else config, "qwen")
    c.require_architecture("Qwen3ForCausalLM" if third else "Qwen2ForCausalLM")
    dim, vocabulary = c.integer("hidden_size"), c.integer("vocab_size")
    shape = c.attention_shape()
    hidden, layers = c.integer("intermediate_size"), c.integer("num_hidden_layers")
    eps = c.number("rms_norm_eps", default=1e-6)
    out_bias = c.flag("attention_bias") if third else False
    windows = read_windows(c, layers)
    tied = c.flag("tie_word_embeddings")
    c.require("hidden_act", "silu", default="silu")
    rotary = read_rotary(c, shape.head_dim)
    c.refuse_unread()

    def attention(layer: int) -> Attention:
        return Attention(
            dim,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            rotary=rotary,
            layer=layer,
            # Qwen 2 has these always, and never one on o_proj.
            qkv_bias=out_bias or not third,
            out_bias=out_bias,
            window=windows[layer],
            q_norm=RMSNorm(shape.head_dim, eps) if third else None,
            k_norm=RMSNorm(shape.head_dim, eps) if third else None,
        )

    blocks = [
        DecoderBlock(
            norm=RMSNorm(dim, eps),
            attention=attention(layer),
            mlp_norm=RMSNorm(dim, eps),
            mlp=GatedMLP(dim, hidden, F.silu),
        )
        for layer in range(layers)
    ]
    decoder = Decoder(
        vocabulary=vocabulary,
        dim=dim,
        blocks=blocks,
        norm=RMSNorm(dim, eps),
        switches_at=rotary.switches_at,
    )
    return CausalDecoder(decoder, vocabulary=vocabulary, dim=dim, tied=tied)


def read_windows(c: ModelConfig, layers: int) -> list[int | None]:
    """What each layer sees.

    With `use_sliding_window`, layers from `max_window_layers` on have a window, unless
    `layer_types` says which do.
    """
    window = c.optional_integer("sliding_window", default=4096)
    first = c.integer("max_window_layers", default=28)
    if not c.flag("use_sliding_window"):
        window = None
    usual = [
        "sliding_attention" if window and layer >= first else "full_attention"
        for layer in range(layers)
    ]
    return c.windows(layers, window, usual)
