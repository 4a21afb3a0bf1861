"""Architecture `phi3`: Phi-3, Phi-3.5 and Phi-4 mini, whose fused projections stay fused."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lorakit.errors import UserError
from lorakit_gguf.architectures.decoder import (
    ATTENTION,
    HUGGING_FACE,
    MLP,
    TOP,
    decoder_config,
    layer,
    refuse_unknown_keys,
    sizes,
    sliding_window,
)
from lorakit_gguf.architectures.table import Architecture

if TYPE_CHECKING:
    from lorakit_gguf.file import GGUFFile

_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
_TOLERANCE = 1e-4


def _config(file: GGUFFile) -> dict[str, Any]:
    refuse_unknown_keys(file, "phi3", "attention.sliding_window")
    config = decoder_config(file, "phi3", partial=True)
    context = config["max_position_embeddings"]
    original = file.get("phi3.rope.scaling.original_context_length", int, context)
    return {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        **config,
        "original_max_position_embeddings": original,
        "sliding_window": sliding_window(file, "phi3"),
        "rope_scaling": _longrope(file, config, context, original),
    }


def _longrope(
    file: GGUFFile, config: dict[str, Any], context: int, original: int
) -> dict[str, Any] | None:
    """The two lists of divisors, one for contexts up to the original length, one for longer.

    Raises:
        UserError: A list is missing or of the wrong length, or attention is scaled otherwise than
            transformers does: by the square root of 1 + ln(context / original) / ln(original).
    """
    if _LONG not in file.tensors and _SHORT not in file.tensors:
        if context > original:
            raise UserError(
                f"{file.path}: a context of {context} on top of {original} without RoPE factors",
                HUGGING_FACE,
            )
        return None
    count = round(config["head_dim"] * config["partial_rotary_factor"]) // 2
    lists = []
    for name in (_SHORT, _LONG):
        values = file.tensor(name).flatten().tolist() if name in file.tensors else []
        if len(values) != count:
            raise UserError(f"{file.path}: {name} has {len(values)} values instead of {count}")
        lists.append([float(f"{value:.9g}") for value in values])
    scale = context / original
    usual = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
    stored = file.get("phi3.rope.scaling.attn_factor", float, usual)
    if abs(stored - usual) > _TOLERANCE:
        raise UserError(
            f"{file.path}: its phi3.rope.scaling.attn_factor is {stored}, where LongRoPE has "
            f"{usual:.6f}",
            HUGGING_FACE,
        )
    return {"type": "longrope", "short_factor": lists[0], "long_factor": lists[1]}


PHI3 = Architecture(
    name="phi3",
    config=_config,
    sizes=sizes,
    slots={
        **TOP,
        "blk.{}.attn_norm.weight": ATTENTION["blk.{}.attn_norm.weight"],
        "blk.{}.attn_qkv.weight": layer("self_attn.qkv_proj.weight", "query_key_value", "hidden"),
        "blk.{}.attn_output.weight": ATTENTION["blk.{}.attn_output.weight"],
        "blk.{}.ffn_norm.weight": MLP["blk.{}.ffn_norm.weight"],
        "blk.{}.ffn_up.weight": layer("mlp.gate_up_proj.weight", "gate_and_up", "hidden"),
        "blk.{}.ffn_down.weight": MLP["blk.{}.ffn_down.weight"],
    },
    in_config=frozenset([_LONG, _SHORT]),
)
