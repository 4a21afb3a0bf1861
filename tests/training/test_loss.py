"""The chunked loss against torch's cross-entropy in float64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lorakit import loss as loss_module
from lorakit import scratch
from lorakit.builtin.lora_linear import LoRALinear
from lorakit.loss import cross_entropy_sum, frozen_head_weight
from lorakit.modules import narrow
from lorakit.modules.narrow import NarrowLinear

PATIENT = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Head:
    """The part of a CausalLM that the loss sees; remembers how many tokens it projects."""

    def __init__(
        self, width, vocabulary, *, kind="plain", cap=None, narrow=False, dtype=torch.float32
    ):
        self.made_of = {"kind": kind, "cap": cap}
        head = nn.Linear(width, vocabulary, bias=kind == "bias").to(dtype).requires_grad_(False)
        if narrow:
            head = NarrowLinear(head.bfloat16(), dtype)
        if kind == "lora":
            head = LoRALinear(head, rank=2, scale=1.5, dropout=0.0, dora=False)
            head.lora_A.to(dtype), head.lora_B.to(dtype)
            nn.init.normal_(head.lora_B.weight)
        self.lm_head = head
        self.logits_are_transformed = kind == "transformed"
        self.logit_softcap = cap
        self.projected = []

    def logits(self, hidden):
        self.projected.append(len(hidden))
        scores = self.lm_head(hidden)
        if self.logits_are_transformed:
            scores = 3 * torch.tanh(scores / 3)
        cap = self.logit_softcap
        return scores if cap is None else cap * torch.tanh(scores / cap)

    def in_float64(self):
        width, vocabulary = self.lm_head.in_features, self.lm_head.out_features
        copy = Head(width, vocabulary, **self.made_of, dtype=torch.float64)
        copy.lm_head.load_state_dict(self.lm_head.state_dict())
        return copy


cases = st.fixed_dictionaries(
    {
        "width": st.integers(1, 24),
        "vocabulary": st.integers(2, 90),
        "mask": st.lists(st.booleans(), min_size=1, max_size=40),
        "chunk": st.integers(1, 45),
        "kind": st.sampled_from(["plain", "plain", "lora", "bias", "transformed"]),
        "cap": st.sampled_from([None, 3.0, 30.0]),
        "narrow": st.booleans(),
        "block": st.integers(1, 400),
        "size": st.sampled_from([0.1, 1.0, 20.0]),
        "seed": st.integers(0, 10_000),
    }
)


def relative_error(found, expected):
    return (found.double() - expected).norm() / expected.norm().clamp_min(1e-12)


@PATIENT
@given(cases)
def test_loss_and_gradients_equal_cross_entropy_in_float64(monkeypatch, case):
    torch.manual_seed(case["seed"])
    count, vocabulary = len(case["mask"]), case["vocabulary"]
    model = Head(
        case["width"], vocabulary, kind=case["kind"], cap=case["cap"], narrow=case["narrow"]
    )
    hidden = (torch.randn(count, case["width"]) * case["size"]).requires_grad_()
    labels = torch.randint(vocabulary, (count,))
    labels[~torch.tensor(case["mask"])] = -100
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", case["chunk"] * vocabulary)
    monkeypatch.setattr(narrow, "BLOCK_ELEMENTS", case["block"])

    found = cross_entropy_sum(model, hidden, labels)
    (found * 0.25).backward()

    reference = model.in_float64()
    wide = hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(reference.logits(wide), labels, reduction="sum", ignore_index=-100)
    (expected * 0.25).backward()
    assert found.dtype == torch.float32
    assert hidden.grad[labels == -100].abs().sum() == 0
    # What fp32 can hold: 1e-6 of the sum of the terms' sizes, before they cancel each other out.
    # A probability has the rounding error of the logits it comes from.
    kept = labels != -100
    scores = reference.logits(wide).detach()[kept]
    products = reference.lm_head(wide).detach()[kept]
    unit = 1e-6 * (1 + products.abs().max().item()) if kept.any() else 0.0
    assert abs(found.item() - expected.item()) <= unit * kept.sum() + 1e-6 * expected.item()
    ends = F.one_hot(labels[kept], vocabulary)
    terms = (scores.softmax(1) + ends) / 4
    weight, a, b, scale = parts(reference.lm_head)
    bound = terms @ (weight + scale * b @ a)
    assert (hidden.grad - wide.grad)[kept].abs().le(unit * bound + 1e-30).all()
    if case["kind"] == "lora":
        inputs = wide.detach()[kept].abs()
        for part, limit in (
            ("lora_A", scale * (terms @ b).T @ inputs),
            ("lora_B", scale * terms.T @ (inputs @ a.T)),
        ):
            mine = getattr(model.lm_head, part).weight.grad
            theirs = getattr(reference.lm_head, part).weight.grad
            assert (mine - theirs).abs().le(unit * limit + 1e-30).all()


def parts(head):
    """|W|, |A|, |B| and the scale of a head; zeros where it has no adapter."""
    if isinstance(head, LoRALinear):
        found = head.base.weight, head.lora_A.weight, head.lora_B.weight
        return *(p.detach().abs() for p in found), head.scale
    weight = head.weight.detach().abs()
    return weight, weight.new_zeros(1, weight.shape[1]), weight.new_zeros(len(weight), 1), 1.0


@pytest.mark.parametrize("kind", ["plain", "lora"])
@pytest.mark.parametrize("tokens", [1, 64, 65, 1000])
def test_loss_of_a_usual_size_is_within_1e_6(kind, tokens, monkeypatch):
    torch.manual_seed(tokens)
    model = Head(64, 500, kind=kind)
    hidden = torch.randn(tokens, 64, requires_grad=True)
    labels = torch.randint(500, (tokens,))
    labels[1::3] = -100
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 64 * 500)
    found = cross_entropy_sum(model, hidden, labels)
    found.backward()
    wide = hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(model.in_float64().logits(wide), labels, reduction="sum")
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(hidden.grad, wide.grad) <= 1e-6


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize(
    ("kind", "plain"), [("plain", True), ("lora", False), ("bias", False), ("transformed", False)]
)
def test_only_a_frozen_head_without_more_takes_the_short_way(kind, plain, cap, narrow):
    model = Head(8, 20, kind=kind, cap=cap, narrow=narrow)
    assert (frozen_head_weight(model) is not None) == plain
    model.lm_head.requires_grad_(True)
    assert frozen_head_weight(model) is None


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("cap", [None, 5.0])
def test_half_precision_rounds_products_and_nothing_else(dtype, unit, cap, monkeypatch):
    """The sums over the vocabulary are fp32: what is left is a rounding of logits and of
    gradients, however large the vocabulary."""
    torch.manual_seed(0)
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 7 * 20_000)
    model = Head(64, 20_000, cap=cap, dtype=dtype)
    hidden = torch.randn(20, 64).to(dtype).requires_grad_()
    labels = torch.randint(20_000, (20,))
    found = cross_entropy_sum(model, hidden, labels)
    (found / 20).backward()
    wide = hidden.detach().double().requires_grad_()
    expected = F.cross_entropy(model.in_float64().logits(wide), labels)
    expected.backward()
    assert found.dtype == torch.float32
    assert hidden.grad.dtype == dtype
    assert found.item() / 20 == pytest.approx(expected.item(), rel=unit)
    assert relative_error(hidden.grad, wide.grad) <= 2 * unit


def test_gradients_at_the_end_of_the_range_of_fp16_are_not_lost():
    """A token that is all but certain has gradients where fp16 has a few bits left."""
    torch.manual_seed(0)
    model = Head(32, 50, dtype=torch.float16)
    labels = torch.randint(50, (6,))
    hidden = (model.lm_head.weight[labels].detach() * 45).requires_grad_()
    scores = model.in_float64().logits(hidden.detach().double())
    left = 1 - scores.softmax(1)[torch.arange(6), labels]
    loss_scale = 2.0**14
    (cross_entropy_sum(model, hidden, labels) * loss_scale).backward()
    wide = hidden.detach().double().requires_grad_()
    F.cross_entropy(model.in_float64().logits(wide), labels, reduction="sum").backward()
    assert left.max() < 2e-4
    error = (hidden.grad.double() / loss_scale - wide.grad).norm(dim=1)
    assert (error <= 0.015 * wide.grad.norm(dim=1)).all()


def test_head_with_an_adapter_projects_a_chunk_at_a_time(monkeypatch):
    model = Head(8, 20, kind="lora")
    labels = torch.randint(20, (50,))
    labels[10:20] = -100
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 7 * 20)
    hidden = torch.randn(50, 8, requires_grad=True)
    cross_entropy_sum(model, hidden, labels).backward()
    # Once forward and once more in the backward pass, and never a token without a label.
    assert max(model.projected) == 7
    assert sum(model.projected) == 2 * 40


@pytest.mark.parametrize("narrow_head", [False, True])
@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_never_more_than_a_chunk_of_logits_is_alive(kind, narrow_head, monkeypatch):
    """Every tensor torch makes on the way is counted: none is larger than a chunk."""
    from torch.utils._python_dispatch import TorchDispatchMode

    model = Head(12, 300, kind=kind, narrow=narrow_head)
    labels = torch.randint(300, (200,))
    hidden = torch.randn(200, 12, requires_grad=True)
    base = model.lm_head.base if kind == "lora" else model.lm_head
    head = base.weight.untyped_storage().data_ptr()
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                # Views of the head take no memory.
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != head:
                    largest = max(largest, tensor.numel() * tensor.itemsize)
            return result

    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 8 * 300)
    monkeypatch.setattr(narrow, "BLOCK_ELEMENTS", 60 * 12)
    monkeypatch.setattr(scratch, "_kept", {})
    with Watch():
        cross_entropy_sum(model, hidden, labels).backward()
    # 8 tokens' logits, in bytes; all 200 hidden states take as many, the head would take half more.
    assert largest == 8 * 300 * 4


PEAK = """
import os, resource, sys, torch
from torch import nn
from lorakit.loss import cross_entropy_sum
from lorakit.modules.narrow import NarrowLinear

