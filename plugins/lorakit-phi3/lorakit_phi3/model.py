"""Phi-3, Phi-3.5 and Phi-4 from their config.json.

Reference: transformers' Phi3ForCausalLM, whose parameter names and layout this has: one matrix
for q, k and v, one for gate and up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F

from lorakit.model_config import ModelConfig
from lorakit.modules import (
    CausalDecoder,
    Decoder,
    DecoderBlock,
    FusedAttention,
    FusedGatedMLP,
    RMSNorm,
    read_rotary,
)


def build(config: Mapping[str, Any]) -> CausalDecoder:
    """The model, on whatever device is the default one.

    Args:
        config: The contents of config.json.

    Raises:
        UserError: A field is missing, of the wrong type, or asks for what Phi-3 models here do
            not do.
    """
    # What transformers takes where a file leaves it out.
    c = ModelConfig({"original_max_position_embeddings": 4096, **config}, "phi3")
    c.require_architecture("Phi3ForCausalLM")
    dim, vocabulary = c.integer("hidden_size"), c.integer("vocab_size")
    shape = c.attention_shape()
    hidden, layers = c.integer("intermediate_size"), c.integer("num_hidden_layers")
    eps = c.number("rms_norm_eps", default=1e-5)
    window = c.optional_integer("sliding_window")
    tied = c.flag("tie_word_embeddings")
    c.require("hidden_act", "silu", default="silu")
    rotary = read_rotary(c, shape.head_dim, kinds=("default", "longrope", "su"), partial=True)
    # Phi-4 mini's files have these, and no code reads them: every layer is the same.
    c.require("full_attn_mod", 1, default=1)
    c.require("interpolate_factor", 1, default=1)
    c.refuse_unread()

    blocks = [
        DecoderBlock(
            norm=RMSNorm(dim, eps),
            attention=FusedAttention(
                dim,
                heads=shape.heads,
                kv_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                rotary=rotary,
                layer=layer,
                window=window,
            ),
            mlp_norm=RMSNorm(dim, eps),
            mlp=FusedGatedMLP(dim, hidden, F.silu),
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
