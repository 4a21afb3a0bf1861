"""The loss over rows that are not trained on, while a run trains."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from attrs import define
from torch import nn

from lorakit.arena import give_back_memory
from lorakit.data.evaluation_set import EvaluationSet
from lorakit.logs import LoggerGroup
from lorakit.loss import batch_loss
from lorakit.options import EvaluationOptions
from lorakit.protocols import CausalLM
from lorakit.runtime import trim_heap
from lorakit.state import EvaluationState, TrainState, generator_states, restore_generators

NOTABLE = 0.01
"""A loss that is higher by so much has a perplexity that is higher by a hundredth."""


@define
class Evaluation:
    """Evaluates a run whenever that is due.

    Args:
        model: With the adapter on.
        rows: What it is evaluated over.
        options: Say when.
        total_steps: Of the run; evaluated at its end, too.
        results: What came of it so far; written to.
        device: Where the model is.
        log: Takes the numbers.
        stop: Once it is set, no evaluation starts, and one under way ends without a result.
    """

    model: nn.Module
    rows: EvaluationSet
    options: EvaluationOptions
    total_steps: int
    results: EvaluationState
    device: torch.device
    log: LoggerGroup
    stop: threading.Event

    def is_due(self, state: TrainState) -> bool:
        """Whether the run is to be evaluated where it stands, and has not been yet."""
        if self.results.step == state.step:
            return False
        if not state.step:
            return self.options.at_start
        every = self.options.every_steps
        between = bool(every) and state.step % every == 0
        return between or not state.cursor or state.step == self.total_steps

    def __call__(self, state: TrainState) -> bool:
        """Evaluates if the run stands where that is due; changes nothing that training uses.

        Returns:
            Whether the options ask for a checkpoint: the loss is the lowest so far.
        """
        if not self.is_due(state):
            return False
        started = time.perf_counter()
        loss = mean_loss(self.model, self.rows, self.device, self.stop)
        if loss is None:
            return False
        if not math.isfinite(loss):
            self.results.step, self.results.loss = state.step, None
            self.log.notice(f"eval at step {state.step}: the loss is {loss}, and is not logged")
            return False
        lowest = self.results.lowest_loss
        self.results.add(state.step, loss)
        self.log.metrics(
            {
                "step": state.step,
                # From 1, as a step's; at an epoch's end the state stands in the next one.
                "epoch": state.epoch + (state.cursor > 0),
                "eval_loss": loss,
                "eval_tokens": self.rows.dataset.report.trained_tokens,
                "eval_seconds": time.perf_counter() - started,
            }
        )
        text = f"eval at step {state.step}  loss {loss:.4f}  perplexity {perplexity(loss):,.2f}"
        if lowest is not None:
            kept = f"  lowest {lowest:.4f} at step {self.results.lowest_step}"
            text += "  lowest so far" if loss < lowest else kept
        self.log.notice(text)
        return self.options.keep_best and self.results.lowest_step == state.step


def mean_loss(
    model: nn.Module, rows: EvaluationSet, device: torch.device, stop: threading.Event
) -> float | None:
    """The mean negative log-likelihood, in nats, over the trained tokens of all rows.

    Args:
        model: With the adapter on; afterwards in the modes it was in.
        rows: In micro-batches.
        device: Where the model is.
        stop: Looked at before each micro-batch.

    Returns:
        None if `stop` was set before all were seen.
    """
    total, count = 0.0, 0
    with _as_in_use(model, device):
        for indices in rows.micro_batches:
            if stop.is_set():
                return None
            batch = rows.batch_of(indices).to(device)
            total += float(batch_loss(cast(CausalLM, model), batch))
            count += batch.trained
    return total / count


@contextmanager
def _as_in_use(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Without gradients and dropout; afterwards the model trains on as if nothing had been."""
    generators = generator_states(device)
    # Nothing is kept here: most of what a step leaves in the arena is of no use meanwhile.
    give_back_memory()
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        trim_heap()
        for module in training:
            module.training = True
        # A plugin's layer may draw numbers whatever the mode is.
        restore_generators(generators, device)


def perplexity(loss: float) -> float:
    """exp(loss), of a loss in nats; of a huge one what a float can still hold."""
    return math.exp(min(loss, 700.0))


def results_lines(results: EvaluationState, checkpoints: Mapping[int, Path]) -> list[str]:
    """What the evaluations of a run came to, for its report.

    Args:
        results: Of all of them.
        checkpoints: By step, where each is that is kept, or the run it is in.
    """
    last, lowest, step = results.loss, results.lowest_loss, results.lowest_step
    if lowest is None:
        return []
    if last is not None and last <= lowest:
        return [f"eval loss {last:.4f}, the lowest of the run"]
    ended = "the last eval loss is not finite" if last is None else f"eval loss {last:.4f}"
    lines = [f"{ended}, the lowest was {lowest:.4f} at step {step}"]
    if last is not None and last - lowest < NOTABLE:
        return lines
    if not step:
        lines.append("before training it was lower: a lower optimizer.lr or other data may help")
    elif step in checkpoints:
        lines.append(f"the checkpoint of step {step} is kept: {checkpoints[step]}")
    else:
        lines.append(
            f"no checkpoint of step {step} is kept: evaluation.keep_best = true would have kept it"
        )
    return lines
