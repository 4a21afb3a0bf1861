"""The terminal's lines of evaluations, where a progress bar is drawn over and over."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorakit import evaluation
from lorakit.builtin.loggers import TerminalLogger
from lorakit.data.dataset import Dataset, Report
from lorakit.data.evaluation_set import EvaluationSet
from lorakit.evaluation import Evaluation
from lorakit.logs import LoggerGroup
from lorakit.options import EvaluationOptions
from lorakit.protocols import RunInfo
from lorakit.state import EvaluationState, TrainState


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Tty(), io.StringIO()], ids=["bar", "lines"])
def test_an_evaluation_is_a_line_of_its_own(
    stream: io.StringIO, run_info: Callable[..., RunInfo], monkeypatch: pytest.MonkeyPatch
):
    losses = iter([2.0, 1.5, 1.75])
    monkeypatch.setattr(evaluation, "mean_loss", lambda *_: next(losses))
    log = LoggerGroup({"terminal": TerminalLogger(1, stream)})
    evaluate = Evaluation(
        torch.nn.Identity(),
        EvaluationSet(Dataset((), (), Report()), ()),
        EvaluationOptions(fraction=0.1, every_steps=1),
        4,
        EvaluationState(),
        device=torch.device("cpu"),
        log=log,
        stop=threading.Event(),
    )
    log.start(run_info())
    evaluate(TrainState())
    for step in (1, 2):
        numbers: dict[str, Any] = {"step": step, "loss": 1.0, "lr": 1e-3, "tokens_per_second": 9.0}
        log.metrics(numbers)
        evaluate(TrainState(step=step, cursor=step))
    log.finish()
    lines = [line.strip() for line in stream.getvalue().splitlines()]
    shown = [line[line.index("eval at") :] for line in lines if "eval at" in line]
    assert shown == [
        "eval at step 0  loss 2.0000  perplexity 7.39",
        "eval at step 1  loss 1.5000  perplexity 4.48  lowest so far",
        "eval at step 2  loss 1.7500  perplexity 5.75  lowest 1.5000 at step 1",
    ]
