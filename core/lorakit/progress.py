"""Progress of what comes before training: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from attrs import define, field

QUIET_SECONDS = 0.5
"""A task that ends sooner is not worth a line where there is no terminal."""


@define
class TerminalProgress:
    """A `lorakit.protocols.Progress`."""

    # Looked up as late as this: whoever embeds lorakit may have redirected it since the import.
    stream: TextIO = field(factory=lambda: sys.stderr)

    @contextmanager
    def task(
        self, description: str, total: int | None = None, unit: str = ""
    ) -> Iterator[_Bar | _Lines]:
        """Shows `description` until the block ends."""
        if self.stream.isatty():
            with _rich_bar(self.stream, unit) as bar:
                yield _Bar(bar, bar.add_task(description, total=total))
            return
        started = time.perf_counter()
        counter = _Lines()
        yield counter
        seconds = time.perf_counter() - started
        if seconds >= QUIET_SECONDS:
            amount = _amount(counter.done, unit)
            print(f"{description}: {amount} in {seconds:.1f} s", file=self.stream, flush=True)


@define
class _Bar:
    bar: Any
    task: Any

    def advance(self, amount: int = 1) -> None:
        self.bar.advance(self.task, amount)


@define
class _Lines:
    done: int = 0

    def advance(self, amount: int = 1) -> None:
        self.done += amount


def _rich_bar(stream: TextIO, unit: str) -> Any:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    count = DownloadColumn() if unit == "bytes" else MofNCompleteColumn()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        count,
        TextColumn("" if unit == "bytes" else unit),
        TimeElapsedColumn(),
        console=Console(file=stream),
    )


def _amount(done: int, unit: str) -> str:
    return f"{done / 1e6:.1f} MB" if unit == "bytes" else f"{done:,} {unit}".strip()


class SilentProgress:
    """Shows nothing."""

    @contextmanager
    def task(self, description: str, total: int | None = None, unit: str = "") -> Iterator[_Lines]:
        yield _Lines()
