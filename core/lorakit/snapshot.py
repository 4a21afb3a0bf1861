"""A run's snapshot: all that training has changed, taken and put back."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from attrs import asdict, fields

from lorakit.adapters import adapter_tensors, load_adapter_tensors
from lorakit.data.dataset import Dataset
from lorakit.errors import UserError
from lorakit.protocols import Snapshot
from lorakit.state import (
    EvaluationState,
    TrainState,
    flatten_optimizer,
    generator_states,
    restore_generators,
    unflatten_optimizer,
)

if TYPE_CHECKING:
    from lorakit.assemble import Run


def take_snapshot(
    run: Run,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    evaluated: EvaluationState | None = None,
) -> Snapshot:
    """The adapter, the optimizer, the random generators and the loop's state; what evaluations
    came to, if the run has any."""
    tensors, optimizer_rest = flatten_optimizer(optimizer)
    evaluation: dict[str, Any] = {}
    kept: tuple[int, ...] = ()
    options = run.recipe.evaluation
    if run.evaluation is not None and options is not None and evaluated is not None:
        kept = (evaluated.lowest_step,) if options.keep_best else ()
        rows = _fingerprint(run.evaluation.dataset)
        evaluation["evaluation"] = {"data": rows, **asdict(evaluated)}
    return Snapshot(
        state.step,
        adapter_tensors(run.base.model, run.adapted),
        run.snapshot_config(),
        {**tensors, **generator_states(run.device)},
        {
            "train": state.to_json(),
            "optimizer": optimizer_rest,
            "precision": run.precision.state(),
            "data": _fingerprint(run.dataset),
            **evaluation,
        },
        kept,
    )


def restore_snapshot(
    run: Run,
    optimizer: torch.optim.Optimizer,
    state: TrainState,
    evaluated: EvaluationState,
    snapshot: Snapshot,
) -> None:
    """Puts a newly assembled run where the snapshot's was.  What evaluations over other rows came
    to is left behind: their losses do not compare.

    Raises:
        UserError: The data is not what that run had.
    """
    if snapshot.state["data"] != _fingerprint(run.dataset):
        held_out = run.recipe.evaluation is not None and run.recipe.evaluation.fraction is not None
        cut = " (and evaluation.max_rows)" if held_out else ""
        raise UserError(
            f"{run.recipe.output}: the data is not what the run was started with",
            f"Put the data file{cut} back as it was, or start a new run with another --output.",
        )
    load_adapter_tensors(run.base.model, run.adapted, snapshot.adapter, run.recipe.output)
    unflatten_optimizer(optimizer, snapshot.tensors, snapshot.state["optimizer"])
    run.precision.restore(snapshot.state["precision"])
    saved = TrainState.from_json(snapshot.state["train"])
    for name in ("step", "epoch", "cursor", "tokens", "trained_tokens", "loss"):
        setattr(state, name, getattr(saved, name))
    before = snapshot.state.get("evaluation")
    if run.evaluation and before and before["data"] == _fingerprint(run.evaluation.dataset):
        for field in fields(EvaluationState):
            setattr(evaluated, field.name, before[field.name])
    # Last, since building and loading may have drawn random numbers.
    restore_generators(snapshot.tensors, run.device)


def _fingerprint(dataset: Dataset) -> str:
    """A hash over all tokens and labels, in order."""
    digest = hashlib.sha256()
    for example in dataset.examples:
        digest.update(json.dumps([[*example.ids], [*map(bool, example.trained)]]).encode())
    return digest.hexdigest()
