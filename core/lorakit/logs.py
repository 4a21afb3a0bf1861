"""Any number of loggers as one, none of which can stop a run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType

from attrs import define, field

from lorakit.errors import LorakitError
from lorakit.plugins import explain
from lorakit.protocols import Logger, RunInfo
from lorakit.recipes import Section


@define
class LoggerGroup:
    """Passes everything to each logger; one that raises is named once and left out from then.

    Args:
        loggers: By the name the recipe gives them.
    """

    loggers: dict[str, Logger] = field(factory=dict)

    @classmethod
    def open(cls, sections: Iterable[Section], run_directory: Path) -> LoggerGroup:
        """Opens a recipe's loggers; the same one may be there twice, with other options."""
        group = cls()
        for section in sections:
            name, number = section.name, 1
            while name in group.loggers:
                number += 1
                name = f"{section.name} ({number})"
            try:
                group.loggers[name] = section.record.open(run_directory, section.options)
            except (Exception, SystemExit) as error:
                _warn(name, error)
        return group

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
        for name, logger in list(self.loggers.items()):
            try:
                call(logger)
            except (Exception, SystemExit) as error:
                del self.loggers[name]
                _warn(name, error)
                # What it has open, it may still close.
                with contextlib.suppress(Exception, SystemExit):
                    logger.finish()


def _warn(name: str, error: BaseException) -> None:
    reason = " ".join(str(error).split()) if isinstance(error, LorakitError) else explain(error)
    warning = f"logger {name!r} failed and is left out from here: {reason}"
    print(f"warning: {warning}", file=sys.stderr, flush=True)
