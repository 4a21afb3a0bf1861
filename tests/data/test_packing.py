"""Packing and the order of the data."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.batches import IGNORED, OPEN_ROWS, BatchPlan, make_batch, pack
from lorakit.data.dataset import Dataset, Report
from lorakit.data.encode import Encoded

CAPACITY = 30
lengths = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60)


@st.composite
def orders(draw):
    sizes = draw(lengths)
    return draw(st.permutations(range(len(sizes)))), sizes


def dataset_of(sizes):
    examples = []
    for number, size in enumerate(sizes):
        ids = tuple(1000 * number + i for i in range(size))
        examples.append(Encoded(ids, tuple(i % 3 != 1 for i in range(size))))
    where = tuple(f"row {i}" for i in range(len(sizes)))
    return Dataset(tuple(examples), where, Report())


def plan_of(sizes, *, seed=0, batch_size=2, window=2, packed=False, shuffle=True):
    return BatchPlan(
        dataset=dataset_of(sizes),
        seed=seed,
        batch_size=batch_size,
        window=window,
        packed_length=CAPACITY if packed else 0,
        shuffle=shuffle,
    )


@given(orders())
def test_each_example_is_in_exactly_one_row_whole(drawn):
    order, sizes = drawn
    rows = list(pack(order, sizes, CAPACITY))
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))


@given(orders())
def test_no_row_is_over_its_capacity(drawn):
    order, sizes = drawn
    for row in pack(order, sizes, CAPACITY):
        assert sum(sizes[i] for i in row) <= CAPACITY


@given(orders())
def test_packing_is_deterministic(drawn):
    order, sizes = drawn
    assert list(pack(order, sizes, CAPACITY)) == list(pack(list(order), list(sizes), CAPACITY))


@given(orders())
def test_no_row_is_opened_while_another_has_space(drawn):
    order, sizes = drawn
    rows = list(pack(order, sizes, CAPACITY))
    place = {index: rank for rank, index in enumerate(order)}
    assert [place[row[0]] for row in rows] == sorted(place[row[0]] for row in rows)
    for number, row in enumerate(rows):
        opened = place[row[0]]
        for earlier in rows[:number]:
            used = sum(sizes[i] for i in earlier if place[i] < opened)
            assert used + sizes[row[0]] > CAPACITY


@given(orders())
def test_each_example_goes_into_the_fullest_row_that_takes_it(drawn):
    """Played back without a sorted list of spaces."""
    order, sizes = drawn
    row_of = {i: number for number, row in enumerate(pack(order, sizes, CAPACITY)) for i in row}
    space: dict[int, int] = {}
    for index in order:
        row = row_of[index]
        enough = [left for left in space.values() if left >= sizes[index]]
        assert (row in space) == bool(enough)
        if enough:
            assert space[row] == min(enough)
        space[row] = space.get(row, CAPACITY) - sizes[index]


def test_an_example_goes_where_it_fits_best():
    assert list(pack([0, 1, 2, 3], [20, 25, 5, 10], CAPACITY)) == [(0, 3), (1, 2)]


def packed_naively(order, sizes, open_rows):
    open_now, given_out = [], []
    for index in order:
        spaces = [CAPACITY - sum(sizes[i] for i in row) for row in open_now]
        enough = [space for space in spaces if space >= sizes[index]]
        if enough:
            open_now[spaces.index(min(enough))].append(index)
        else:
            open_now.append([index])
        while open_now and (
            len(open_now) > open_rows or sum(sizes[i] for i in open_now[0]) == CAPACITY
        ):
            given_out.append(tuple(open_now.pop(0)))
    return given_out + [tuple(row) for row in open_now]


@given(orders(), st.integers(1, 6))
def test_the_oldest_of_too_many_rows_is_given_out_as_it_is(drawn, open_rows):
    order, sizes = drawn
    found = list(pack(order, sizes, CAPACITY, open_rows))
    assert found == packed_naively(order, sizes, open_rows)


def test_the_first_row_is_there_long_before_the_last_example_is_asked_for():
    taken = []
    rows = pack((taken.append(i) or i for i in range(10_000)), [20] * 10_000, CAPACITY)
    assert next(rows) == (0,)
    assert len(taken) == OPEN_ROWS + 1


def test_bounding_the_open_rows_costs_next_to_no_space():
    chosen = random.Random(0)
    sizes = [min(512, 1 + int(chosen.lognormvariate(4.8, 0.7))) for _ in range(30_000)]
    bounded = sum(1 for _ in pack(range(len(sizes)), sizes, 512))
    unbounded = sum(1 for _ in pack(range(len(sizes)), sizes, 512, len(sizes)))
    assert bounded <= 1.002 * unbounded


@given(lengths, st.integers(0, 5), st.integers(1, 4), st.booleans(), st.booleans())
def test_an_epoch_visits_every_example_once(sizes, epoch, batch_size, packed, shuffle):
    plan = plan_of(sizes, batch_size=batch_size, packed=packed, shuffle=shuffle)
    visited = [i for rows in plan.micro_batches(epoch) for i in rows]
    assert sorted(visited) == list(range(len(sizes)))
    if not packed and not shuffle:
        assert visited == list(range(len(sizes)))


@given(lengths, st.integers(0, 3), st.booleans())
def test_the_order_is_a_function_of_seed_and_epoch(sizes, seed, packed):
    plan = plan_of(sizes, seed=seed, packed=packed)
    forward = [list(plan.micro_batches(epoch)) for epoch in range(3)]
    again = plan_of(sizes, seed=seed, packed=packed)
    assert [list(again.micro_batches(epoch)) for epoch in (2, 1, 0)] == forward[::-1]


def test_epochs_and_seeds_differ_in_their_order():
    sizes = [1] * 50
    found = {
        (seed, epoch): tuple(plan_of(sizes, seed=seed).micro_batches(epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(set(found.values())) == len(found)


@given(lengths, st.integers(1, 4), st.integers(1, 4), st.booleans(), st.data())
def test_windows_from_a_cursor_are_the_rest_of_the_epoch(sizes, batch_size, window, packed, data):
    plan = plan_of(sizes, batch_size=batch_size, window=window, packed=packed)
    whole = [[b.rows for b in w] for w in plan.windows(0, 0)]
    assert len(whole) == len(list(plan.first_windows(1)))
    assert all(len(w) == window for w in whole[:-1])
    done = data.draw(st.integers(0, len(whole)))
    # As in another process, which has planned nothing yet.
    plan = plan_of(sizes, batch_size=batch_size, window=window, packed=packed)
    assert [[b.rows for b in w] for w in plan.windows(0, done * window)] == whole[done:]


@given(lengths, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 20))
def test_a_run_is_the_windows_of_its_epochs_as_far_as_it_goes(
    sizes, batch_size, window, epochs, most
):
    plan = plan_of(sizes, batch_size=batch_size, window=window)
    all_of_them = [[b.rows for b in w] for epoch in range(epochs) for w in plan.windows(epoch, 0)]
    assert list(plan.first_windows(epochs, most)) == all_of_them[: most or None]


@given(lengths, st.integers(1, 4), st.booleans(), st.data())
def test_an_epoch_is_over_behind_its_last_window_and_not_before(sizes, window, packed, data):
    plan = plan_of(sizes, window=window, packed=packed)
    count = len(list(plan.micro_batches(0)))
    cursor = data.draw(st.sampled_from([*range(0, count, window), count]))
    for batches in plan.windows(0, cursor):
        assert not plan.is_over(0, cursor)
        cursor += len(batches)
    assert cursor == count
    assert plan.is_over(0, cursor)


@given(
    lengths,
    st.integers(1, 3),
    st.integers(1, 6),
    st.tuples(st.integers(0, 3 * CAPACITY), st.integers(0, 2 * CAPACITY)),
)
def test_joined_micro_batches_are_those_of_the_step(sizes, batch_size, window, limits):
    """The same examples in the same order, fewer micro-batches, none too large for being joined."""
    apart = plan_of(sizes, batch_size=batch_size, window=window)
    together = plan_of(sizes, batch_size=batch_size, window=window)
    together.join_limits = limits
    for ours, theirs in zip(together.windows(0, 0), apart.windows(0, 0), strict=True):
        assert [row for b in ours for row in b.rows] == [row for b in theirs for row in b.rows]
        assert sum(batch.joined for batch in ours) == len(theirs)
        assert sum(batch.trained for batch in ours) == sum(batch.trained for batch in theirs)
        for batch, following in zip(ours, [*ours[1:], None], strict=True):
            if batch.joined > 1:
                assert batch.size <= limits[0]
                assert batch.trained <= limits[1]
            if following is not None and following.joined == 1:
                tokens, trained = batch.size + following.size, batch.trained + following.trained
                assert tokens > limits[0] or trained > limits[1]
    assert together.is_over(0, len(list(apart.micro_batches(0))))


@given(lengths)
def test_labels_never_cross_a_document(sizes):
    batch = make_batch(dataset_of(sizes), range(len(sizes)))
    tokens, labels = batch.tokens.tolist(), batch.labels.tolist()
    assert batch.layout.lengths == tuple(sizes)
    assert batch.layout.positions.tolist() == [i for size in sizes for i in range(size)]
    assert batch.trained == sum(label != IGNORED for label in labels)
    for token, label in zip(tokens, labels, strict=True):
        number, place = divmod(token, 1000)
        last = place == sizes[number] - 1
        trained = not last and (place + 1) % 3 != 1
        assert label == (token + 1 if trained else IGNORED)
