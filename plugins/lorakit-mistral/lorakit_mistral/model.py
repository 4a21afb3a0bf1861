"""Mistral from its config.json.

Reference: transformers' MistralForCausalLM, whose parameter names and layout this has.
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
        UserError: A field is missing, of the wrong type, or asks for what Mistral models here
            do not do.
    """
    # What transformers takes where a file leaves these out.
    c = ModelConfig({"num_key_value_heads": 8, "sliding_window": 4096, **config}, "mistral")
    c.require_architecture("MistralForCausalLM")
    dim, vocabulary = c.integer("hidden_size"), c.integer("vocab_size")
    shape = c.attention_shape()
    hidden, layers = c.integer("intermediate_size"), c.integer("num_hidden_layers")
    eps = c.number("rms_norm_eps", default=1e-6)
    window = c.optional_integer("sliding_window")
    tied = c.flag("tie_word_embeddings")
    c.require("hidden_act", "silu", default="silu")
    rotary = read_rotary(c, shape.head_dim)
    c.refuse_unread()

    blocks = [
        DecoderBlock(
            norm=RMSNorm(dim, eps),
            attention=Attention(
                dim,
                heads=shape.heads,
                kv_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                rotary=rotary,
                layer=layer,
                window=window,
            ),
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
