"""Weights stored in bf16 and widened where they are used, against widening them first."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lorakit.modules import narrow
from lorakit.modules.narrow import NarrowEmbedding, NarrowLinear, compute_in

PATIENT = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@PATIENT
@given(
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 30), st.integers(0, 12)),
    block=st.integers(1, 200),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_narrow_linear_is_a_linear_over_the_widened_weight(monkeypatch, sizes, block, bias, seed):
    torch.manual_seed(seed)
    monkeypatch.setattr(narrow, "BLOCK_ELEMENTS", block)
    inputs, outputs, tokens = sizes
    linear = nn.Linear(inputs, outputs, bias=bias).bfloat16().requires_grad_(False)
    layer = NarrowLinear(linear, torch.float32)
    x = torch.randn(tokens, inputs, requires_grad=True)
    dy = torch.randn(tokens, outputs)
    y = layer(x)
    y.backward(dy)
    weight = linear.weight.double()
    wide = x.detach().double().requires_grad_()
    expected = F.linear(wide, weight, linear.bias.double() if bias else None)
    expected.backward(dy.double())
    assert y.dtype == torch.float32
    bound = 1e-6 * (1 + wide.detach().abs() @ weight.abs().t())
    assert (y - expected).abs().le(bound).all()
    assert (x.grad - wide.grad).abs().le(1e-6 * (dy.double().abs() @ weight.abs()) + 1e-30).all()


def test_a_narrow_linear_keeps_neither_its_input_nor_a_wider_weight_for_backward():
    linear = nn.Linear(16, 24, bias=False).bfloat16().requires_grad_(False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        NarrowLinear(linear, torch.float32)(torch.randn(3, 16, requires_grad=True))
    assert not saved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_and_linears_of_another_dtype_are_replaced(dtype):
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(10, 4).to(dtype),
            "norm": nn.LayerNorm(4).to(dtype),
            "inner": nn.Sequential(nn.Linear(4, 4).to(dtype)),
            "lm_head": nn.Linear(4, 10, bias=False).to(dtype),
        }
    )
    model["lm_head"].weight = model["embed"].weight
    names = set(dict(model.named_parameters()))
    compute_in(model, torch.float32)
    kinds = NarrowEmbedding, nn.LayerNorm, NarrowLinear, NarrowLinear
    if dtype == torch.float32:
        kinds = nn.Embedding, nn.LayerNorm, nn.Linear, nn.Linear
    parts = model["embed"], model["norm"], model["inner"][0], model["lm_head"]
    assert tuple(type(part) for part in parts) == kinds
    # Names, values and tying stay: what is saved, counted or adapted does not change.
    assert set(dict(model.named_parameters())) == names
    assert model["lm_head"].weight is model["embed"].weight
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model["embed"](torch.tensor([3])).dtype == torch.float32
