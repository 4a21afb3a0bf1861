"""Blocks for the authors of model families, each named for what it computes.

All of them work on tokens without padding: `x [T, D]` holds the documents of a micro-batch one
after the other, and a `Layout` says where each starts.
"""

from lorakit.modules.attention import Attention, FusedAttention
from lorakit.modules.cache import KeyValueCache
from lorakit.modules.decoder import CausalDecoder, Decoder, DecoderBlock, SandwichBlock
from lorakit.modules.frozen import StoredLinear
from lorakit.modules.layout import Layout
from lorakit.modules.mlp import FusedGatedMLP, GatedMLP, gelu_tanh
from lorakit.modules.norm import RMSNorm
from lorakit.modules.rope import LongRotary, Rotary, llama3_frequencies, yarn_frequencies
from lorakit.modules.rope_config import build_rotary, read_rotary

__all__ = [
    "Attention",
    "CausalDecoder",
    "Decoder",
    "DecoderBlock",
    "FusedAttention",
    "FusedGatedMLP",
    "GatedMLP",
    "KeyValueCache",
    "Layout",
    "LongRotary",
    "RMSNorm",
    "Rotary",
    "SandwichBlock",
    "StoredLinear",
    "build_rotary",
    "gelu_tanh",
    "llama3_frequencies",
    "read_rotary",
    "yarn_frequencies",
]
