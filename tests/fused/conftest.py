"""Small random models of every family, with an adapter that has learned something."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from lorakit.modules.matmul import use_kernels, use_onednn
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
    "one_layer": {"targets": ("q_proj",)},
}
LENGTHS = (9, 1, 14)


class Halved(StoredLinear):
    """Stores W in fp64, the product of nothing but `dequantize`."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear, torch.float32)
        self.register_buffer("stored", linear.weight.detach().double())

    def dequantize(self, out: torch.Tensor | None = None) -> torch.Tensor:
        return self.stored.to(self.compute_dtype) if out is None else out.copy_(self.stored)


def make_model(
    model_type: str, adapter: str = "lora", *, stored: bool = False, **config: Any
) -> torch.nn.Module:
    """A model of `FAMILIES`, `config` laid over its own, with one of `ADAPTERS`; in training."""
    config = {"model_type": model_type, **SIZES, **FAMILIES[model_type], **config}
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
    options = evolve(method.options(rank=3, alpha=5.0), **ADAPTERS[adapter])
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


def loss_and_gradients(
    model: torch.nn.Module, batch: Batch | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(0)
    loss = batch_loss(model, batch or make_batch())
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def onednn() -> Iterator[None]:
    """Products by oneDNN."""
    if not use_onednn(True):
        pytest.skip("this torch has no oneDNN")
    yield
    use_onednn(False)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products and attention of every size by the kernels of a plugin that this machine can use."""
    usable = [k for k in load_catalog().all("kernels") if k.unusable() is None]
    if not usable:
        pytest.skip("no plugin with kernels that this machine can use")
    found = usable[0].load()
    monkeypatch.setattr(type(found), "multiplies", lambda *_: True)
    monkeypatch.setattr(type(found), "adapts", lambda *_: True)
    use_kernels(found)
    yield
    use_kernels(None)


@pytest.fixture(params=FAMILIES)
def model_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[name for name in ADAPTERS if name != "one_layer"])
def adapter(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session", name="make_model")
def model_maker() -> Callable[..., torch.nn.Module]:
    return make_model


@pytest.fixture(scope="session", name="make_batch")
def batch_maker() -> Callable[..., Batch]:
    return make_batch


@pytest.fixture(scope="session", name="loss_and_gradients")
def gradients_of() -> Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    return loss_and_gradients
