"""The training loop."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from attrs import frozen
from torch import nn

from lorakit.data.ahead import prepared
from lorakit.data.batches import Batch, BatchPlan
from lorakit.errors import RunError
from lorakit.logs import LoggerGroup
from lorakit.loss import batch_loss
from lorakit.memory import peak_memory_bytes
from lorakit.modules.row_norms import norms_kept
from lorakit.protocols import CausalLM, Precision
from lorakit.state import TrainState


@frozen
class Result:
    """What a run came to.

    Attributes:
        output: The run directory.
        steps: Optimizer steps done, in all sessions of the run together.
        loss: Of the last step.
        eval_loss: Of the last evaluation; None if there was none.
    """

    output: Path
    steps: int
    loss: float
    eval_loss: float | None = None


@frozen
class Limits:
    """When to stop and when to save: `epochs`, `total_steps`, and a checkpoint each
    `every_steps` (0: at the ends of epochs only)."""

    epochs: int
    total_steps: int
    every_steps: int


def train(
    model: CausalLM,
    plan: BatchPlan,
    optimizer: torch.optim.Optimizer,
    lr_at: Callable[[int], float],
    precision: Precision,
    state: TrainState,
    limits: Limits,
    *,
    device: torch.device,
    max_grad_norm: float,
    log: LoggerGroup,
    evaluate: Callable[[TrainState], bool],
    save: Callable[[TrainState], None],
    epoch_done: Callable[[TrainState], None],
    stop: threading.Event,
) -> None:
    """Trains until the limits are reached, or until `stop` is set.

    The loss of an optimizer step is summed over its trained tokens and divided by their number
    once, so it does not depend on how the step is cut into micro-batches; a ragged last window
    is a step like any other.

    Args:
        model: Its adapter's parameters require gradients, nothing else does.
        plan: Gives the micro-batches of an epoch.
        optimizer: Over the adapter's parameters.
        lr_at: Step -> learning rate.
        precision: Does the backward pass and the step, scaling gradients if the dtype needs it.
        state: Where the run is; advanced in place.
        limits: When to stop and to save.
        device: Where batches go.
        max_grad_norm: 0 means no clipping.
        log: Takes each step's numbers.
        evaluate: Called wherever the run could be evaluated; decides whether it is, leaves off
            once `stop` is set, and says whether what it found is worth a checkpoint.
        save: Writes a checkpoint.
        epoch_done: Called at each epoch's end, after its checkpoint.
        stop: Set by a signal; the step under way is finished, then saved.

    Raises:
        RunError: The loss or the gradient is not finite.
    """
    optimizer.zero_grad()
    evaluate(state)
    if stop.is_set() or state.step == limits.total_steps:
        # What the evaluation came to.
        save(state)
    while state.epoch < limits.epochs and state.step < limits.total_steps and not stop.is_set():
        for window, seconds in _timed(prepared(plan.windows(state.epoch, state.cursor), device)):
            started = time.perf_counter()
            trained = sum(batch.trained for batch in window)
            lr = lr_at(state.step)
            for group in optimizer.param_groups:
                group["lr"] = lr

            loss = 0.0
            with norms_kept():
                for batch in window:
                    part = batch_loss(model, batch.to(device)) / trained
                    precision.backward(part)
                    loss += part.item()
            _check_finite("loss", loss, window, state, plan)
            grad_norm = precision.step(optimizer, max_grad_norm)
            if grad_norm is None:
                log.notice(f"step {state.step + 1} is skipped. {precision.notice}")
            else:
                _check_finite("gradient norm", grad_norm, window, state, plan)
            optimizer.zero_grad()

            tokens = sum(batch.size for batch in window)
            _advance(state, window, tokens, trained, loss)
            step_seconds = time.perf_counter() - started + seconds
            log.metrics(
                {
                    "step": state.step,
                    "epoch": state.epoch + 1,
                    "loss": loss,
                    "lr": lr,
                    **({} if grad_norm is None else {"grad_norm": grad_norm}),
                    "tokens": tokens,
                    "trained_tokens": trained,
                    "tokens_per_second": tokens / step_seconds,
                    "trained_tokens_per_second": trained / step_seconds,
                    "step_seconds": step_seconds,
                    "data_seconds": seconds,
                    "peak_memory_bytes": peak_memory_bytes(device),
                }
            )
            # The last step of an epoch is saved below, once the epoch counts as done.
            ended = state.step == limits.total_steps or plan.is_over(state.epoch, state.cursor)
            good = not ended and evaluate(state)
            if stop.is_set() or ended:
                break
            if good or (limits.every_steps and state.step % limits.every_steps == 0):
                save(state)

        epoch_ended = plan.is_over(state.epoch, state.cursor)
        if epoch_ended:
            state.epoch, state.cursor = state.epoch + 1, 0
        # Before it is saved: what a checkpoint's evaluation came to is in it.
        evaluate(state)
        save(state)
        if epoch_ended:
            epoch_done(state)


def _timed(windows: Iterator[list[Batch]]) -> Iterator[tuple[list[Batch], float]]:
    """Each window with the seconds it took to make: time the step waited for data."""
    started = time.perf_counter()
    for window in windows:
        yield window, time.perf_counter() - started
        started = time.perf_counter()


def _advance(
    state: TrainState, window: Sequence[Batch], tokens: int, trained: int, loss: float
) -> None:
    state.step += 1
    state.cursor += sum(batch.joined for batch in window)
    state.tokens += tokens
    state.trained_tokens += trained
    state.loss = loss


def _check_finite(
    what: str, value: float, window: Sequence[Batch], state: TrainState, plan: BatchPlan
) -> None:
    """Stops before a broken number reaches the adapter or a checkpoint."""
    if math.isfinite(value):
        return
    rows = [plan.dataset.where[i] for batch in window for i in batch.rows]
    shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    raise RunError(
        f"step {state.step + 1}: the {what} is {value}. Checkpoints from before are untouched. "
        f"The step's rows: {shown}. A lower optimizer.lr or precision fp32 may help."
    )


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require gradients: the adapter's."""
    return [p for p in model.parameters() if p.requires_grad]
