"""From what a run allocates to the memory it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from attrs import frozen

from lorakit.estimate.heap import Heap
from lorakit.estimate.rehearsal import OPTIMIZER_STEP, MicroBatch, Rehearsal, Step
from lorakit.runtime import own_pages_from

PARTS = (
    "base weights",
    "embeddings and head",
    "adapter",
    "gradients",
    "optimizer",
    "activations",
    "loss",
    "buffers",
    "loading",
    "allocator",
    "process",
)
STEPS = 3
"""After so many, a heap has grown as far as it will."""


@frozen
class Process:
    """Bytes a process takes without the run.

    Attributes:
        resident: In all.
        by_steps: Those of them that it has from the first step on only.
    """

    resident: int
    by_steps: int


@frozen
class Estimate:
    """A run's memory at its peak.

    Attributes:
        parts: Bytes by part, in the order of `PARTS`.
    """

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def estimate_peak(
    rehearsal: Rehearsal, batch: MicroBatch, device: torch.device, process: Process
) -> Estimate:
    """The peak of a run whose largest micro-batch is `batch`.

    Args:
        rehearsal: The model as it will be.
        batch: Sizes of the micro-batch.
        device: Where it will be.
        process: What the process takes itself.
    """
    step = rehearsal.step(batch)
    found = Counter(rehearsal.weights)
    found["optimizer"] = rehearsal.optimizer
    found["buffers"] = step.buffers
    in_use = _in_use_at_peak(step)
    found.update(in_use)
    own_pages = own_pages_from(device, save_memory=rehearsal.saves_memory)
    if own_pages:
        taken = _taken(step, rehearsal.optimizer, own_pages)
        found["allocator"] = max(0, taken - sum(in_use.values()) - rehearsal.optimizer)
    found["loading"] = max(0, rehearsal.loading - process.by_steps - found.total())
    found["process"] = process.resident
    return Estimate({part: found[part] for part in PARTS})


def _in_use_at_peak(step: Step) -> dict[str, int]:
    now: Counter[str] = Counter()
    most, at_most = 0, dict(now)
    total = 0
    for event in step.events:
        if event is OPTIMIZER_STEP:
            continue
        now[step.labels[event.storage]] += event.size
        total += event.size
        if total > most:
            most, at_most = total, dict(now)
    return at_most


def _taken(step: Step, optimizer: int, own_pages: int) -> int:
    """Bytes of malloc's heap and of tensors' own pages at the peak of some steps."""
    heap = Heap(own_pages)
    for number in range(STEPS):
        for event in step.events:
            key = (number, event.storage)
            if event is OPTIMIZER_STEP:
                heap.settle()
                if number == 0:
                    heap.allocate("optimizer", optimizer)
            elif event.size > 0:
                heap.allocate(key, event.size)
            elif event.size < 0:
                heap.free(key)
    return heap.peak
