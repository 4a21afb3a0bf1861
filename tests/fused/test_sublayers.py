"""Halves of blocks that kernels compute in one call: when they are, and that it changes nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.blocks import checkpoint_blocks
from lorakit.modules.low_rank import plain_path
from lorakit.modules.matmul import kernels_in_use

BARE = {"attention_bias": False, "mlp_bias": False, "head_dim": 32}
WIDE_HEADS: dict[str, Any] = {"head_dim": 32}
PHI3 = {"hidden_size": 128, "head_dim": 32, "tie_word_embeddings": False}
"""Phi-3's heads are as wide as its hidden states allow."""
LONG_WINDOW = {**WIDE_HEADS, "sliding_window": 99}
MODELS = {"llama": BARE, "mistral": LONG_WINDOW, "phi3": PHI3}


@pytest.fixture
def asked(kernels: None, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often kernels have been asked for halves, of micro-batches of any length."""
    found = kernels_in_use()
    assert found is not None
    sublayers = found.sublayers()
    if sublayers is None:
        pytest.skip("these kernels compute no halves of blocks")
    counted: Counter[str] = Counter()
    for name in ("self_attention", "feed_forward"):
        own = getattr(type(sublayers), name)

        def count(*given: Any, own: Any = own, name: str = name) -> Any:
            counted[name] += 1
            return own(*given)

        monkeypatch.setattr(type(sublayers), name, count)
    monkeypatch.setattr(type(found), "attends", lambda _, q, k: q.shape[-1] % 32 == 0)
    return counted


@pytest.mark.parametrize("mode", ["none", "selective", "block"])
@pytest.mark.parametrize("adapter", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("model_type", MODELS)
def test_equal_to_plain_autograd(
    model_type, adapter, mode, asked, make_model, make_batch, loss_and_gradients
):
    model = make_model(model_type, adapter, **MODELS[model_type])
    with plain_path():
        expected_loss, expected = loss_and_gradients(model, make_batch())
    assert not asked
    checkpoint_blocks(model, mode)
    loss, gradients = loss_and_gradients(model, make_batch())
    times = len(model.blocks) * (2 if mode == "block" else 1)
    assert asked == {"self_attention": times, "feed_forward": times}
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0, f"nothing reaches {name}"
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=2e-5 * scale, msg=name)


@pytest.mark.parametrize(
    ("model_type", "changes", "halves"),
    [
        ("llama", WIDE_HEADS, set()),
        ("mistral", WIDE_HEADS, {"feed_forward"}),
        ("gemma", WIDE_HEADS, set()),
        ("qwen2", WIDE_HEADS, {"feed_forward"}),
        ("qwen3", WIDE_HEADS, {"feed_forward"}),
        ("mistral", {"sliding_window": 99}, {"feed_forward"}),
    ],
    ids=[
        "biases",
        "a window",
        "GELU and other norms",
        "biases of q, k, v",
        "norms of heads",
        "narrow heads",
    ],
)
def test_what_is_computed_otherwise_goes_part_by_part(
    model_type, changes, halves, asked, make_model, make_batch, loss_and_gradients
):
    model = make_model(model_type, "lora", **changes)
    loss, _ = loss_and_gradients(model, make_batch())
    assert set(asked) == halves
    with plain_path():
        torch.testing.assert_close(
            loss, loss_and_gradients(model, make_batch())[0], rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("adapter", ["dropout", "some_layers"])
def test_all_layers_are_adapted_and_drop_nothing(
    adapter, asked, make_model, make_batch, loss_and_gradients
):
    model = make_model("llama", adapter, **BARE)
    loss_and_gradients(model, make_batch())
    assert not asked
    with torch.no_grad():
        model.eval().hidden(make_batch().tokens, make_batch().layout)
    assert bool(asked) == (adapter == "dropout")


@pytest.mark.parametrize(
    ("part", "halves"),
    [
        ("mlp", {"self_attention"}),
        ("self_attn", {"feed_forward"}),
        ("input_layernorm", {"feed_forward"}),
        ("post_attention_layernorm", {"self_attention"}),
    ],
)
def test_whoever_looks_on_at_a_part_sees_it(
    part, halves, asked, make_model, make_batch, loss_and_gradients
):
    model = make_model("llama", "lora", **BARE)
    seen = []
    for block in model.blocks:
        hook = lambda module, given, y: seen.append(y.shape)  # noqa: E731
        block.get_submodule(part).register_forward_hook(hook)
    checkpoint_blocks(model, "none")
    loss_and_gradients(model, make_batch())
    # What norms give is computed again in the backward pass.
    assert len(seen) == len(model.blocks) * (2 if "norm" in part else 1)
    assert set(asked) == halves


class Doubled(nn.Module):
    """A layer of another package's adapter, which only it can compute."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        return 2 * y


def test_layers_of_another_kind_are_called(asked, make_model, make_batch, loss_and_gradients):
    model = make_model("llama", "lora", **BARE)
    for block in model.blocks:
        block.mlp.up_proj = Doubled(block.mlp.up_proj)
    loss, _ = loss_and_gradients(model, make_batch())
    assert set(asked) == {"self_attention"}
    with plain_path():
        expected, _ = loss_and_gradients(model, make_batch())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
