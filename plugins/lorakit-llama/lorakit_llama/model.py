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
    Rotary,
    llama3_frequencies,
)
from lorakit.modules.rope import base_frequencies


def build(config: Mapping[str, Any]) -> CausalDecoder:
    """The model, on whatever device is the default one.

    Args:
        config: The contents of config.json.

    Raises:
        UserError: A field is missing, of the wrong type, or asks for what Llama models here
            do not do.
    """
    c = ModelConfig(config, "llama")
    dim, vocabulary = c.integer("hidden_size"), c.integer("vocab_size")
    heads = c.integer("num_attention_heads")
    head_dim = c.integer("head_dim", default=dim // heads)
    eps = c.number("rms_norm_eps", default=1e-6)
    attention_bias = c.flag("attention_bias")
    mlp_bias = c.flag("mlp_bias")
    c.require("hidden_act", "silu", default="silu")
    # Changes the result on more than one device only; the weights are whole.
    c.ignore("pretraining_tp")
    rotary = read_rotary(c, head_dim)

    blocks = [
        DecoderBlock(
            norm=RMSNorm(dim, eps),
            attention=Attention(
                dim,
                heads=heads,
                kv_heads=c.integer("num_key_value_heads", default=heads),
                head_dim=head_dim,
                rotary=rotary,
                layer=layer,
                qkv_bias=attention_bias,
                out_bias=attention_bias,
            ),
            mlp_norm=RMSNorm(dim, eps),
            mlp=GatedMLP(dim, c.integer("intermediate_size"), F.silu, bias=mlp_bias),
        )
        for layer in range(c.integer("num_hidden_layers"))
    ]
    decoder = Decoder(vocabulary=vocabulary, dim=dim, blocks=blocks, norm=RMSNorm(dim, eps))
    return CausalDecoder(
        decoder, vocabulary=vocabulary, dim=dim, tied=c.flag("tie_word_embeddings")
    )


def read_rotary(c: ModelConfig, head_dim: int) -> Rotary:
    """RoPE with its base and scaling: none, `linear` or `llama3`.

    transformers 5 writes `rope_parameters`, older ones `rope_theta` and `rope_scaling`.
    """
    scaling = c.table("rope_parameters") or c.table("rope_scaling")
    base = scaling.number("rope_theta", default=c.number("rope_theta", default=10_000.0))
    frequencies = base_frequencies(head_dim, base)
    kind = scaling.text("rope_type", default=scaling.text("type", default="default"))
    if kind == "default":
        return Rotary(frequencies)
    if kind == "linear":
        return Rotary(frequencies / scaling.number("factor"))
    if kind == "llama3":
        return Rotary(
            llama3_frequencies(
                frequencies,
                factor=scaling.number("factor"),
                low_freq_factor=scaling.number("low_freq_factor"),
                high_freq_factor=scaling.number("high_freq_factor"),
                original_context=scaling.integer("original_max_position_embeddings"),
            )
        )
    raise scaling.refuse("rope_type", kind, "default, linear and llama3")
