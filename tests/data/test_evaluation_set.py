"""Which rows are held out, and how an evaluation set is cut into micro-batches."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lorakit.data.batches import BatchPlan
from lorakit.data.dataset import Dataset, Report
from lorakit.data.encode import Encoded
from lorakit.data.evaluation_set import EvaluationSet, evaluation_lines, hold_out
from lorakit.errors import UserError
from lorakit.options import DataOptions, EvaluationOptions

lengths = st.lists(st.integers(2, 40), min_size=2, max_size=60)
fractions = st.floats(0.001, 0.999)
seeds = st.integers(0, 2**32 - 1)


def dataset_of(sizes: list[int], dropped: int = 0) -> Dataset:
    """Examples of so many tokens, all different, all but their first token trained."""
    examples = [Encoded([row] * size, [0] + [1] * (size - 1)) for row, size in enumerate(sizes)]
    report = Report(
        files=2,
        rows=len(sizes) + dropped,
        tokens=sum(sizes),
        trained_tokens=sum(e.targets for e in examples),
        dropped=dropped,
        lengths=list(sizes),
    )
    return Dataset(tuple(examples), tuple(f"line {row}" for row in range(len(sizes))), report)


@given(lengths, fractions, seeds, st.integers(0, 30), st.integers(0, 3))
def test_each_row_is_trained_on_or_held_out(sizes, fraction, seed, most, dropped):
    options = EvaluationOptions(fraction=fraction, max_rows=most)
    whole = dataset_of(sizes, dropped)
    trained, held = hold_out(whole, options, seed)
    assert sorted([*trained.where, *held.where]) == sorted(whole.where)
    wanted = max(1, round(len(sizes) * fraction))
    assert len(held.examples) == min(wanted, most or wanted, len(sizes) - 1)
    order = {place: row for row, place in enumerate(whole.where)}
    for part in (trained, held):
        rows = [order[place] for place in part.where]
        assert rows == sorted(rows)
        assert part.examples == tuple(whole.examples[row] for row in rows)
        assert part.report.lengths == [sizes[row] for row in rows]
        assert part.report.tokens == sum(part.report.lengths)
        assert part.report.trained_tokens == part.report.tokens - len(rows)
    assert trained.report.rows + held.report.rows == whole.report.rows
    assert (trained.report.dropped, held.report.dropped) == (dropped, 0)


@given(lengths, fractions, seeds)
def test_the_same_rows_are_held_out_each_time(sizes, fraction, seed):
    options = EvaluationOptions(fraction=fraction)
    first, second = (hold_out(dataset_of(sizes), options, seed)[1] for _ in range(2))
    assert first.where == second.where


def test_another_seed_holds_out_other_rows():
    options = EvaluationOptions(fraction=0.3)
    found = {hold_out(dataset_of([5] * 40), options, seed)[1].where for seed in range(20)}
    assert len(found) == 20
    rows = {place for where in found for place in where}
    assert len(rows) == 40


def test_no_epoch_trains_on_a_held_out_row():
    whole = dataset_of([3 + row % 5 for row in range(30)])
    trained, held = hold_out(whole, EvaluationOptions(fraction=0.2), seed=3)
    plan = BatchPlan(trained, 3, batch_size=2, window=2, packed_length=16, shuffle=True)
    unseen = {example.ids[0] for example in held.examples}
    for epoch in range(5):
        seen = {int(i) for w in plan.windows(epoch, 0) for batch in w for i in batch.tokens}
        assert len(seen) == 24
        assert not seen & unseen


def test_a_sole_row_is_not_held_out():
    with pytest.raises(UserError, match=r"evaluation\.fraction: .*only one row"):
        hold_out(dataset_of([5]), EvaluationOptions(fraction=0.5), 0)


@given(lengths, st.integers(1, 100))
def test_micro_batches_hold_each_row_once_within_the_tokens(sizes, tokens):
    rows = EvaluationSet.packed(dataset_of(sizes), tokens)
    assert sorted(i for batch in rows.micro_batches for i in batch) == list(range(len(sizes)))
    for batch in rows.micro_batches:
        assert sum(sizes[i] for i in batch) <= max(tokens, *sizes)


@given(lengths)
def test_rows_that_fit_together_share_a_micro_batch(sizes):
    assume(sum(sizes) <= 1000)
    assert len(EvaluationSet.packed(dataset_of(sizes), 1000).micro_batches) == 1


def test_rows_that_are_trained_on_too_are_told():
    data, options = DataOptions(path="chats.jsonl"), EvaluationOptions(path="unseen.jsonl")
    trained, others = dataset_of([5, 6, 7]), dataset_of([5, 9, 9, 9])
    first, second = evaluation_lines(options, data, others, trained)
    assert first == (
        "evaluation: 4 rows of unseen.jsonl, 32 tokens, of which 28 count; at the start and at "
        "each epoch's end"
    )
    assert second.startswith("evaluation: 1 of the 4 rows are trained on too")
    assert len(evaluation_lines(options, data, dataset_of([9, 9]), trained)) == 1


def test_what_is_told_says_where_the_rows_are_from_and_when():
    data = DataOptions(path="owner/name")
    whole = dataset_of([5, 6])
    trained, held = hold_out(whole, EvaluationOptions(fraction=0.5), 0)

    def told(rows: Dataset, **options: object) -> str:
        return evaluation_lines(EvaluationOptions(**options), data, rows, trained)[0]

    assert " 1 row held out of training, " in told(held, fraction=0.5)
    assert " of owner/name, validation, " in told(whole, split="validation")
    often = told(whole, split="validation", at_start=False, every_steps=1200)
    assert often.endswith("every 1,200 steps and at each epoch's end")
