"""RoPE as a config.json describes it, in both of its dialects.

transformers 5 writes one table, `rope_parameters`; published files have `rope_theta` beside
`rope_scaling`, whose kind is called `rope_type` or, in the oldest, `type`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorakit.errors import UserError
from lorakit.model_config import ModelConfig
from lorakit.modules.rope import (
    LongRotary,
    Rotary,
    base_frequencies,
    llama3_frequencies,
    longrope_scale,
    yarn_frequencies,
    yarn_scale,
)

KINDS = ("default", "linear", "llama3", "yarn", "longrope")
"""The kinds of scaling there are; `su` is what LongRoPE was called at first."""


def read_rotary(
    c: ModelConfig,
    head_dim: int,
    *,
    kinds: Sequence[str] = KINDS,
    original_context: int | None = None,
    partial: bool = False,
) -> Rotary:
    """The model's RoPE.

    Args:
        c: Its config.json.
        head_dim: Dh.
        kinds: The kinds of scaling the family knows.
        original_context: What `original_max_position_embeddings` is where the file leaves it out;
            None takes `max_position_embeddings`.
        partial: Whether the family can rotate a head's first part alone.

    Raises:
        UserError: It is of another kind, or a field is missing or wrong.
    """
    table = c.table("rope_scaling") or c.table("rope_parameters")
    # Beside rope_type, as old and new readers each look for their own.
    table.ignore("type")
    base = table.number("rope_theta", default=c.number("rope_theta", default=10_000.0))
    share = _rotary_share(c, table, partial)
    width = int(head_dim * share)
    # Fields of the other kinds would change nothing, yet were meant to: those stay unread.
    context = c.integer("original_max_position_embeddings", default=original_context or 0)
    return build_rotary(c, table, width, base=base, kinds=kinds, original_context=context)


def _rotary_share(c: ModelConfig, table: ModelConfig, partial: bool) -> float:
    key = "partial_rotary_factor"
    if not partial:
        c.require(key, 1.0, default=1.0)
        table.require(key, 1.0, default=1.0)
        return 1.0
    share = table.number(key, default=c.number(key, default=1.0))
    if not 0 < share <= 1:
        raise c.refuse(key, share, "shares above 0 and up to 1")
    return share


def build_rotary(
    c: ModelConfig,
    table: ModelConfig,
    width: int,
    *,
    base: float,
    kinds: Sequence[str] = KINDS,
    original_context: int | None = None,
) -> Rotary:
    """The RoPE that one table describes.

    Args:
        c: The config.json, for the context lengths beside the table.
        table: `rope_parameters`, `rope_scaling`, or the part of it for one type of layer.
        width: R, the dimensions that turn.
        base: Of the frequencies.
        kinds: The kinds of scaling the family knows.
        original_context: Wins over the table's; None or 0: the table's, else the longest context.

    Raises:
        UserError: As `read_rotary`.
    """
    kind = table.text("rope_type", default=table.text("type", default="default"))
    if kind not in kinds:
        raise table.refuse("rope_type", kind, ", ".join(kinds))
    if width < 2 or width % 2:
        raise c.refuse("head_dim", width, "an even number of rotary dimensions")
    frequencies = base_frequencies(width, base)
    if kind == "default":
        return Rotary(frequencies)
    if kind == "linear":
        return Rotary(frequencies / table.number("factor"))
    longest = c.integer("max_position_embeddings", default=0)
    context = original_context or table.integer("original_max_position_embeddings", default=longest)
    table.ignore("original_max_position_embeddings")
    if context <= 0:
        raise UserError(
            f"config.json: {kind} RoPE needs {table.where}original_max_position_embeddings"
        )
    if kind == "llama3":
        return Rotary(
            llama3_frequencies(
                frequencies,
                factor=table.number("factor"),
                low_freq_factor=table.number("low_freq_factor"),
                high_freq_factor=table.number("high_freq_factor"),
                original_context=context,
            )
        )
    # Without a longest context the factor must be there.
    implied = {"default": longest / context} if longest else {}
    factor = table.number("factor", **implied)
    if kind == "yarn":
        scaled = yarn_frequencies(
            frequencies,
            base=base,
            factor=factor,
            original_context=context,
            beta_fast=table.number("beta_fast", default=32.0),
            beta_slow=table.number("beta_slow", default=1.0),
            truncate=table.flag("truncate", default=True),
        )
        return Rotary(scaled, table.number("attention_factor", default=yarn_scale(factor)))
    short, long = (
        _factors(table, key, len(frequencies)) for key in ("short_factor", "long_factor")
    )
    scale = table.number("attention_factor", default=longrope_scale(factor, context))
    return LongRotary(frequencies / short, frequencies / long, switches_at=context, scale=scale)


def _factors(table: ModelConfig, key: str, count: int) -> Tensor:
    """`[R/2]`: what each frequency is divided by."""
    values = table.numbers(key)
    if len(values) != count:
        raise UserError(
            f"config.json: {table.where}{key}: expected {count} numbers (half the rotary "
            f"dimensions), got {len(values)}"
        )
    return torch.tensor(values, dtype=torch.float32, device="cpu")
