"""How long a text the base model was made for, and what to say where one is longer.

A longer one is no error: RoPE turns on for as long as one likes, and whether the model follows
is what somebody may want to find out.  Torch-free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_STRETCHED = ("linear", "yarn")
"""The kinds of RoPE scaling by which a published file may leave `max_position_embeddings` at what
it was before: then its factor says how far the model reaches."""


def context_length(config: Mapping[str, Any]) -> int | None:
    """The most tokens a model's positions were made for.

    Args:
        config: The contents of config.json.

    Returns:
        None where the file does not say.
    """
    longest = _positive(config.get("max_position_embeddings"))
    if longest is None:
        return None
    table = config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(table, Mapping):
        return int(longest)
    factor = _positive(table.get("factor"))
    if factor is None or table.get("rope_type", table.get("type")) not in _STRETCHED:
        return int(longest)
    original = _positive(table.get("original_max_position_embeddings")) or longest
    return int(max(longest, original * factor))


def rows_notice(lengths: Sequence[int], config: Mapping[str, Any], max_seq_len: int) -> str | None:
    """What to read before rows beyond the model's context are trained on; None if there are none.

    Args:
        lengths: Tokens of each row.
        config: The contents of config.json.
        max_seq_len: Of the recipe.
    """
    context = context_length(config)
    beyond = [] if context is None else [length for length in lengths if length > context]
    if not beyond:
        return None
    return (
        f"data.max_seq_len: {max_seq_len:,} is more than the model's context of {context:,} tokens "
        f"(config.json: max_position_embeddings), and {len(beyond):,} of {len(lengths):,} rows are "
        f"longer, up to {max(beyond):,} tokens; the model never saw such positions. "
        f"data.max_seq_len = {context} cuts them there."
    )


def prompt_notice(length: int, context: int | None, what: str = "the prompt") -> str | None:
    """What to read before an answer to a prompt of so many tokens, or to `what` has them; None if
    it is within the model's context, or that is not known."""
    if context is None or length <= context:
        return None
    return (
        f"{what} has {length:,} tokens, more than the model's context of {context:,} "
        "(config.json: max_position_embeddings): the answer may make no sense"
    )


def _positive(value: Any) -> float | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if number and value > 0 else None
