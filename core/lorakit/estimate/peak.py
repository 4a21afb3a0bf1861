"""From what a run allocates to the memory it takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from attrs import frozen
from torch import nn

from lorakit.arena import arena_is_on
from lorakit.estimate.rehearsal import MicroBatch, Rehearsal, Step
from lorakit.modules.frozen import StoredLinear
from lorakit.modules.matmul import kernels_in_use, onednn_is_on
from lorakit.modules.narrow import NarrowLinear
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
HOLES = 0.4
"""What malloc's heap grows to beyond the tensors in use, as a share of them: 0.28 to 0.47 were
measured on SmolLM2-135M with 512 and 1,024 tokens, with and without checkpointing.  torch asks for
64-byte alignment, for which glibc looks for a hole 96 bytes larger than the tensor, so the hole
that one leaves does not take the next of its size (malloc/malloc.c, `_int_memalign`)."""
HOLES_OF_PARTS = 0.3
"""The same where parts of a micro-batch are computed at the same time, whose tensors are smaller:
0.2 to 0.44 with 1,024 and 2,048 tokens in two parts."""
HOLES_OF_ARENA = 0.08
"""The same of an arena: 0 to 0.08 were measured on SmolLM2-135M with 1,024 to 4,096 tokens."""
WIDE = 64
"""Width of a weight from which on a product is not a thin one."""
MANY_ROWS = 1024
COMPILED_BYTES = 64 * 2**20
"""What oneDNN keeps of the products it has compiled (see `lorakit.modules.matmul`)."""
PACKED_BYTES = 48 * 2**20
"""What MKL keeps to pack a product's operands in: 37 to 53 MiB were counted on an Intel Xeon with
AVX-512, by one thread as by two.  It grows with the products met, and where large tensors lie
between, what it grew out of leaves holes of the same size."""


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
    peak = _in_use_at_peak(step, own_pages_from(device))
    found.update(peak.parts)
    holes = HOLES_OF_PARTS if step.parts > 1 else HOLES
    found["allocator"] = int(holes * peak.in_heap + HOLES_OF_ARENA * peak.in_arena)
    if own_pages_from(device):
        found["allocator"] += _kept_by_products(rehearsal.model)
    found["loading"] = max(0, rehearsal.loading - process.by_steps - found.total())
    found["process"] = process.resident
    return Estimate({part: found[part] for part in PARTS})


def _kept_by_products(model: nn.Module) -> int:
    """Bytes that the library of matrix products takes for itself."""
    if onednn_is_on():
        return COMPILED_BYTES
    if not torch.backends.mkl.is_available() or not _has_wide_products_by_torch(model):
        return 0
    return PACKED_BYTES if arena_is_on() else 2 * PACKED_BYTES


def _has_wide_products_by_torch(model: nn.Module) -> bool:
    """Whether kernels leave torch more than the adapter's thin products, which take little."""
    kernels = kernels_in_use()
    if kernels is None:
        return True
    for module in model.modules():
        if type(module) is nn.Linear or isinstance(module, NarrowLinear):
            weight = module.weight
        elif isinstance(module, StoredLinear):
            weight = torch.empty(module.out_features, module.in_features, device="meta")
        else:
            continue
        if min(weight.shape) >= WIDE and not kernels.multiplies(MANY_ROWS, weight):
            return True
    return False


@frozen
class _Peak:
    """Where most bytes are in use.

    Attributes:
        parts: Bytes by part.
        in_arena: How many of them are in an arena,
        in_heap: and how many in a heap.
    """

    parts: Mapping[str, int]
    in_arena: int
    in_heap: int


def _in_use_at_peak(step: Step, own_pages: int) -> _Peak:
    """Tensors that are in no arena are in a heap, if they have under `own_pages` bytes."""
    now: Counter[str] = Counter()
    total = in_arena = in_heap = most = 0
    peak = _Peak({}, 0, 0)
    for event in step.events:
        now[step.labels[event.storage]] += event.size
        total += event.size
        if event.storage in step.in_arena:
            in_arena += event.size
        elif abs(event.size) < own_pages:
            in_heap += event.size
        if total > most:
            most, peak = total, _Peak(dict(now), in_arena, in_heap)
    return peak
