"""LoRA and DoRA layers against their formulas, and which layers they are put on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lorakit.adapters import apply_adapter
from lorakit.base_model import load_weights, open_base_model
from lorakit.builtin import lora
from lorakit.builtin.lora import LoRAOptions
from lorakit.builtin.lora_linear import LoRALinear
from lorakit.catalog import load_catalog
from lorakit.errors import UserError
from lorakit.progress import TerminalProgress

IDS = [5, 300, 17, 17, 201, 9, 383, 0, 44, 120, 77]
BLOCK = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def wrap(make_checkpoint):
    """`wrap(options, **config)` -> model and the names of its wrapped layers."""
    catalog = load_catalog()

    def wrap(options=None, **config):
        base = open_base_model(str(make_checkpoint(**config)), catalog, TerminalProgress())
        fp32 = catalog.get("precision", "fp32")
        precision = fp32.resolve(torch.device("cpu"), fp32.options())
        load_weights(
            base, device=torch.device("cpu"), precision=precision, progress=TerminalProgress()
        )
        if options is None:
            return base.model, []
        method = catalog.get("adapter", "lora")
        return base.model, apply_adapter(base.model, method, options, torch.float32)

    return wrap


def layer_of(inputs, outputs, *, rank=3, scale=0.7, dropout=0.0, dora=False, bias=False, seed=0):
    """A LoRALinear in float64 whose A, B and magnitudes are all random."""
    torch.manual_seed(seed)
    base = nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    layer = LoRALinear(base, rank=rank, scale=scale, dropout=dropout, dora=dora)
    with torch.no_grad():
        layer.lora_B.weight.normal_(std=0.5)
        if dora:
            layer.lora_magnitude_vector.mul_(1 + torch.rand(outputs))
    return layer.double()


def dense_weight(layer):
    """W' in float64."""
    weight = layer.base.weight + layer.scale * layer.lora_B.weight @ layer.lora_A.weight
    if layer.lora_magnitude_vector is not None:
        norms = weight.pow(2).sum(1).sqrt()
        weight = layer.lora_magnitude_vector[:, None] * weight / norms[:, None]
    return weight


@pytest.mark.parametrize("dora", [False, True])
def test_wrapped_model_starts_as_the_base(dora, wrap, logits_of):
    base, _ = wrap()
    model, _ = wrap(LoRAOptions(dora=dora))
    torch.testing.assert_close(logits_of(model, IDS), logits_of(base, IDS), atol=1e-5, rtol=0)
    starts = [p for n, p in model.named_parameters() if "lora_B" in n]
    assert len(starts) == 14
    assert all(not p.any() for p in starts)


def test_a_starts_as_a_linear_layer_does():
    layer = LoRALinear(nn.Linear(400, 10), rank=50, scale=1.0, dropout=0.0, dora=False)
    weight = layer.lora_A.weight.detach()
    # Kaiming uniform with a = sqrt 5 is uniform in +-1/sqrt(in).
    assert weight.abs().max() <= 1 / math.sqrt(400)
    assert weight.std() == pytest.approx(1 / math.sqrt(3 * 400), rel=0.02)


