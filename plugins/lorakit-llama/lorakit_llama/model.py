"""Llama from its config.json.

Reference: transformers' LlamaForCausalLM, whose parameter names and layout this has.
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
        UserError: A field is missing, of the wrong type, or asks for what Llama models here
            do not do.
    """
    c = ModelConfig(config, "llama")
    c.require_architecture("LlamaForCausalLM")
    dim, vocabulary = c.integer("hidden_size"), c.integer("vocab_size")
    shape = c.attention_shape()
    hidden, layers = c.integer("intermediate_size"), c.integer("num_hidden_layers")
    eps = c.number("rms_norm_eps", default=1e-6)
    attention_bias, mlp_bias = c.flag("attention_bias"), c.flag("mlp_bias")
    tied = c.flag("tie_word_embeddings")
    c.require("hidden_act", "silu", default="silu")
    rotary = read_rotary(c, shape.head_dim)
    # The first changes only how products are cut up; the second says what the model is.
    c.ignore("pretraining_tp", "is_llama_config")
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
                qkv_bias=attention_bias,
                out_bias=attention_bias,
            ),
            mlp_norm=RMSNorm(dim, eps),
            mlp=GatedMLP(dim, hidden, F.silu, bias=mlp_bias),
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
