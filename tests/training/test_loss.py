"""The chunked loss against torch's cross-entropy in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lorakit import loss as loss_module
from lorakit.builtin.lora_linear import LoRALinear
from lorakit.loss import cross_entropy_sum, has_plain_frozen_head

PATIENT = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Head:
    """The part of a CausalLM that the loss sees; remembers how many tokens it projects."""

    def __init__(self, width, vocabulary, *, kind="plain", dtype=torch.float32):
        head = nn.Linear(width, vocabulary, bias=kind == "bias").to(dtype).requires_grad_(False)
        if kind == "lora":
            head = LoRALinear(head, rank=2, scale=1.5, dropout=0.0, dora=False).to(dtype)
            nn.init.normal_(head.lora_B.weight)
        self.lm_head = head
        self.logits_are_transformed = kind == "soft_cap"
        self.projected = []

    def logits(self, hidden):
        self.projected.append(len(hidden))
        scores = self.lm_head(hidden)
        return 3 * torch.tanh(scores / 3) if self.logits_are_transformed else scores

    def in_float64(self):
        copy = Head.__new__(Head)
        copy.projected = []
        copy.logits_are_transformed = self.logits_are_transformed
        kind = "lora" if isinstance(self.lm_head, LoRALinear) else "plain"
        width, vocabulary = self.lm_head.in_features, self.lm_head.out_features
        if kind == "plain":
            kind = "bias" if self.lm_head.bias is not None else "plain"
        copy.lm_head = Head(width, vocabulary, kind=kind, dtype=torch.float64).lm_head
        copy.lm_head.load_state_dict(self.lm_head.state_dict())
        return copy


cases = st.fixed_dictionaries(
    {
        "width": st.integers(1, 24),
        "vocabulary": st.integers(2, 90),
        "mask": st.lists(st.booleans(), min_size=1, max_size=40),
        "chunk": st.integers(1, 45),
        "kind": st.sampled_from(["plain", "lora", "bias", "soft_cap"]),
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
    model = Head(case["width"], vocabulary, kind=case["kind"])
    hidden = (torch.randn(count, case["width"]) * case["size"]).requires_grad_()
    labels = torch.randint(vocabulary, (count,))
    labels[~torch.tensor(case["mask"])] = -100
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", case["chunk"] * vocabulary)

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
    unit = 1e-6 * (1 + scores.abs().max().item()) if kept.any() else 0.0
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


@pytest.mark.parametrize(
    ("kind", "plain"), [("plain", True), ("lora", False), ("bias", False), ("soft_cap", False)]
)
def test_only_a_plain_frozen_head_takes_the_short_way(kind, plain):
    model = Head(8, 20, kind=kind)
    assert has_plain_frozen_head(model) == plain
    model.lm_head.requires_grad_(True)
    assert not has_plain_frozen_head(model)


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


@pytest.mark.parametrize("kind", ["plain", "lora"])
def test_never_more_than_a_chunk_of_logits_is_alive(kind, monkeypatch):
    """Every tensor torch makes on the way is counted: none is as large as two chunks."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return result

    model = Head(4, 300, kind=kind)
    labels = torch.randint(300, (200,))
    hidden = torch.randn(200, 4, requires_grad=True)
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 8 * 300)
    with Watch():
        cross_entropy_sum(model, hidden, labels).backward()
    assert largest <= 8 * 300


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
