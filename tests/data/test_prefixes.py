"""What documents begin with in common is in a micro-batch once, and nothing is lost by it."""

from __future__ import annotations

from array import array

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from lorakit.data import prefixes
from lorakit.data.batches import IGNORED, BatchPlan, make_batch
from lorakit.data.dataset import Dataset, Report
from lorakit.data.encode import Encoded
from lorakit.data.prefixes import arranged, common_prefix
from lorakit.modules import Layout

DOCUMENTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=8)


@pytest.fixture
def every_token(monkeypatch):
    """Sharing from the first token in common on."""
    monkeypatch.setattr(prefixes, "SHORTEST", 1)
    monkeypatch.setattr(prefixes, "SMALLEST_SHARE", 0)


def plan_of(documents: list[list[int]], **options) -> BatchPlan:
    examples = tuple(Encoded(ids, [i % 3 != 0 for i in range(len(ids))]) for ids in documents)
    dataset = Dataset(examples, tuple(map(str, range(len(examples)))), Report())
    defaults = {"seed": 0, "batch_size": 100, "window": 1, "packed_length": 0, "shuffle": False}
    return BatchPlan(dataset, **(defaults | options))


@given(documents=DOCUMENTS)
def test_every_document_can_be_read_back(documents):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefixes, "SHORTEST", 1)
        patch.setattr(prefixes, "SMALLEST_SHARE", 0)
        ((batch,),) = plan_of(documents, share_prefixes=True).windows(0, 0)
    plain = make_batch(plan_of(documents).dataset, batch.rows)
    assert sorted(batch.rows) == list(range(len(documents)))

    layout = batch.layout
    for row, parts in zip(batch.rows, layout.segments, strict=True):
        assert torch.cat([batch.tokens[part] for part in parts]).tolist() == documents[row]
    # As many tokens as there are different beginnings.
    beginnings = {tuple(d[: n + 1]) for d in documents for n in range(len(d))}
    assert len(batch.tokens) == len(beginnings)

    assert batch.labels.tolist() == plain.labels.tolist()
    assert (batch.trained, batch.size) == (plain.trained, len(plain.tokens))
    assert layout.lengths == plain.layout.lengths
    if layout.places is None:
        assert batch.tokens.tolist() == plain.tokens.tolist()
        return
    assert batch.tokens[layout.places].tolist() == plain.tokens.tolist()
    assert layout.positions[layout.places].tolist() == plain.layout.positions.tolist()
    assert layout.places[layout.owners].tolist() == list(range(len(batch.tokens)))


@given(one=st.lists(st.integers(0, 1), max_size=12), other=st.lists(st.integers(0, 1), max_size=12))
def test_common_prefix(one, other):
    expected = 0
    while expected < min(len(one), len(other)) and one[expected] == other[expected]:
        expected += 1
    assert common_prefix(array("i", one), array("i", other)) == expected


def test_order_stays_where_nothing_is_shared():
    documents = [array("i", [n, 1, 2]) for n in (3, 1, 2)]
    order, segments = arranged(documents)
    assert order == [0, 1, 2]
    assert segments == [(slice(0, 3),), (slice(3, 6),), (slice(6, 9),)]


def test_little_in_common_is_not_shared():
    """Copying a long document's queries, keys and values would cost more."""
    system = list(range(20))
    short = [array("i", [*system, *[n] * 10]) for n in (1, 2)]
    long = [array("i", [*system, *[n] * 1000]) for n in (1, 2)]
    assert [len(parts) for parts in arranged(short)[1]] == [1, 2]
    assert [len(parts) for parts in arranged(long)[1]] == [1, 1]
    few = [array("i", [*system[:15], *[n] * 10]) for n in (1, 2)]
    assert [len(parts) for parts in arranged(few)[1]] == [1, 1]


def test_a_document_behind_shared_ones():
    """What rounding adds shares nothing."""
    documents = [[*range(20), 7], [*range(20), 8]]
    ((batch,),) = plan_of(documents, share_prefixes=True).windows(0, 0)
    rounded = batch.rounded(16)
    assert (len(batch.tokens), len(rounded.tokens)) == (22, 32)
    assert rounded.size == batch.size + 10
    expected = Layout.of_segments([*batch.layout.segments, (slice(22, 32),)])
    for name in ("positions", "places", "owners"):
        assert getattr(rounded.layout, name).tolist() == getattr(expected, name).tolist()
    assert rounded.layout.segments == expected.segments
    assert rounded.labels[batch.size :].tolist() == [IGNORED] * 10
    assert rounded.trained == batch.trained
