"""Blocks for the authors of model families, each named for what it computes.

All of them work on tokens without padding: `x [T, D]` holds the documents of a micro-batch one
after the other, and a `Layout` says where each starts.
"""

from lorakit.modules.attention import Attention
from lorakit.modules.cache import KeyValueCache
from lorakit.modules.decoder import CausalDecoder, Decoder, DecoderBlock
from lorakit.modules.frozen import StoredLinear
from lorakit.modules.layout import Layout
from lorakit.modules.mlp import GatedMLP
from lorakit.modules.norm import RMSNorm
from lorakit.modules.rope import Rotary, llama3_frequencies

__all__ = [
    "Attention",
    "CausalDecoder",
    "Decoder",
    "DecoderBlock",
    "GatedMLP",
    "KeyValueCache",
    "Layout",
    "RMSNorm",
    "Rotary",
    "StoredLinear",
    "llama3_frequencies",
]
