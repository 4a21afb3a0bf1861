"""bitsandbytes' optimizers through lorakit: the same numbers, the same state, exact resume."""

from __future__ import annotations

import warnings

import bitsandbytes
import pytest
import torch
from torch import nn

from lorakit.catalog import load_catalog
from lorakit.state import flatten_optimizer

ADAM = {"lr": 1e-2, "weight_decay": 0.1}
LION = {"lr": 1e-3, "weight_decay": 0.1}
TWINS = {
    "adamw8bit": (ADAM, bitsandbytes.optim.AdamW8bit),
    "paged_adamw": (ADAM, bitsandbytes.optim.AdamW),
    "paged_adamw8bit": (ADAM, bitsandbytes.optim.AdamW8bit),
    "lion8bit": (LION, bitsandbytes.optim.Lion8bit),
    "paged_lion8bit": (LION, bitsandbytes.optim.Lion8bit),
}


def parameters_of(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    # One above and one below the size from which state is kept in 8 bits; ragged blocks.
    return [nn.Parameter(torch.randn(*s, generator=generator)) for s in [(70, 61), (64,)]]


def descend(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], steps: int) -> None:
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = 0.1 * parameter.detach() + noise
        optimizer.step()


def build(name: str, parameters: list[nn.Parameter], **options: float) -> torch.optim.Optimizer:
    record = load_catalog().get("optimizer", name)
    return record.build(parameters, record.options(**options))


@pytest.mark.parametrize("name", TWINS)
def test_steps_are_bitsandbytes(name):
    options, twin = TWINS[name]
    ours, theirs = parameters_of(), parameters_of()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        descend(build(name, ours, **options), ours, 10)
    descend(twin(theirs, **options), theirs, 10)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("name", "error"), [("paged_adamw", 1e-5), ("adamw8bit", 2e-2)])
def test_steps_are_near_torch_adamw(name, error):
    ours, theirs = parameters_of(), parameters_of()
    descend(build(name, ours, **ADAM), ours, 10)
    descend(torch.optim.AdamW(theirs, **ADAM), theirs, 10)
    start = parameters_of()
    for found, expected, before in zip(ours, theirs, start, strict=True):
        moved = (expected - before).norm()
        assert (found - expected).norm() < error * moved


@pytest.mark.parametrize("name", TWINS)
def test_all_options_reach_the_optimizer(name):
    options = {"lr": 0.2, "weight_decay": 0.3, "beta1": 0.4, "beta2": 0.5}
    if "lion" not in name:
        options["eps"] = 0.6
    (group,) = build(name, parameters_of(), **options).param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.2, 0.3, (0.4, 0.5))
    assert "lion" in name or group["eps"] == 0.6


@pytest.mark.parametrize("name", [*TWINS, "adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_it_says_are_the_bytes_it_keeps(name, dtype):
    record = load_catalog().get("optimizer", name)
    for shape in [(70, 61), (64,), (4096,), (8, 512)]:
        for extra in [{}, {"momentum": 0.9}] if name == "sgd" else [{}]:
            options = record.options(**extra)
            parameter = nn.Parameter(torch.ones(shape, dtype=dtype))
            parameter.grad = torch.ones_like(parameter)
            optimizer = record.build([parameter], options)
            optimizer.step()
            tensors, _ = flatten_optimizer(optimizer)
            # The tables of levels are shared by all parameters.
            own = {k: t for k, t in tensors.items() if "qmap" not in k}
            kept = sum(t.numel() * t.element_size() for t in own.values())
            assert kept == record.state_bytes(shape, dtype.itemsize, options)


@pytest.mark.parametrize("name", TWINS)
def test_only_paged_optimizers_say_that_they_do_not_page(name):
    record = load_catalog().get("optimizer", name)
    for device, pages in [("cpu", False), ("mps", False), ("cuda", True)]:
        said = record.notice and record.notice(torch.device(device), record.options())
        assert bool(said) is (name.startswith("paged") and not pages)


def test_shared_tables_are_saved_once():
    parameters = [nn.Parameter(torch.ones(70, 61)) for _ in range(3)]
    optimizer = build("adamw8bit", parameters)
    descend(optimizer, parameters, 1)
    tensors, _ = flatten_optimizer(optimizer)
    assert len({t.data_ptr() for t in tensors.values()}) == len(tensors)
    assert sum("qmap" in key for key in tensors) == 2
