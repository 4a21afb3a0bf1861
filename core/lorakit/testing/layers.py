"""Conformance of what takes the place of a linear layer: adapters and quantizations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorakit.adapters import (
    adapted_modules,
    adapter_config,
    adapter_tensors,
    apply_adapter,
    group_by_layer,
    load_adapter_tensors,
)
from lorakit.records import AdapterMethod, QuantizationScheme
from lorakit.testing.failure import ensure
from lorakit.testing.offers import check_offer, make_options
from lorakit.weights.stream import linear_names

INPUTS, OUTPUTS = 128, 64
LARGEST_ERROR = 0.25
"""Of a dequantized weight, relative, in the 2-norm: 4 bits with a scale a block come to 0.1."""


class _Layers(nn.Module):
    """Linear layers under names as models have them, square so that they can be chained."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    name: nn.ModuleDict({part: nn.Linear(24, 24, bias) for part in parts})
                    for name, parts, bias in (
                        ("self_attn", ("q_proj", "k_proj", "v_proj", "o_proj"), True),
                        ("mlp", ("gate_proj", "up_proj", "down_proj"), False),
                    )
                }
            )
            for _ in range(2)
        )
        self.lm_head = nn.Linear(24, 40, bias=False)
        # Kept, since an adapter's own layers are linear too.
        self.names = linear_names(self)

    def forward(self, x: Tensor) -> Tensor:
        """x `[N, 24]` -> `[N, 40]`."""
        for name in self.names:
            x = torch.tanh(self.get_submodule(name)(x))
        return x


def check_adapter(record: AdapterMethod, options: Mapping[str, Any] | None = None) -> None:
    """Checks an adapter method on fourteen small layers.

    Args:
        record: The method.
        options: Keys of `[adapter]`, in place of the defaults.

    Raises:
        ConformanceError: Something does not hold.
    """
    check_offer(record)
    chosen = make_options(record, options)
    torch.manual_seed(0)
    model = _Layers()
    plain = {n: cast(nn.Linear, model.get_submodule(n)) for n in model.names}
    x = torch.randn(7, 24)
    before = model(x).detach()
    names = apply_adapter(model, record, chosen, torch.float32)
    ensure(names, "targets: picks no layer with these options")
    ensure(set(names) <= set(plain), "targets: names layers that were not offered")
    ensure(len(set(names)) == len(names), "targets: names a layer twice")

    model.eval()
    ensure(torch.allclose(model(x), before, atol=1e-6), "wrap: changes the output at the start")
    for name, wrapped in adapted_modules(model, names):
        ensure(
            getattr(wrapped, "base", None) is plain[name], "wrap: the layer is not kept as .base"
        )
    _check_parameters(record, model, names, x)
    _check_files(record, chosen, model, names, list(plain))
    _check_merge(record, chosen, model, names, plain)


def _check_parameters(record: AdapterMethod, model: nn.Module, names: list[str], x: Tensor) -> None:
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    own = {
        f"{name}.{suffix}"
        for name, wrapped in adapted_modules(model, names)
        for suffix, _ in wrapped.named_parameters()
        if not suffix.startswith("base.")
    }
    ensure(own, "wrap: the module has no parameter of its own")
    ensure(trained == own, f"other parameters are trained: {sorted(trained ^ own)[:3]}")
    for key in own:
        layer = next(n for n in names if key.startswith(f"{n}."))
        start = key.removeprefix(f"{layer}.")
        ensure(
            start.startswith(record.parameter_prefix),
            f"{start}: does not start with parameter_prefix {record.parameter_prefix!r}",
        )
    model.train()
    model(x).square().sum().backward()
    parameters = dict(model.named_parameters())
    gradients = [parameters[name].grad for name in own]
    ensure(
        any(g is not None and g.any() for g in gradients),
        "no parameter of the adapter gets a gradient",
    )
    stray = [n for n, p in parameters.items() if n not in own and p.grad is not None]
    ensure(not stray, f"the base gets gradients: {stray[:3]}")


def _check_files(
    record: AdapterMethod, options: Any, model: nn.Module, names: list[str], linears: list[str]
) -> None:
    config = json.loads(json.dumps(adapter_config(record, options, names, "base")))
    ensure(config["peft_type"] == record.peft_type, "to_config: changes peft_type")
    again = record.from_config(config)
    ensure(isinstance(again, record.options), "from_config: gives no instance of the options")
    ensure(record.targets(again, linears) == names, "from_config: picks other layers")
    ensure(
        record.to_config(again, names) == record.to_config(options, names),
        "from_config: gives options that to_config writes differently",
    )
    _randomize(model, names)
    saved = {k: t.clone() for k, t in adapter_tensors(model, names).items()}
    grouped = group_by_layer(saved, record.parameter_prefix, Path("sample"))
    ensure(set(grouped) == set(names), "parameter_prefix: keys do not split into layer and rest")
    _randomize(model, names, seed=2)
    load_adapter_tensors(model, names, saved, Path("sample"))
    back = adapter_tensors(model, names)
    ensure(all(bool(back[k].equal(t)) for k, t in saved.items()), "tensors change when loaded")


