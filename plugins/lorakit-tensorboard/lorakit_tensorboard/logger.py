"""A run's metrics as TensorBoard event files.

An event file is a sequence of TFRecords, each an `Event` protocol buffer.  tensorboard's own
`EventFileWriter` would import TensorFlow where it is installed, and hand errors over from a
thread; its `RecordWriter` does neither.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from lorakit.protocols import RunInfo


class TensorBoardLogger:
    """Writes each number as a scalar under its name in metrics.jsonl, at its optimizer step.

    Args:
        directory: Of the event files: one a session of the run.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: BinaryIO | None = None

    def start(self, run: RunInfo) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._file = _event_file(self._directory).open("xb")
        self._write(file_version="brain.Event:2")
        # Has readers forget what earlier sessions wrote from here on: steps that a killed run
        # did after its last checkpoint are done again.
        first = run.first_step + 1 if run.first_step else 0
        self._write(step=first, session_log=SessionLog(status=SessionLog.START))
        step = run.first_step
        self._write(step=step, summary=text_pb("recipe", f"```toml\n{run.recipe.text()}```"))
        self._write(step=step, summary=hparams_pb(dict(_flat(run.recipe.table()))))

    def metrics(self, values: Mapping[str, float]) -> None:
        if self._file is None:
            return
        # As `simple_value`, which every reader of event files knows, not as a tensor.
        scalars = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
            if name != "step"
        ]
        self._write(step=int(values["step"]), summary=Summary(value=scalars))
        # A run that is killed keeps every step it logged.
        self._file.flush()

    def notice(self, text: str) -> None:
        pass

    def finish(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, **fields: Any) -> None:
        event = Event(wall_time=time.time(), **fields)
        RecordWriter(self._file).write(event.SerializeToString())


def _event_file(directory: Path) -> Path:
    """A new event file's path.  Readers go through a directory's files in the order of their
    names, hence the time first, and the number for sessions that start in the same second."""
    number = len(list(directory.glob("events.out.tfevents.*")))
    return directory / f"events.out.tfevents.{int(time.time())}.{number:06}.{socket.gethostname()}"


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """A recipe's settings by dotted key; a list as the text it is."""
    if isinstance(value, Mapping):
        for part, inner in value.items():
            yield from _flat(inner, f"{key}.{part}" if key else part)
    else:
        yield key, value if isinstance(value, (bool, int, float, str)) else str(value)
