"""A recipe's optimizer over the trained parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lorakit.errors import UserError
from lorakit.records import OptimizerType


def build_optimizer(
    record: OptimizerType, options: Any, parameters: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """Builds it, having tried it on any dtype that is not fp32.

    Raises:
        UserError: It cannot step parameters of their dtype.
    """
    for dtype, device in {(p.dtype, p.device) for p in parameters}:
        if dtype != torch.float32:
            _try(record, options, dtype, device)
    return record.build(parameters, options)


def _try(record: OptimizerType, options: Any, dtype: torch.dtype, device: torch.device) -> None:
    # Large enough for optimizers that keep their state in 8 bits to do so.
    parameter = nn.Parameter(torch.zeros(128, 64, dtype=dtype, device=device))
    parameter.grad = torch.ones_like(parameter)
    try:
        record.build([parameter], options).step()
        problem = "" if parameter.isfinite().all() else "a step gives numbers that are not finite"
    except UserError:
        raise
    except Exception as error:
        problem = str(error) or type(error).__name__
    if problem:
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"optimizer.name: {record.name} cannot hold {name} parameters: {problem}",
            "Choose a precision that keeps the adapter in fp32, or another optimizer.",
        )
