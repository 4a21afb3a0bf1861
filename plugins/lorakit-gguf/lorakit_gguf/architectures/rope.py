"""How a GGUF file says that RoPE's frequencies are scaled, in Hugging Face's words.

Two ways: the keys `ARCH.rope.scaling.*` (linear, YaRN), and, for Llama 3.1 and later, a tensor
with one divisor for each frequency.  The latter are worked out from four numbers that the file
leaves out; here they are found again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lorakit.errors import UserError

if TYPE_CHECKING:
    from lorakit_gguf.file import GGUFFile

_TOLERANCE = 1e-4  # The divisors were computed in float32, from float32 frequencies.
_HUGGING_FACE = "Take the model in Hugging Face's format (config.json and safetensors)."


def rope_scaling(
    file: GGUFFile, prefix: str, theta: float, head_dim: int, divisors: str = ""
) -> dict[str, Any] | None:
    """config.json's `rope_scaling`, or None where nothing is scaled.

    Args:
        file: The file.
        prefix: The architecture's name in metadata keys.
        theta: RoPE's base.
        head_dim: Width of a head, all of it rotary.
        divisors: Name of the tensor with a divisor for each frequency; empty if there is none.

    Raises:
        UserError: Scaled in a way that has no Hugging Face equivalent.
    """
    by_key = _scaling_keys(file, f"{prefix}.rope.scaling.", f"{prefix}.rope.scale_linear")
    if divisors not in file.tensors:
        return by_key
    values = file.tensor(divisors).double().flatten().tolist()
    if len(values) != head_dim // 2:
        raise UserError(
            f"{file.path}: {divisors} has {len(values)} values for {head_dim // 2} frequencies"
        )
    if all(abs(value - 1) < _TOLERANCE for value in values):
        return by_key
    by_divisors = llama3_scaling(values, theta)
    if by_key is not None or by_divisors is None:
        raise UserError(
            f"{file.path}: the RoPE divisors in {divisors} are not those of Llama 3's scaling",
            _HUGGING_FACE,
        )
    return by_divisors


def _scaling_keys(file: GGUFFile, prefix: str, old_key: str) -> dict[str, Any] | None:
    factor = file.get(prefix + "factor", float, file.get(old_key, float, 0.0))
    kind = file.get(prefix + "type", str, "linear" if factor else "none")
    if kind == "none" or factor in (0.0, 1.0):  # llama.cpp reads 0 as 1
        return None
    for key, neutral in (("attn_factor", 1.0), ("yarn_attn_factor", 1.0), ("yarn_ext_factor", 1.0)):
        if file.get(prefix + key, float, neutral) != neutral:
            raise UserError(f"{file.path}: its {prefix}{key} is not supported", _HUGGING_FACE)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise UserError(f"{file.path}: RoPE scaling {kind!r} is not supported", _HUGGING_FACE)
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": file.get(prefix + "original_context_length", int),
    }
    for key in ("beta_fast", "beta_slow"):
        if (value := file.get(f"{prefix}yarn_{key}", float, None)) is not None:
            scaling[key] = value
    return scaling


def llama3_divisors(
    theta: float, count: int, factor: float, low: float, high: float, context: float
) -> np.ndarray:
    """Llama 3's divisors `[count]` of the frequencies `theta ** (-i / count)`.

    With `n = context * frequency / 2π`, how often a frequency turns within the original context:
    1 where `n > high`, `factor` where `n < low`, and in between `1 / ((1 - s) / factor + s)` with
    `s = (n - low) / (high - low)`.  Source: apply_scaling in Meta's llama-models, and class
    LlamaModel in llama.cpp's convert_hf_to_gguf.py.
    """
    turns = context * _frequencies(theta, count) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1.0 / ((1.0 - smooth) / factor + smooth))


def llama3_scaling(divisors: Sequence[float], theta: float) -> dict[str, Any] | None:
    """The `rope_scaling` that gives these divisors; None if there is none.

    Only ratios of the context, low and high can be seen in the divisors; `low` is set to 1, as
    in all of Meta's models.
    """
    given = np.asarray(divisors)
    factor = float(np.float32(given.max()))
    guesses = [(4.0, 8192.0)]
    between = (given > 1 + _TOLERANCE) & (given < factor * (1 - _TOLERANCE))
    if between.sum() >= 2:
        # Between the two bounds, s = a * frequency / 2π + b: a straight line, from two points on.
        smooth = (1 / given[between] - 1 / factor) / (1 - 1 / factor)
        per_token = _frequencies(theta, len(given))[between] / (2 * math.pi)
        slope, offset = np.polyfit(per_token, smooth, 1)
        if slope > 0 > offset:
            high = 1 - 1 / offset
            guesses.append((round(high, 2), float(round(slope * (high - 1)))))
    for high, context in guesses:
        found = llama3_divisors(theta, len(given), factor, 1.0, high, context)
        if high > 1 and np.abs(found / given - 1).max() < _TOLERANCE:
            return {
                "rope_type": "llama3",
                "factor": round(factor, 4),
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": int(context),
            }
    return None


def _frequencies(theta: float, count: int) -> np.ndarray:
    return np.asarray(theta ** -(np.arange(count) / count))
