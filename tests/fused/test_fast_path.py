"""The fast path gives what plain autograd gives, for every family, adapter and kind of storage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attrs import evolve

from lorakit.adapters import apply_adapter
from lorakit.catalog import load_catalog
from lorakit.data.batches import IGNORED, Batch
from lorakit.loss import batch_loss
from lorakit.modules import Layout, RMSNorm
from lorakit.modules.frozen import StoredLinear
from lorakit.modules.low_rank import plain_path
from lorakit.testing.checkpoints import meta_model
from lorakit.weights.base import family_of
from lorakit.weights.stream import linear_names

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True}
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 7},
    "gemma": GEMMA,
    "gemma2": {
        **GEMMA,
        "sliding_window": 7,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {**GEMMA, "sliding_window": 7, "query_pre_attn_scalar": 8},
    "phi3": {"tie_word_embeddings": False},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"tie_word_embeddings": False},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "dropout": {"dropout": 0.3},
    "dora_dropout": {"dora": True, "dropout": 0.2},
    "some_layers": {"targets": ("o_proj", "down_proj")},
}
LENGTHS = (9, 1, 14)


class Halved(StoredLinear):
    """Stores W in fp64, the product of nothing but `dequantize`."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear, torch.float32)
        self.register_buffer("stored", linear.weight.detach().double())

    def dequantize(self, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.stored.to(self.compute_dtype) if out is None else out.copy_(self.stored)


def make_model(model_type: str, adapter: dict[str, Any], *, stored: bool) -> torch.nn.Module:
    config = {"model_type": model_type, **SIZES, **FAMILIES[model_type]}
    catalog = load_catalog()
    model = meta_model(family_of(config, catalog, "config.json"), config).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(3)
    norms = {id(m.weight) for m in model.modules() if isinstance(m, RMSNorm)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        width = parameter.shape[-1] ** 0.5
        parameter.data = 1 + 0.2 * noise if id(parameter) in norms else noise / width
    if stored:
        for name in linear_names(model)[:-1]:
            parent, _, child = name.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, child, Halved(owner.get_submodule(child)))
    method = catalog.get("adapter", "lora")
    options = evolve(method.options(rank=3, alpha=5.0), **adapter)
    apply_adapter(model, method, options, torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        if "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.train()


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, 64, (sum(LENGTHS),), generator=generator)
    labels = torch.randint(0, 64, (sum(LENGTHS),), generator=generator)
    labels[::3] = IGNORED
    return Batch(tokens, labels, Layout.of_lengths(LENGTHS), int((labels >= 0).sum()), (0, 1, 2))


def loss_and_gradients(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(0)
    loss = batch_loss(model, make_batch())
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def assert_paths_agree(model: torch.nn.Module) -> None:
    loss, gradients = loss_and_gradients(model)
    with plain_path():
        plain_loss, plain_gradients = loss_and_gradients(model)
    torch.testing.assert_close(loss, plain_loss, rtol=1e-6, atol=0)
    assert gradients.keys() == plain_gradients.keys()
    for name, expected in plain_gradients.items():
        scale = float(expected.abs().max())
        assert scale > 0, f"nothing reaches {name}"
        torch.testing.assert_close(gradients[name], expected, rtol=0, atol=2e-5 * scale, msg=name)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_equal_to_plain_autograd(model_type: str, adapter: str) -> None:
    assert_paths_agree(make_model(model_type, ADAPTERS[adapter], stored=False))


@pytest.mark.parametrize("adapter", ["lora", "dora_dropout"])
@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_equal_where_weights_are_materialized(model_type: str, adapter: str) -> None:
    assert_paths_agree(make_model(model_type, ADAPTERS[adapter], stored=True))


def saved_bytes(model: torch.nn.Module) -> int:
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
    batch = make_batch()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden(batch.tokens, batch.layout).sum()
    return sum(kept.values())


@pytest.mark.parametrize("model_type", ["llama", "gemma", "phi3", "qwen2", "qwen3"])
def test_keeps_less_than_plain_autograd(model_type: str) -> None:
    model = make_model(model_type, ADAPTERS["lora"], stored=False)
    fast = saved_bytes(model)
    with plain_path():
        plain = saved_bytes(model)
    assert fast < 0.75 * plain


def test_a_layer_that_cannot_say_what_it_computes_is_called_as_it_is() -> None:
    """A third party's adapter, with no more than a forward method."""

    class Doubled(torch.nn.Module):
        def __init__(self, base: torch.nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.gain = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x) * self.gain

    model = make_model("llama", ADAPTERS["lora"], stored=False)
    for block in model.blocks:
        block.self_attn.k_proj = Doubled(block.self_attn.k_proj.base)
        block.mlp.up_proj = Doubled(block.mlp.up_proj.base)
    assert_paths_agree(model)


def test_an_input_that_needs_no_gradient_gets_none() -> None:
    """The first block's input comes from a frozen embedding."""
    model = make_model("llama", {"targets": ("q_proj",)}, stored=False)
    assert_paths_agree(model)
