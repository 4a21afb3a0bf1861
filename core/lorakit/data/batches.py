"""The order of the data: a pure function of (seed, epoch), cut into micro-batches and windows.

A micro-batch is documents one after the other, without padding; `Layout` says where each
starts.  Packing only changes how many documents a row holds.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Sequence

import torch
from attrs import define, evolve, field, frozen
from torch import Tensor

from lorakit.data.dataset import Dataset
from lorakit.modules.layout import Layout

IGNORED = -100
"""The label of a token that is not trained, as in torch.nn.functional.cross_entropy."""


@frozen(eq=False)
class Batch:
    """A micro-batch.

    Attributes:
        tokens: `[T]` ids of all documents, one after the other.
        labels: `[T]` the id that follows, where it is trained, else -100.
        layout: Where each document starts.
        trained: How many labels there are.
        rows: The examples' indices in the data set.
    """

    tokens: Tensor
    labels: Tensor
    layout: Layout
    trained: int
    rows: tuple[int, ...]

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        return Batch(
            self.tokens.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.layout.to(device),
            self.trained,
            self.rows,
        )

    def rounded(self, multiple: int) -> Batch:
        """With tokens that nobody sees and nothing is trained on, up to a multiple of so many: a
        document of their own behind the others."""
        missing = -len(self.tokens) % multiple
        if not missing:
            return self
        positions = torch.arange(missing, device=self.layout.positions.device)
        return evolve(
            self,
            tokens=torch.nn.functional.pad(self.tokens, (0, missing)),
            labels=torch.nn.functional.pad(self.labels, (0, missing), value=IGNORED),
            layout=Layout(
                (*self.layout.lengths, missing), torch.cat([self.layout.positions, positions])
            ),
        )

    def pinned(self) -> Batch:
        """In page-locked memory, from where `to` copies while the device computes."""
        return evolve(
            self,
            tokens=self.tokens.pin_memory(),
            labels=self.labels.pin_memory(),
            layout=Layout(self.layout.lengths, self.layout.positions.pin_memory()),
        )


@define
class BatchPlan:
    """Which examples each micro-batch of an epoch holds.

    Args:
        dataset: The examples.
        seed: Of the order.
        batch_size: Rows in a micro-batch.
        window: Micro-batches in an optimizer step.
        packed_length: Fill each row with whole examples up to so many tokens; 0 means one
            example a row.
        shuffle: A new order each epoch, or the file's.
    """

    dataset: Dataset
    seed: int
    batch_size: int
    window: int
    packed_length: int
    shuffle: bool
    _epoch: int = -1
    _plan: list[tuple[int, ...]] = field(factory=list)

    def micro_batches(self, epoch: int) -> list[tuple[int, ...]]:
        """Example indices of each micro-batch of that epoch (counted from 0)."""
        if self._epoch != epoch:
            order = self._order(epoch)
            rows: list[tuple[int, ...]] = [(i,) for i in order]
            if self.packed_length:
                lengths = [len(e) for e in self.dataset.examples]
                rows = pack(order, lengths, self.packed_length)
            groups = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
            self._plan = [tuple(i for row in group for i in row) for group in groups]
            self._epoch = epoch
        return self._plan

    def steps(self, epoch: int) -> int:
        """Optimizer steps in that epoch; a ragged last window is one."""
        return -(-len(self.micro_batches(epoch)) // self.window)

    def windows(self, epoch: int, cursor: int) -> Iterator[list[Batch]]:
        """The optimizer steps of an epoch, from micro-batch `cursor` on."""
        plan = self.micro_batches(epoch)
        for start in range(cursor, len(plan), self.window):
            yield [make_batch(self.dataset, rows) for rows in plan[start : start + self.window]]

    def _order(self, epoch: int) -> list[int]:
        count = len(self.dataset.examples)
        if not self.shuffle:
            return list(range(count))
        generator = torch.Generator()
        # Two numbers into one seed, so that (0, 1) and (1, 0) differ.
        generator.manual_seed(self.seed * 1_000_003 + epoch)
        return [int(i) for i in torch.randperm(count, generator=generator)]


def make_batch(dataset: Dataset, rows: Sequence[int]) -> Batch:
    """Joins examples into one micro-batch; labels are shifted within each document."""
    tokens: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    for index in rows:
        example = dataset.examples[index]
        tokens += example.ids
        following = zip(example.ids[1:], example.trained[1:], strict=True)
        labels += [i if is_trained else IGNORED for i, is_trained in following]
        labels.append(IGNORED)
        lengths.append(len(example))
    trained = sum(label != IGNORED for label in labels)
    return Batch(
        torch.tensor(tokens),
        torch.tensor(labels),
        Layout.of_lengths(lengths),
        trained,
        tuple(rows),
    )


def pack(order: Sequence[int], lengths: Sequence[int], capacity: int) -> list[tuple[int, ...]]:
    """Best-fit packing: each example, in `order`, goes into the open row it fills best.

    Args:
        order: Example indices.
        lengths: Tokens of each example, by index; none is over `capacity`.
        capacity: Tokens in a row.

    Returns:
        The examples of each row, rows in the order they were opened.  Deterministic.
    """
    rows: list[list[int]] = []
    # (space left, row), ascending: the first with enough space fits best.
    spaces: list[tuple[int, int]] = []
    for index in order:
        length = lengths[index]
        low, high = 0, len(spaces)
        while low < high:
            middle = (low + high) // 2
            if spaces[middle][0] < length:
                low = middle + 1
            else:
                high = middle
        if low == len(spaces):
            rows.append([index])
            space, row = capacity - length, len(rows) - 1
        else:
            space, row = spaces.pop(low)
            rows[row].append(index)
            space -= length
        if space:
            insort(spaces, (space, row))
    return [tuple(row) for row in rows]
