"""The order of the data: a pure function of (seed, epoch), cut into micro-batches and windows.

A micro-batch is documents one after the other, without padding; `Layout` says where each
starts.  Packing only changes how many documents a row holds.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import TypeVar

import torch
from attrs import define, evolve, field, frozen
from torch import Tensor

from lorakit.data.dataset import Dataset
from lorakit.data.prefixes import arranged
from lorakit.data.shares import shared_out
from lorakit.modules.layout import Layout, Segments, apart

T = TypeVar("T")
IGNORED = -100
"""The label of a token that is not trained, as in torch.nn.functional.cross_entropy."""


@frozen(eq=False)
class Batch:
    """A micro-batch.

    Attributes:
        tokens: `[T]` ids of all documents, one after the other; what documents begin with in
            common may be there once.
        labels: `[S]` for each token of each document the id that follows, where it is trained, else
            -100; see `Layout` for S.
        layout: Where each document lies.
        trained: How many labels there are.
        rows: The examples' indices in the data set.
        parts: The same documents shared out over threads (see `lorakit.document_threads`); none
            where they are not.
        together: How many parts of a micro-batch are computed at the same time, this one of them.
        joined: How many of the recipe's micro-batches it is.
    """

    tokens: Tensor
    labels: Tensor
    layout: Layout
    trained: int
    rows: tuple[int, ...]
    parts: tuple[Batch, ...] = ()
    together: int = 1
    joined: int = 1

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        return Batch(
            self.tokens.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.layout.to(device),
            self.trained,
            self.rows,
            joined=self.joined,
        )

    @property
    def size(self) -> int:
        """Tokens of all documents, S."""
        return len(self.labels)

    def rounded(self, multiple: int) -> Batch:
        """With tokens that nobody sees and nothing is trained on, up to a multiple of so many: a
        document of their own behind the others."""
        missing = -len(self.tokens) % multiple
        if not missing:
            return self
        return evolve(
            self,
            tokens=torch.nn.functional.pad(self.tokens, (0, missing)),
            labels=torch.nn.functional.pad(self.labels, (0, missing), value=IGNORED),
            layout=self.layout.followed_by(missing),
        )

    def pinned(self) -> Batch:
        """In page-locked memory, from where `to` copies while the device computes."""
        return evolve(
            self,
            tokens=self.tokens.pin_memory(),
            labels=self.labels.pin_memory(),
            layout=self.layout.pinned(),
        )


@define
class Batches:
    """Micro-batches of given examples.

    Args:
        dataset: The examples.
        share_prefixes: Have in a micro-batch once what its documents begin with in common.
        threads: Documents are shared out over parts that use so many together.
    """

    dataset: Dataset
    share_prefixes: bool = field(default=False, kw_only=True)
    threads: int = field(default=1, kw_only=True)

    def batch_of(self, rows: Sequence[int]) -> Batch:
        """The micro-batch of these examples, by their indices."""
        order, segments = self.arranged(rows)
        whole = make_batch(self.dataset, order, segments)
        shares = shared_out(segments, self.threads)
        if len(shares) == 1:
            return whole
        arranged = (self.arranged([order[place] for place in share]) for share in shares)
        parts = (make_batch(self.dataset, *some) for some in arranged)
        return evolve(whole, parts=tuple(evolve(part, together=len(shares)) for part in parts))

    def arranged(self, rows: Sequence[int]) -> tuple[Sequence[int], Sequence[Segments]]:
        """The examples of a micro-batch in the order in which they lie there, and where each one's
        tokens lie."""
        documents = [self.dataset.examples[index].ids for index in rows]
        if not self.share_prefixes:
            return rows, apart([len(document) for document in documents])
        order, segments = arranged(documents)
        return [rows[place] for place in order], segments


@define
class BatchPlan(Batches):
    """Which examples each micro-batch of an epoch holds.

    Args:
        dataset: The examples.
        seed: Of the order.
        batch_size: Rows in a micro-batch.
        window: Micro-batches in an optimizer step.
        packed_length: Fill each row with whole examples up to so many tokens; 0 means one
            example a row.
        shuffle: A new order each epoch, or the file's.
        share_prefixes: As of `Batches`.
        threads: Likewise.
        join_limits: Tokens, and trained ones, that micro-batches of an optimizer step may have
            together to be computed as one.
    """

    seed: int
    batch_size: int
    window: int
    packed_length: int
    shuffle: bool
    join_limits: tuple[int, int] = (0, 0)
    _ends: dict[int, int] = field(factory=dict)

    def micro_batches(self, epoch: int) -> Iterator[tuple[int, ...]]:
        """Example indices of each micro-batch of that epoch (counted from 0), one by one: the
        first is there before the epoch has been gone through."""
        order = self._order(epoch)
        rows: Iterator[tuple[int, ...]] = ((i,) for i in order)
        if self.packed_length:
            lengths = [len(e) for e in self.dataset.examples]
            rows = pack(order, lengths, self.packed_length)
        for group in _groups(rows, self.batch_size):
            yield tuple(i for row in group for i in row)

    def first_windows(self, epochs: int, most: int = 0) -> Iterator[list[tuple[int, ...]]]:
        """The micro-batches of each optimizer step of so many epochs, `most` of them at the most
        (0: no limit).  A ragged last window of an epoch is a step."""
        windows = chain.from_iterable(
            _groups(self.micro_batches(epoch), self.window) for epoch in range(epochs)
        )
        return islice(windows, most or None)

    def windows(self, epoch: int, cursor: int) -> Iterator[list[Batch]]:
        """The optimizer steps of an epoch, from micro-batch `cursor` on."""
        groups = _groups(islice(self.micro_batches(epoch), cursor, None), self.window)
        following = next(groups, None)
        if following is None:
            self._ends[epoch] = cursor
        while following is not None:
            group, following = following, next(groups, None)
            cursor += len(group)
            if following is None:
                self._ends[epoch] = cursor
            yield [evolve(self.batch_of(rows), joined=count) for rows, count in self._joined(group)]

    def _joined(self, window: Sequence[tuple[int, ...]]) -> Iterator[tuple[tuple[int, ...], int]]:
        """The micro-batches of an optimizer step, and how many are joined in each.

        A step's loss is a sum over its tokens: in which of its micro-batches one is makes no
        difference (but for which inputs dropout drops), and each of them takes reading all weights.
        """
        most, most_trained = self.join_limits
        rows: tuple[int, ...] = ()
        tokens = trained = count = 0
        for more in window:
            examples = [self.dataset.examples[index] for index in more]
            size, targets = sum(map(len, examples)), sum(e.targets for e in examples)
            if count and (tokens + size > most or trained + targets > most_trained):
                yield rows, count
                rows, tokens, trained, count = (), 0, 0, 0
            rows, count = (*rows, *more), count + 1
            tokens, trained = tokens + size, trained + targets
        yield rows, count

    def is_over(self, epoch: int, cursor: int) -> bool:
        """Whether micro-batch `cursor` is behind the epoch's last, as the windows before it were
        made."""
        return self._ends.get(epoch) == cursor

    def _order(self, epoch: int) -> list[int]:
        count = len(self.dataset.examples)
        if not self.shuffle:
            return list(range(count))
        generator = torch.Generator()
        # Two numbers into one seed, so that (0, 1) and (1, 0) differ.
        generator.manual_seed(self.seed * 1_000_003 + epoch)
        return [int(i) for i in torch.randperm(count, generator=generator)]


def make_batch(dataset: Dataset, rows: Sequence[int], segments: Sequence[Segments] = ()) -> Batch:
    """Joins examples into one micro-batch; labels are shifted within each document.

    Args:
        dataset: The examples.
        rows: Their indices.
        segments: Where the tokens of each lie; by default one after the other.
    """
    examples = [dataset.examples[index] for index in rows]
    segments = segments or apart([len(example) for example in examples])
    ids, labels, trained = array("i"), array("i"), bytearray()
    for example, parts in zip(examples, segments, strict=True):
        shared = sum(part.stop - part.start for part in parts[:-1])
        ids += example.ids[shared:]
        labels += example.ids[1:]
        # Nothing follows a document's last token.
        labels.append(IGNORED)
        trained += example.trained[1:] + b"\0"
    following = torch.frombuffer(labels, dtype=torch.int32).long()
    is_trained = torch.frombuffer(trained, dtype=torch.bool)
    return Batch(
        torch.frombuffer(ids, dtype=torch.int32).long(),
        torch.where(is_trained, following, IGNORED),
        Layout.of_segments(segments),
        sum(trained),
        tuple(rows),
    )


OPEN_ROWS = 1024
"""Rows that packing keeps in memory.  Of rows of 512 tokens, filled with 100,000 documents of some
150, 1.36% stays empty with so many, and 1.35% without a limit."""


def pack(
    order: Iterable[int], lengths: Sequence[int], capacity: int, open_rows: int = OPEN_ROWS
) -> Iterator[tuple[int, ...]]:
    """Best-fit packing: each example, in `order`, goes into the open row it fills best.

    Args:
        order: Example indices; no more are taken than the next row needs.
        lengths: Tokens of each example, by index; none is over `capacity`.
        capacity: Tokens in a row.
        open_rows: Once there are more, the oldest is given out as it is.

    Yields:
        The examples of each row, rows in the order they were opened.  Deterministic.
    """
    rows: deque[list[int]] = deque()
    space_of: dict[int, int] = {}
    # (space left, row), ascending: the first with enough space fits best.
    spaces: list[tuple[int, int]] = []
    first = 0

    for index in order:
        length = lengths[index]
        place = bisect_left(spaces, (length, -1))
        if place < len(spaces):
            space, row = spaces.pop(place)
            rows[row - first].append(index)
        else:
            space, row = capacity, first + len(rows)
            rows.append([index])
        space_of[row] = space - length
        insort(spaces, (space - length, row))
        while rows and (len(rows) > open_rows or not space_of[first]):
            spaces.pop(bisect_left(spaces, (space_of.pop(first), first)))
            first += 1
            yield tuple(rows.popleft())
    yield from map(tuple, rows)


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """So many at a time; the last may be fewer."""
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group
