"""Stopping a run on Ctrl-C or a kill, after saving it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lorakit.errors import Interrupted
from lorakit.protocols import SnapshotStore


class Stop(threading.Event):
    """Set by a signal; `number` is the signal's."""

    number: int = signal.SIGINT


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """An event that SIGINT and SIGTERM set; a second SIGINT interrupts at once.

    Outside of the main thread Python cannot take signals: the event is then never set.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.number = number
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def saved_steps_told(store: SnapshotStore, go_on: str) -> Iterator[None]:
    """Says of a Ctrl-C that is not waited for what it leaves behind.

    Args:
        store: Has the run's checkpoints.
        go_on: The command that continues the run.

    Raises:
        Interrupted: In the place of KeyboardInterrupt.
    """
    try:
        yield
    except KeyboardInterrupt:
        steps = store.steps()
        if steps:
            message = f"stopped; step {steps[-1]} is saved, go on with: {go_on}"
        else:
            message = "stopped; nothing was saved yet"
        raise Interrupted(message) from None