@pytest.mark.parametrize("dora", [False, True])
def test_only_the_adapter_is_trained(dora, wrap):
    model, _ = wrap(LoRAOptions(rank=2, dora=dora), attention_bias=True)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
    kinds = 3 if dora else 2
    assert sum(p.requires_grad for p in model.parameters()) == 14 * kinds


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", [f"{i}.{n}" for i in (0, 1) for n in BLOCK]),
        (("q_proj", "up_proj"), ["0.q_proj", "0.up_proj", "1.q_proj", "1.up_proj"]),
        (("layers.1.mlp.up_proj",), ["1.up_proj"]),
        (("model.layers.0.self_attn.v_proj", "k_proj"), ["0.k_proj", "0.v_proj", "1.k_proj"]),
        ("o_proj", ["0.o_proj", "1.o_proj"]),
        (r".*\.1\.mlp\..*", ["1.gate_proj", "1.up_proj", "1.down_proj"]),
        (r".*(q|v)_proj", ["0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj"]),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_targets_choose_layers(targets, expected, tied, wrap):
    model, names = wrap(LoRAOptions(targets=targets), tie_word_embeddings=tied)
    short = [f"{n.split('.')[2]}.{n.rpartition('.')[2]}" for n in names]
    assert short == expected
    wrapped = [n for n, m in model.named_modules() if isinstance(m, LoRALinear)]
    assert wrapped == names


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (("q_porj",), ["'q_porj'", "did you mean 'q_proj'?"]),
        (("q_proj", "value"), ["'value'"]),
        (("proj",), ["'proj'"]),
        (r".*\.7\..*", [r"'.*\\.7\\..*'"]),
        ("q", ["'q'"]),
        ((), ["the list is empty"]),
    ],
)
def test_target_that_matches_nothing_lists_what_exists(targets, said, wrap):
    with pytest.raises(UserError) as caught:
        wrap(LoRAOptions(targets=targets))
    for text in [*said, *BLOCK, "lm_head"]:
        assert text in str(caught.value)


def test_target_that_is_no_regex_says_why(wrap):
    with pytest.raises(UserError, match=r"adapter\.targets: not a valid regex: '\(q_proj'"):
        wrap(LoRAOptions(targets="(q_proj"))


@pytest.mark.parametrize("targets", [("lm_head",), ("q_proj", "lm_head"), "lm_head|.*q_proj"])
def test_head_that_shares_the_embeddings_weight_is_refused(targets, wrap):
    with pytest.raises(UserError, match="lm_head shares its weight with the embedding"):
        wrap(LoRAOptions(targets=targets))


def test_head_of_its_own_can_be_adapted(wrap, logits_of):
    model, names = wrap(LoRAOptions(targets=("lm_head",)), tie_word_embeddings=False)
    assert names == ["lm_head"]
    before = logits_of(model, IDS)
    with torch.no_grad():
        model.lm_head.lora_B.weight.normal_()
    assert (logits_of(model, IDS) - before).abs().max() > 1e-2


shapes = st.fixed_dictionaries(
    {
        "inputs": st.integers(1, 20),
        "outputs": st.integers(1, 20),
        "rank": st.integers(1, 24),
        "scale": st.floats(0.01, 8),
        "dora": st.booleans(),
        "bias": st.booleans(),
        "seed": st.integers(0, 10_000),
    }
)


def rounding(layer):
    """How much of a DoRA row's norm may be rounding error: norms are computed in fp32, from
    terms that may cancel each other out."""
    weight, a, b = (
        p.detach().abs() for p in (layer.base.weight, layer.lora_A.weight, layer.lora_B.weight)
    )
    terms = (weight + layer.scale * b @ a).pow(2).sum(1)
    dense = layer.base.weight + layer.scale * layer.lora_B.weight @ layer.lora_A.weight
    return 1e-6 * terms / dense.detach().pow(2).sum(1)


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 6))
def test_forward_equals_the_dense_formula(shape, tokens):
    layer = layer_of(**shape)
    x = torch.randn(tokens, shape["inputs"], dtype=torch.float64)
    expected = (x @ dense_weight(layer).T).detach()
    bound = 1e-10 * (1 + x.abs() @ dense_weight(layer).T.abs())
    held = torch.ones(shape["outputs"], dtype=torch.bool)
    if shape["dora"]:
        bound = bound + expected.abs() * rounding(layer)
        # A row that cancels to nothing but rounding errors has no direction to compare.
        held = rounding(layer) < 0.1
    if shape["bias"]:
        expected = expected + layer.base.bias
    assert (layer(x) - expected).abs().le(bound)[:, held].all()
    assert layer(x).isfinite().all()


