"""The fast path gives what plain autograd gives, for every family, adapter and kind of storage."""

from __future__ import annotations

import pytest
import torch

from lorakit.loss import batch_loss
from lorakit.modules import blockwise, matmul, projections
from lorakit.modules.flash import has_flash
from lorakit.modules.low_rank import plain_path


@pytest.fixture
def assert_paths_agree(loss_and_gradients):
    def check(model: torch.nn.Module) -> None:
        loss, gradients = loss_and_gradients(model)
        with plain_path():
            plain_loss, plain_gradients = loss_and_gradients(model)
        torch.testing.assert_close(loss, plain_loss, rtol=1e-6, atol=0)
        assert gradients.keys() == plain_gradients.keys()
        for name, expected in plain_gradients.items():
            scale = float(expected.abs().max())
            assert scale > 0, f"nothing reaches {name}"
            torch.testing.assert_close(
                gradients[name], expected, rtol=0, atol=2e-5 * scale, msg=name
            )

    return check


def test_equal_to_plain_autograd(model_type, adapter, make_model, assert_paths_agree):
    assert_paths_agree(make_model(model_type, adapter))


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("adapter", ["lora", "dora_dropout"])
def test_equal_where_products_are_by_onednn(
    model_type, adapter, make_model, assert_paths_agree, monkeypatch
):
    """With every document attended by blocks, and thin products added by convolution too."""
    monkeypatch.setattr(blockwise, "WORTHWHILE", 1)
    monkeypatch.setattr(matmul, "_LARGE", 1)
    assert_paths_agree(make_model(model_type, adapter))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("adapter", ["lora", "dora", "dora_dropout"])
def test_equal_where_products_are_by_kernels(model_type, adapter, make_model, assert_paths_agree):
    assert_paths_agree(make_model(model_type, adapter))


@pytest.mark.usefixtures("kernels")
def test_equal_without_gradients(model_type, make_model, make_batch, monkeypatch):
    """As a run is evaluated."""
    model, batch = make_model(model_type, "dora_dropout").eval(), make_batch()
    asked = []
    real = projections.forward_products
    monkeypatch.setattr(
        projections, "forward_products", lambda *given: asked.append(given) or real(*given)
    )
    with torch.no_grad():
        loss = batch_loss(model, batch)
        assert asked
        with plain_path():
            torch.testing.assert_close(loss, batch_loss(model, batch), rtol=1e-6, atol=0)


class Turned(torch.nn.Module):
    """A frozen layer of another package, whose `dequantize` gives a view of what it keeps."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("turned", linear.weight.detach().t().contiguous())
        self.bias = linear.bias

    def dequantize(self) -> torch.Tensor:
        return self.turned.t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.dequantize(), self.bias)


@pytest.mark.usefixtures("kernels")
def test_equal_where_weights_are_turned(make_model, assert_paths_agree):
    model = make_model("llama", "lora")
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    for layer in layers:
        layer.base = Turned(layer.base)
    assert layers
    assert_paths_agree(model)


@pytest.mark.parametrize("adapter", ["lora", "dora_dropout"])
@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_equal_where_weights_are_materialized(model_type, adapter, make_model, assert_paths_agree):
    assert_paths_agree(make_model(model_type, adapter, stored=True))


def saved_bytes(model: torch.nn.Module, batch) -> int:
    """Bytes of what a forward pass keeps for the backward pass, parameters and tables aside."""
    kept: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    alive: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden(batch.tokens, batch.layout).sum()
    return sum(kept.values())


@pytest.mark.parametrize("model_type", ["llama", "gemma", "phi3", "qwen2", "qwen3"])
def test_keeps_less_than_plain_autograd(model_type, make_model, make_batch):
    if not has_flash(torch.empty(1, 2, 8), torch.empty(1, 1, 8)):
        pytest.skip("this torch's attention repeats what query heads share, and keeps it")
    model = make_model(model_type)
    fast = saved_bytes(model, make_batch())
    with plain_path():
        plain = saved_bytes(model, make_batch())
    assert fast < 0.75 * plain


def test_a_layer_that_cannot_say_what_it_computes_is_called_as_it_is(
    make_model, assert_paths_agree
):
    """A third party's adapter, with no more than a forward method."""

    class Doubled(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.gain = torch.nn.Parameter(torch.full((len(base.weight),), 2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) * self.gain

    model = make_model("llama")
    for block in model.blocks:
        block.self_attn.k_proj = Doubled(block.self_attn.k_proj.base)
        block.mlp.up_proj = Doubled(block.mlp.up_proj.base)
    assert_paths_agree(model)


def test_an_input_that_needs_no_gradient_gets_none(make_model, assert_paths_agree):
    """The first block's input comes from a frozen embedding."""
    model = make_model("llama", "one_layer")
    assert_paths_agree(model)
