"""The loop's state: one declared block, saved as that block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from attrs import asdict, define
from torch import Tensor


@define
class TrainState:
    """Where a run is.

    Attributes:
        step: Optimizer steps done.
        epoch: Epochs completed.
        cursor: Micro-batches of the current epoch that are done.
        tokens: Input tokens seen.
        trained_tokens: Of those, the ones with a label.
        loss: Of the last step.
    """

    step: int = 0
    epoch: int = 0
    cursor: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    loss: float = float("nan")

    def to_json(self) -> dict[str, Any]:
        # JSON has no NaN; it stands only before the first step.
        return {k: None if math.isnan(v) else v for k, v in asdict(self).items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainState:
        known: dict[str, Any] = {k: v for k, v in values.items() if v is not None}
        return cls(**known)


@define
class EvaluationState:
    """What a run's evaluations came to.

    Attributes:
        step: After how many optimizer steps the last one was; -1 before the first.
        loss: Its loss; None where that was not finite.
        lowest_step: When the loss was lowest, the first time if that was twice.
        lowest_loss: The lowest.
    """

    step: int = -1
    loss: float | None = None
    lowest_step: int = -1
    lowest_loss: float | None = None

    def add(self, step: int, loss: float) -> None:
        self.step, self.loss = step, loss
        if self.lowest_loss is None or loss < self.lowest_loss:
            self.lowest_step, self.lowest_loss = step, loss


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's random generators: dropout continues where it was."""
    states = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng.cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["rng.cpu"])
    if device.type == "cuda" and "rng.cuda" in states:
        torch.cuda.set_rng_state(states["rng.cuda"], device)


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by dotted key, and the rest as JSON values.

    A tensor that several parameters share (a table of levels) is there once: files of
    safetensors hold no memory twice.
    """
    tensors: dict[str, Tensor] = {}
    keys: dict[tuple[Any, ...], str] = {}

    def plain(value: Any, key: str) -> Any:
        if isinstance(value, Tensor):
            same = (value.data_ptr() or key, value.shape, value.stride(), value.dtype)
            first = keys.setdefault(same, key)
            tensors[first] = value.detach()
            return {"tensor": first}
        if isinstance(value, Mapping):
            return {"table": {str(k): plain(v, f"{key}.{k}") for k, v in value.items()}}
        if isinstance(value, (list, tuple)):
            return {"list": [plain(v, f"{key}.{i}") for i, v in enumerate(value)]}
        return {"value": value}

    whole = optimizer.state_dict()
    return tensors, plain(whole["state"], "optimizer")


def unflatten_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> None:
    """Puts back what `flatten_optimizer` took out; the recipe's own settings (lr, betas) stay."""

    def value_of(node: Mapping[str, Any]) -> Any:
        ((kind, value),) = node.items()
        if kind == "tensor":
            return tensors[value]
        if kind == "table":
            # Optimizers key the outer table by the parameter's number; JSON sorts 10 before 2.
            entries = sorted(value.items(), key=lambda entry: (len(entry[0]), entry[0]))
            return {int(k) if k.isdigit() else k: value_of(v) for k, v in entries}
        if kind == "list":
            return [value_of(v) for v in value]
        return value

    current = optimizer.state_dict()
    optimizer.load_state_dict({"state": value_of(rest), "param_groups": current["param_groups"]})
