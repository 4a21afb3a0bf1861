"""Conformance of what an optimizer step is made of: optimizers and precisions."""

from __future__ import annotations

import json
import unittest
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import UserError
from lorakit.options import OptimizerOptions
from lorakit.records import OptimizerType, PrecisionPolicy
from lorakit.state import flatten_optimizer, unflatten_optimizer
from lorakit.testing.failure import ConformanceError, ensure
from lorakit.testing.offers import check_offer, make_options

LR = 1e-2
STEPS = 5


def check_optimizer(
    record: OptimizerType,
    options: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
) -> None:
    """Checks an optimizer on a quadratic of 68 x 64 and 64 parameters.

    Args:
        record: The optimizer.
        options: Keys of `[optimizer]`, in place of the defaults.
        device: Where the parameters are; the CPU by default.

    Raises:
        ConformanceError: Something does not hold.
        unittest.SkipTest: The optimizer refuses the device with a `UserError`.
    """
    check_offer(record)
    ensure(issubclass(record.options, OptimizerOptions), "options do not extend OptimizerOptions")
    chosen = make_options(record, {"lr": LR, **(options or {})})
    parameters = _parameters(device)
    try:
        optimizer = record.build(parameters, chosen)
    except UserError as error:
        raise unittest.SkipTest(f"{record.name}: {error}") from None
    ensure(isinstance(optimizer, torch.optim.Optimizer), "build: returns no torch optimizer")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    ensure(held == {id(p) for p in parameters}, "build: holds other parameters than it was given")
    rates = {group["lr"] for group in optimizer.param_groups}
    ensure(rates == {chosen.lr}, f"build: starts with lr {rates}, not the option's {chosen.lr}")

    start = _loss(parameters).item()
    _step(optimizer, parameters)
    first = _loss(parameters).item()
    ensure(first < start, f"a step raises the loss of a quadratic from {start} to {first}")
    for _ in range(STEPS):
        _step(optimizer, parameters)
    _check_state(record, chosen, optimizer, parameters)
    _check_schedule(optimizer, parameters)


def _parameters(device: torch.device | None) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    # 68 x 64 is more than the 4096 numbers below which 8-bit optimizers keep 32 bits.
    shapes = [(68, 64), (64,)]
    values = [torch.randn(*shape, generator=generator) for shape in shapes]
    return [nn.Parameter(v.to(device) if device else v) for v in values]


def _loss(parameters: list[nn.Parameter]) -> Tensor:
    return torch.stack([(p - 0.5).square().mean() for p in parameters]).sum()


def _step(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    optimizer.zero_grad()
    _loss(parameters).backward()
    optimizer.step()


def _check_state(
    record: OptimizerType,
    options: Any,
    optimizer: torch.optim.Optimizer,
    parameters: list[nn.Parameter],
) -> None:
    """Resumed from its saved state, it goes on exactly as it would have."""
    tensors, rest = flatten_optimizer(optimizer)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    try:
        rest = json.loads(json.dumps(rest))
    except TypeError as error:
        ensure(False, f"its state holds what no JSON file can: {error}")
    twins = [nn.Parameter(p.detach().clone()) for p in parameters]
    resumed = record.build(twins, options)
    unflatten_optimizer(resumed, tensors, rest)
    for _ in range(STEPS):
        _step(optimizer, parameters)
        _step(resumed, twins)
    same = all(bool(a.equal(b)) for a, b in zip(parameters, twins, strict=True))
    ensure(same, "with its state saved and restored, it takes other steps")


def _check_schedule(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """The schedule writes each step's rate into the parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in parameters]
    _step(optimizer, parameters)
    still = all(bool(a.equal(b)) for a, b in zip(parameters, before, strict=True))
    ensure(still, "with lr 0 in its parameter groups, a step moves the parameters")


def check_precision(
    record: PrecisionPolicy,
    options: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
) -> None:
    """Checks a precision policy with one step of plain gradient descent.

    Args:
        record: The policy.
        options: Keys of `[precision]`, in place of the defaults.
        device: What it decides for; the CPU by default.

    Raises:
        ConformanceError: Something does not hold.
        unittest.SkipTest: The policy refuses the device with a `UserError`.
    """
    check_offer(record)
    chosen = make_options(record, options)
    device = device or torch.device("cpu")
    try:
        precision = record.resolve(device, chosen)
    except UserError as error:
        raise unittest.SkipTest(f"{record.name}: {error}") from None
    for which in ("storage", "compute", "adapter"):
        dtype = getattr(precision, which)
        if which == "storage" and dtype is None:
            continue
        ensure(isinstance(dtype, torch.dtype), f"{which}: {dtype!r} is no dtype")
        ensure(dtype.is_floating_point, f"{which}: {dtype} is no floating-point dtype")
    notice = precision.notice
    ensure(notice is None or (notice and "\n" not in notice), f"notice: {notice!r} is no line")

    parameter = nn.Parameter(torch.tensor([3.0, 4.0], dtype=precision.adapter, device=device))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    # The gradient is the parameter itself: [3, 4], of norm 5.
    precision.backward(0.5 * parameter.square().sum())
    norm = precision.step(optimizer, 1.0)
    if not isinstance(norm, float):
        raise ConformanceError(f"step: returns {norm!r}, not the norm")
    ensure(abs(norm - 5.0) < 0.1, f"step: returns norm {norm}; before clipping it is 5")
    moved = float((parameter.detach().float().cpu() - torch.tensor([3.0, 4.0])).norm())
    ensure(abs(moved - 1.0) < 0.05, f"step: clipped to norm 1 and lr 1, it moves by {moved}")
    optimizer.zero_grad()
    before = parameter.detach().clone()
    precision.backward(0.5 * parameter.square().sum())
    precision.step(optimizer, 0.0)
    left = float(parameter.detach().abs().max())
    ensure(left < 0.05 * float(before.abs().max()), "step: max_norm 0 does not mean no clipping")

    state = precision.state()
    record.resolve(device, chosen).restore(json.loads(json.dumps(state)))