def _randomize(model: nn.Module, names: list[str], seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, wrapped in adapted_modules(model, names):
            for name, parameter in wrapped.named_parameters():
                if not name.startswith("base."):
                    noise = torch.randn(parameter.shape, generator=generator)
                    # Away from the start by enough to be seen, and never through zero.
                    parameter.add_(0.1 * noise)


@torch.no_grad()
def _check_merge(
    record: AdapterMethod,
    options: Any,
    model: nn.Module,
    names: list[str],
    plain: Mapping[str, nn.Linear],
) -> None:
    model.eval()
    flat = adapter_tensors(model, names)
    grouped = group_by_layer(flat, record.parameter_prefix, Path("sample"))
    for name, wrapped in adapted_modules(model, names):
        linear = plain[name]
        stored = linear.weight.clone()
        merged = record.merge(linear.weight, grouped[name], options, name)
        ensure(merged.shape == stored.shape, f"merge: gives {list(merged.shape)}")
        ensure(merged.dtype == torch.float32, f"merge: gives {merged.dtype}, not fp32")
        ensure(linear.weight.equal(stored), "merge: writes to the weight it was given")
        x = torch.randn(9, linear.in_features)
        ensure(
            torch.allclose(F.linear(x, merged, linear.bias), wrapped(x), atol=1e-4),
            f"merge: the merged weight of {name} computes something else than the wrapped layer",
        )


def check_quantization(
    record: QuantizationScheme,
    options: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
) -> None:
    """Checks a quantization scheme on a layer of 128 inputs and 64 outputs.

    Args:
        record: The scheme.
        options: Keys of `[quantization]`, in place of the defaults.
        device: Where the weight is; the CPU by default.

    Raises:
        ConformanceError: Something does not hold.
    """
    check_offer(record)
    chosen = make_options(record, options)
    torch.manual_seed(0)
    weight = torch.randn(OUTPUTS, INPUTS, device=device) / INPUTS**0.5
    for with_bias in (False, True):
        linear = nn.Linear(INPUTS, OUTPUTS, bias=with_bias, device="meta")
        module = record.quantize(linear, weight.clone(), chosen, torch.float32)
        ensure(isinstance(module, nn.Module), "quantize: returns no module")
        bias = torch.randn(OUTPUTS, device=device) if with_bias else None
        if bias is not None:
            # Streamed in behind the weight, as core does it.
            module.bias = nn.Parameter(bias, requires_grad=False)
        _check_quantized(module, weight, bias)


def _check_quantized(module: Any, weight: Tensor, bias: Tensor | None) -> None:
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    ensure(sizes == (INPUTS, OUTPUTS), f"in_features and out_features are {sizes}")
    ensure(hasattr(module, "bias"), "the module has no `bias`")
    stored = [*module.parameters(), *module.buffers()]
    size = sum(t.numel() * t.element_size() for t in stored if t is not module.bias)
    ensure(size < weight.numel() * 2, f"keeps {size:,} bytes, no fewer than bf16 would")
    dense = module.dequantize()
    ensure(dense.shape == weight.shape, f"dequantize: gives {list(dense.shape)}")
    error = float((dense.float() - weight).norm() / weight.norm())
    ensure(error < LARGEST_ERROR, f"dequantize: is {error:.0%} off the weight")

    x = torch.randn(5, INPUTS, device=weight.device, requires_grad=True)
    y = module(x)
    expected = F.linear(x.detach(), dense.to(x.dtype), bias)
    ensure(torch.allclose(y, expected, atol=1e-2), "forward: is not x times the dequantized weight")
    towards = torch.randn_like(y)
    y.backward(towards)
    ensure(x.grad is not None, "forward: passes no gradient to its input")
    gradient = towards @ dense.to(towards.dtype)
    ensure(torch.allclose(cast(Tensor, x.grad), gradient, atol=1e-2), "the input's gradient is off")
    trained = [n for n, p in module.named_parameters() if p.requires_grad or p.grad is not None]
    ensure(not trained, f"parameters are trained: {trained}")
