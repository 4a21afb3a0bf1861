"""Weights as they are found, and layers to be quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from lorakit.catalog import load_catalog


@pytest.fixture
def make_layer() -> Callable[..., nn.Module]:
    """`make_layer("nf4", weight, compute_dtype, bias=..., block_size=32)` quantizes a weight."""

    def make(
        scheme: str,
        weight: Tensor,
        compute_dtype: torch.dtype = torch.float32,
        *,
        bias: Tensor | None = None,
        **options: object,
    ) -> nn.Module:
        record = load_catalog().get("quantization", scheme)
        outputs, inputs = weight.shape
        linear = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
        layer = record.quantize(linear, weight, record.options(**options), compute_dtype)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer

    return make


@pytest.fixture
def eager() -> Iterator[None]:
    """Some of bitsandbytes' own conversions are compiled, which takes long and changes nothing."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")
