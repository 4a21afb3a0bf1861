"""Stopping on Ctrl-C or a kill: a run after saving it, everything else at once and cleanly."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from lorakit.errors import Interrupted

if TYPE_CHECKING:
    from lorakit.protocols import SnapshotStore
    from lorakit.state import TrainState

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LATER = 0.05
"""Seconds after which a signal that came at a bad time is raised again."""
NOTHING_SAVED = "stopped before the first step was done; nothing was saved"


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where Ctrl-C would be, so that what cleans up after one does after both."""


class Stop(threading.Event):
    """Set by a signal; `number` is the signal's."""

    number: int = signal.SIGINT


def signal_of(error: BaseException | None) -> int:
    """The number of the signal that an exception stands for."""
    return signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT


@contextmanager
def signals_raised() -> Iterator[None]:
    """Within it SIGINT and SIGTERM raise KeyboardInterrupt and Terminated in the main thread, but
    never where the exception would be lost or would break what goes on without it: in an import,
    or in what Python calls back and takes no exception from, a destructor or a weak reference's.

    A signal that is ignored (`nohup`) stays ignored.  Outside of the main thread Python cannot
    take signals: there this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if _imports(frame):
            _raise_later(number)
        else:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    def lost(unraisable: sys.UnraisableHookArgs) -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            _raise_later(signal_of(unraisable.exc_value))
        else:
            hook(unraisable)

    taken = [n for n in SIGNALS if signal.getsignal(n) not in (signal.SIG_IGN, None)]
    before = {number: signal.signal(number, stop) for number in taken}
    hook, sys.unraisablehook = sys.unraisablehook, lost
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _raise_later(number: int) -> None:
    timer = threading.Timer(LATER, _thread.interrupt_main, [number])
    timer.daemon = True
    timer.start()


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

    before = {number: signal.signal(number, ask) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def saved_steps_told(store: SnapshotStore, state: TrainState, go_on: str) -> Iterator[None]:
    """Says of a signal that is not waited for what it leaves behind.

    Args:
        store: Has the run's checkpoints.
        state: The run's, as it is when it is stopped.
        go_on: The command that continues the run.

    Raises:
        Interrupted: In the place of KeyboardInterrupt and Terminated.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        steps = store.steps()
        if steps:
            message = f"stopped; step {steps[-1]} is saved, go on with: {go_on}"
        else:
            message = "stopped; nothing was saved yet" if state.step else NOTHING_SAVED
        raise Interrupted(message, signal_of(error)) from None


@contextmanager
def nothing_saved_told() -> Iterator[None]:
    """The same, where no run directory is known yet."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(NOTHING_SAVED, signal_of(error)) from None