@settings(max_examples=60, deadline=None)
@given(shapes)
def test_row_norms_equal_those_of_the_dense_weight(shape):
    layer = layer_of(**{**shape, "dora": True})
    dense = layer.base.weight + layer.scale * layer.lora_B.weight @ layer.lora_A.weight
    expected = dense.detach().pow(2).sum(1).sqrt()
    error = (layer.row_norms() - expected).abs()
    assert (error <= expected * rounding(layer))[rounding(layer) < 0.1].all()


def test_row_norms_of_a_usual_size_are_within_1e_6():
    layer = layer_of(64, 48, rank=8, scale=2.0, dora=True)
    dense = layer.base.weight + layer.scale * layer.lora_B.weight @ layer.lora_A.weight
    expected = dense.detach().pow(2).sum(1).sqrt()
    torch.testing.assert_close(layer.row_norms().double(), expected, atol=0, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(shapes, st.floats(0.5, 64), st.booleans())
def test_merge_equals_the_dense_formula(shape, alpha, rslora):
    rank, dora = shape["rank"], shape["dora"]
    options = LoRAOptions(rank=rank, alpha=alpha, rslora=rslora, dora=dora)
    scale = alpha / math.sqrt(rank) if rslora else alpha / rank
    assert options.scale_at("layer") == pytest.approx(scale)
    layer = layer_of(**{**shape, "scale": scale})
    tensors = {n: p.detach().float() for n, p in layer.named_parameters() if n.startswith("lora_")}
    weight = layer.base.weight.float()
    before = weight.clone()
    merged = lora.merge(weight, tensors, options, "layer")
    assert torch.equal(weight, before)
    expected = dense_weight(layer).detach()
    largest = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(merged.double(), expected, atol=1e-5 * largest, rtol=1e-4)


def test_row_of_zeros_stays_one_under_dora():
    base = nn.Linear(6, 4, bias=False).requires_grad_(False)
    base.weight[1] = 0
    layer = LoRALinear(base, rank=2, scale=1.0, dropout=0.0, dora=True)
    x = torch.randn(3, 6)
    layer(x).square().sum().backward()
    assert torch.equal(layer(x)[:, 1], torch.zeros(3))
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)
    tensors = {n: p.detach() for n, p in layer.named_parameters() if n.startswith("lora_")}
    merged = lora.merge(base.weight, tensors, LoRAOptions(rank=2, dora=True), "layer")
    torch.testing.assert_close(merged, base.weight)


def test_dora_gradients_treat_the_norm_as_a_constant():
    layer = layer_of(8, 6, dora=True, bias=True)
    x = torch.randn(5, 8, dtype=torch.float64)
    upstream = torch.randn(5, 6, dtype=torch.float64)
    layer(x).backward(upstream)
    found = {n: p.grad.clone() for n, p in layer.named_parameters() if p.requires_grad}
    layer.zero_grad()
    weight = layer.base.weight + layer.scale * layer.lora_B.weight @ layer.lora_A.weight
    norms = weight.detach().pow(2).sum(1).sqrt()
    dense = layer.lora_magnitude_vector[:, None] * weight / norms[:, None]
    (x @ dense.T + layer.base.bias).backward(upstream)
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_is_of_the_adapters_input_and_only_in_training(dora):
    layer = layer_of(50, 6, dropout=0.5, dora=dora).eval()
    x = torch.randn(4, 50, dtype=torch.float64)
    plain = layer_of(50, 6, dropout=0.0, dora=dora)
    torch.testing.assert_close(layer(x), plain(x), atol=0, rtol=0)
    layer.train()
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    # Kept inputs are scaled up, so that the mean is what evaluation gives.
    mean = torch.stack([layer(x) for _ in range(3000)]).mean(0)
    torch.testing.assert_close(mean, plain(x), atol=0.15, rtol=0)
    with torch.no_grad():
        layer.lora_B.weight.zero_()
    assert torch.equal(layer(x), layer(x))
