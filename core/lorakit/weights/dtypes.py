"""The names that file headers give dtypes, as safetensors spells them, and torch's own.

Source: https://github.com/huggingface/safetensors, `Dtype` in safetensors/src/tensor.rs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_TORCH = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
}
NOT_WEIGHTS = frozenset(
    "I64 I32 I16 I8 U64 U32 U16 U8 BOOL C64 F8_E8M0 F6_E2M3 F6_E3M2 F4".split()  # noqa: SIM905
)
"""Dtypes a model's weight cannot be in: integers, booleans, complex numbers, exponents alone, and
packed values; they belong to checkpoints that are quantized already."""


def torch_dtype(name: str) -> torch.dtype | None:
    """torch's dtype of that name; None if this torch has none."""
    import torch

    return getattr(torch, _TORCH.get(name, ""), None)


def dtype_name(dtype: torch.dtype) -> str:
    """The name in headers; torch's own where they have none."""
    name = str(dtype).removeprefix("torch.")
    return next((header for header, known in _TORCH.items() if known == name), name)
