"""The terminal and the disk."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from attrs import field, frozen
from attrs.validators import ge

from lorakit.options import NoOptions
from lorakit.protocols import RunInfo


@frozen(kw_only=True)
class TerminalOptions:
    """`{name = "terminal"}` of `loggers`.

    Attributes:
        every_steps: Where stdout is no terminal, print a line each so many steps.
    """

    every_steps: int = field(default=1, validator=ge(1))


def open_terminal(run_directory: Path, options: TerminalOptions) -> TerminalLogger:
    return TerminalLogger(options.every_steps)


def open_disk(run_directory: Path, options: NoOptions) -> DiskLogger:
    return DiskLogger(run_directory / "metrics.jsonl")


class TerminalLogger:
    """A live progress bar with loss, lr, tokens/s and the time left; plain lines where stdout
    is no terminal."""

    def __init__(self, every_steps: int, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._every = every_steps
        self._bar: Any = None
        self._task: Any = None
        self._run: RunInfo | None = None
        self._started = 0.0

    def start(self, run: RunInfo) -> None:
        self._run = run
        self._started = time.perf_counter()
        if not self._stream.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("eta"),
            TimeRemainingColumn(),
            console=Console(file=self._stream),
            expand=True,
        )
        self._task = self._bar.add_task(
            "training", total=run.total_steps, completed=run.first_step, numbers=""
        )
        self._bar.start()

    def metrics(self, values: Mapping[str, float]) -> None:
        if self._run is None or "loss" not in values:
            return
        step = int(values["step"])
        numbers = (
            f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
            f"{values['tokens_per_second']:,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif step % self._every == 0 or step == self._run.total_steps:
            # The mean of all steps so far: a single step's time follows its rows' lengths.
            pace = (time.perf_counter() - self._started) / max(1, step - self._run.first_step)
            left = (self._run.total_steps - step) * pace
            self._print(f"step {step}/{self._run.total_steps}  {numbers}  eta {_clock(left)}")

    def notice(self, text: str) -> None:
        if self._bar is not None:
            # Through the bar's console, or the text would tear it apart.
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._print(text)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class DiskLogger:
    """metrics.jsonl: one JSON object a line, one line an optimizer step or an evaluation.

    A resumed run goes on in the same file; lines of steps that are done again are taken out
    first, so that each step stands there once.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO | None = None
        # Evaluations of the step a resumed run starts from, which may come once more.
        self._evaluated: set[int] = set()

    def start(self, run: RunInfo) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = self._lines_until(run.first_step) if run.first_step else []
        if self._path.exists():
            self._path.write_text("".join(kept), encoding="utf-8")
        # Line buffering: a run that is killed keeps every line it logged.
        self._file = self._path.open("a", encoding="utf-8", buffering=1)

    def _lines_until(self, step: int) -> list[str]:
        if not self._path.exists():
            return []
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                values = json.loads(line)
                if values["step"] <= step:
                    kept.append(line)
                    if "eval_loss" in values:
                        self._evaluated.add(values["step"])
            except (ValueError, KeyError, TypeError):
                # A line that a kill cut off.
                continue
        return kept

    def metrics(self, values: Mapping[str, float]) -> None:
        again = "eval_loss" in values and values["step"] in self._evaluated
        if self._file is not None and not again:
            self._file.write(json.dumps(dict(values)) + "\n")

    def notice(self, text: str) -> None:
        pass

    def finish(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