class Model:
    def __init__(self, vocabulary, compute, stored, cap):
        self.logit_softcap = cap
        head = nn.Linear(256, vocabulary, bias=False, device="meta")
        weight = torch.full((vocabulary, 256), 0.01, dtype=stored)
        head.weight = nn.Parameter(weight, requires_grad=False)
        self.lm_head = head if compute == stored else NarrowLinear(head, compute)

def step(model, compute):
    hidden = torch.randn(400, 256, dtype=compute, requires_grad=True)
    cross_entropy_sum(model, hidden, torch.arange(400)).backward()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

for words in sys.argv[1:]:
    # A peak never falls: each case has a process of its own.
    if os.fork():
        os.wait()
        continue
    compute, stored, cap = words.split()
    made_of = getattr(torch, compute), getattr(torch, stored), float(cap) or None
    step(Model(1000, *made_of), made_of[0])
    model = Model(128_256, *made_of)
    before = peak()
    step(model, made_of[0])
    print(peak() - before, flush=True)
    os._exit(0)
"""


def test_peak_memory_at_a_vocabulary_of_128k():
    """400 tokens' logits are 196 MB of fp32, the head 125 MB; a chunk of logits is 64 MB."""
    buffers = {
        "float32 float32 0": 64,
        "float32 float32 30": 64 + 64,
        "bfloat16 bfloat16 0": 64 + 32,
        # A block of the head, widened to fp32, beside a chunk of logits.
        "float32 bfloat16 0": 64 + 64,
    }
    found = subprocess.run(
        [sys.executable, "-c", PEAK, *buffers], capture_output=True, text=True, check=True
    )
    for line, (case, expected) in zip(found.stdout.splitlines(), buffers.items(), strict=True):
        assert float(line) <= expected + 16, case


def test_chunk_is_at_least_a_token(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 3)
    model = Head(4, 30)
    hidden, labels = torch.randn(5, 4), torch.randint(30, (5,))
    expected = F.cross_entropy(model.logits(hidden), labels, reduction="sum")
    torch.testing.assert_close(cross_entropy_sum(model, hidden, labels), expected)


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_nothing_trained_is_a_loss_of_zero(kind):
    model = Head(4, 30, kind=kind)
    hidden = torch.randn(5, 4, requires_grad=True)
    loss = cross_entropy_sum(model, hidden, torch.full((5,), -100))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()


def test_evaluation_without_gradients_gives_the_same_loss():
    model = Head(16, 50)
    hidden, labels = torch.randn(9, 16, requires_grad=True), torch.randint(50, (9,))
    with torch.no_grad():
        quiet = cross_entropy_sum(model, hidden, labels)
    assert quiet.item() == cross_entropy_sum(model, hidden, labels).item()
