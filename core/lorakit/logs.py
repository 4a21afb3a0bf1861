"""Any number of loggers as one, none of which can stop a run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import TracebackType

from attrs import define, field

from lorakit.plugins import explain
from lorakit.protocols import Logger, RunInfo


@define
class LoggerGroup:
    """Passes everything to each logger; one that raises is named once and left out from then.

    Args:
        loggers: By the name the recipe gives them.
    """

    loggers: dict[str, Logger]
    _failed: set[str] = field(factory=set)

    def start(self, run: RunInfo) -> None:
        self._each(lambda logger: logger.start(run))

    def metrics(self, values: Mapping[str, float]) -> None:
        self._each(lambda logger: logger.metrics(values))

    def notice(self, text: str) -> None:
        self._each(lambda logger: logger.notice(text))

    def finish(self) -> None:
        self._each(lambda logger: logger.finish())

    def __enter__(self) -> LoggerGroup:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.finish()

    def _each(self, call: Callable[[Logger], None]) -> None:
        for name, logger in self.loggers.items():
            if name in self._failed:
                continue
            try:
                call(logger)
            except Exception as error:
                self._failed.add(name)
                warning = f"logger {name!r} failed and is left out from here: {explain(error)}"
                print(f"warning: {warning}", file=sys.stderr, flush=True)
