"""Batches made while the step before them is computed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any, TypeVar

import torch

from lorakit.data.batches import Batch

T = TypeVar("T")

WINDOWS_AHEAD = 2
LOOK_SECONDS = 0.1
"""How often a thread that waits looks whether it is still wanted."""


def prepared(windows: Iterator[list[Batch]], device: torch.device) -> Iterator[list[Batch]]:
    """The same windows, made ahead for a device that computes while Python goes on.

    On a CPU, making one takes less than a thousandth of the step it is for, and a thread would
    take that from the step's own cores.
    """
    if device.type == "cpu":
        return windows
    if device.type == "cuda":
        windows = ([batch.pinned() for batch in window] for window in windows)
    return ahead(windows)


def ahead(items: Iterator[T], depth: int = WINDOWS_AHEAD) -> Iterator[T]:
    """The same items in the same order, up to `depth` of them made ahead by a thread.

    What making one raises is raised where it would have been given out.  The thread ends with the
    items, or when the iterator is closed or let go.
    """
    made: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    unwanted = threading.Event()

    def put(kind: str, value: Any = None) -> None:
        while not unwanted.is_set():
            try:
                made.put((kind, value), timeout=LOOK_SECONDS)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put("item", item)
                if unwanted.is_set():
                    return
            put("end")
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=work, name="lorakit-batches", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = made.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        unwanted.set()
        thread.join()
