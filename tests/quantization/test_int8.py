"""int8 storage against bitsandbytes' vectorwise quantization."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

from lorakit.errors import UserError
from lorakit.options import NoOptions
from lorakit_bitsandbytes import int8
from lorakit_bitsandbytes.quantizations import int8_bytes


def weight_of(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
    weight.view(-1)[::97] *= 8
    return weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96, 64), (1, 7), (33, 5000)])
def test_codes_and_values_are_bitsandbytes(shape, dtype, make_layer, monkeypatch):
    monkeypatch.setattr(int8, "PIECE", 4096)
    weight = weight_of(*shape).to(dtype)
    before = weight.clone()
    layer = make_layer("int8", weight)
    assert torch.equal(weight, before)
    codes, absmax, _ = int8_vectorwise_quant(weight.float())
    assert torch.equal(layer.codes, codes)
    assert torch.equal(layer.absmax, absmax)
    expected = int8_vectorwise_dequant(codes, absmax)
    assert torch.equal(layer.dequantize(), expected)
    for narrow in (torch.bfloat16, torch.float16):
        out = layer.dequantize(torch.empty(shape, dtype=narrow))
        assert torch.equal(out, expected.to(narrow))


def test_products_are_those_of_the_dequantized_weight(make_layer):
    weight, bias = weight_of(48, 80), torch.randn(48)
    layer = make_layer("int8", weight, bias=bias)
    codes, absmax, _ = int8_vectorwise_quant(weight)
    dense = int8_vectorwise_dequant(codes, absmax)
    x = torch.randn(9, 80, requires_grad=True)
    twin = x.detach().requires_grad_()
    towards = torch.randn(9, 48)
    y, expected = layer(x), F.linear(twin, dense, bias)
    y.backward(towards)
    expected.backward(towards)
    assert torch.allclose(y, expected, atol=1e-5)
    assert torch.allclose(x.grad, twin.grad, atol=1e-5)


def test_a_row_of_zeros_stays_one(make_layer):
    weight = weight_of(6, 64)
    weight[2] = 0
    found = make_layer("int8", weight).dequantize()
    assert not found[2].any()
    assert torch.allclose(found, weight, atol=float(weight.abs().max()) / 127)


def test_weights_beyond_half_precision_are_held(make_layer):
    """bitsandbytes' own 8-bit layer goes through fp16 and would overflow."""
    weight = torch.tensor([[1e6, -3e5, 0.0], [1e-6, 5e-7, -1e-6]]).bfloat16()
    found = make_layer("int8", weight).dequantize()
    assert torch.allclose(found, weight.float(), rtol=0.01, atol=0.0)


def test_a_weight_that_is_not_finite_is_refused(make_layer):
    weight = weight_of(6, 64)
    weight[2, 5] = float("inf")
    with pytest.raises(UserError, match="not finite, which int8 cannot hold"):
        make_layer("int8", weight)


def test_the_bytes_it_says_are_the_bytes_it_keeps(make_layer):
    layer = make_layer("int8", weight_of(48, 80))
    kept = sum(b.numel() * b.element_size() for b in layer.buffers())
    assert kept == int8_bytes((48, 80), NoOptions())


def test_the_meta_device_needs_no_memory(make_layer):
    layer = make_layer("int8", torch.empty(48, 80, device="meta"))
    x = torch.empty(9, 80, device="meta", requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (9, 80)
    assert {b.device.type for b in layer.buffers()} == {"meta"}


def test_a_compiled_layer_computes_the_same(make_layer):
    layer = make_layer("int8", weight_of(64, 128))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 128)
    assert torch.allclose(compiled(x), layer(x), atol=1e-6)
