"""Two recipes' optimizer steps in turn, in one process: for differences smaller than those that the
machine's speed makes between one run and the next.

    python -m tests.bench.in_turn RECIPE RECIPE

Prints one JSON object: for each recipe what the peers print.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from lorakit.assemble import Run, assemble
from lorakit.data.batches import Batch
from lorakit.loop import trainable_parameters
from lorakit.loss import batch_loss
from lorakit.modules.row_norms import norms_kept
from lorakit.progress import SilentProgress
from lorakit.recipes import resolve_recipe


def step(run: Run, optimizer: Any, window: list[Batch]) -> tuple[dict[str, float], float]:
    """Its sizes and seconds, and its loss."""
    started = time.perf_counter()
    trained = sum(batch.trained for batch in window)
    loss = 0.0
    with norms_kept():
        for batch in window:
            part = batch_loss(run.base.causal_lm, batch) / trained
            run.precision.backward(part)
            loss += part.item()
    run.precision.step(optimizer, run.recipe.training.max_grad_norm)
    optimizer.zero_grad()
    seconds = time.perf_counter() - started
    tokens = sum(batch.size for batch in window)
    return {"seconds": seconds, "tokens": tokens, "trained_tokens": trained}, loss


def main() -> None:
    runs = [assemble(resolve_recipe(name), SilentProgress()) for name in sys.argv[1:]]
    found: list[dict[str, list[Any]]] = [{"steps": [], "losses": []} for _ in runs]
    optimizers = []
    for run in runs:
        options = run.recipe.optimizer
        parameters = trainable_parameters(run.base.model)
        optimizers.append(options.record.build(parameters, options.options))
    every = zip(*(run.plan.windows(0, 0) for run in runs), strict=False)
    for _, windows in zip(range(runs[0].total_steps), every, strict=False):
        for run, optimizer, window, into in zip(runs, optimizers, windows, found, strict=True):
            sizes, loss = step(run, optimizer, window)
            into["steps"].append(sizes)
            into["losses"].append(loss)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
