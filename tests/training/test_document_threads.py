"""Documents shared out over threads: the same loss and gradients, whichever is done first."""

from __future__ import annotations

import _thread
import threading
import time
from itertools import combinations

import hypothesis.strategies as st
import pytest
import torch
from attrs import evolve
from hypothesis import given
from safetensors.torch import load_file

import lorakit
from lorakit import arena
from lorakit import assemble as assembling
from lorakit.arena import use_arena
from lorakit.assemble import assemble
from lorakit.data import shares
from lorakit.data.shares import halved, shared_out
from lorakit.document_threads import document_threads, in_threads, loss_in_threads
from lorakit.loop import trainable_parameters
from lorakit.loss import batch_loss
from lorakit.modules import matmul
from lorakit.modules.layout import apart
from lorakit.modules.narrow import NarrowLinear, compute_in
from lorakit.options import TrainingOptions
from lorakit.progress import SilentProgress
from lorakit.recipes import resolve_recipe

BATCH = {"batch_size": 6}


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    monkeypatch.setattr(assembling, "document_threads", lambda *_: 2)
    monkeypatch.setattr(shares, "SMALLEST", 1)
    monkeypatch.setattr(shares, "LEAST_EVEN", 0.5)


def loss_and_gradients(run, batch):
    model = run.base.model
    model.zero_grad()
    loss = batch_loss(run.base.causal_lm, batch)
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in trainable_parameters(model)]


def first_run(make_recipe, **sections):
    """Assembled, with an update that is not zero, and its first micro-batch."""
    sections["training"] = {**BATCH, **sections.get("training", {})}
    run = assemble(resolve_recipe(make_recipe(**sections)), SilentProgress())
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable_parameters(run.base.model):
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += 0.1 * noise
    return run, next(iter(run.plan.windows(0, 0)))[0]


def test_without_gradients_too(make_recipe, monkeypatch):
    """As a run is evaluated."""
    run, batch = first_run(make_recipe)
    asked = []

    def counted(function, items):
        asked.append(len(items))
        return in_threads(function, items)

    monkeypatch.setattr("lorakit.document_threads.in_threads", counted)
    with torch.no_grad():
        loss = batch_loss(run.base.causal_lm, batch)
        whole = batch_loss(run.base.causal_lm, evolve(batch, parts=()))
    assert asked == [2]
    assert not loss.requires_grad
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mode", ["none", "selective", "block"])
def test_threads_that_share_an_arena_compute_the_same(mode, make_recipe, monkeypatch):
    run, batch = first_run(make_recipe, training={"activation_checkpointing": mode})
    assert len(batch.parts) == 2
    expected, wanted = loss_and_gradients(run, batch)
    monkeypatch.setattr(arena, "SMALLEST", 1)
    use_arena(False)
    if not use_arena(True):
        pytest.skip("no arena on this system")
    try:
        for _ in range(3):
            loss, gradients = loss_and_gradients(run, batch)
            assert torch.equal(loss, expected)
            assert all(map(torch.equal, gradients, wanted))
        assert arena._arenas[0].most > 0
    finally:
        use_arena(False)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"training": {"fused": False}},
        {"training": {"activation_checkpointing": "selective"}},
        {"training": {"activation_checkpointing": "block"}},
        {"quantization": {"name": "nf4", "block_size": 32}},
        {"adapter": {"dora": True}},
    ],
    ids=str,
)
def test_gradients_are_those_of_the_whole(sections, make_recipe):
    run, batch = first_run(make_recipe, **sections)
    assert len(batch.parts) == 2
    assert sum(part.size for part in batch.parts) == batch.size
    whole, expected = loss_and_gradients(run, evolve(batch, parts=()))
    # Several times: that nothing is shared between threads shows only now and then.
    for _ in range(3):
        loss, gradients = loss_and_gradients(run, batch)
        assert float(loss) == pytest.approx(float(whole), rel=1e-5)
        for found, wanted in zip(gradients, expected, strict=True):
            scale = float(wanted.abs().max())
            assert scale > 0
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * scale)


def test_they_are_computed_by_two_threads(make_recipe):
    run, batch = first_run(make_recipe)
    seen, both = [], threading.Barrier(2, timeout=60)

    def meet(*_):
        seen.append(threading.current_thread())
        both.wait()

    run.base.causal_lm.blocks[0].register_forward_pre_hook(meet)
    loss_and_gradients(run, batch)
    assert len(set(seen)) == 2
    assert threading.main_thread() not in seen


def test_bit_for_bit_the_same_each_time(make_recipe):
    run, batch = first_run(make_recipe)
    _, expected = loss_and_gradients(run, batch)
    for _ in range(5):
        _, found = loss_and_gradients(run, batch)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("mode", ["none", "block"])
def test_a_model_that_draws_numbers_is_left_whole(mode, make_recipe):
    """Which thread draws which would be chance."""
    sections = {
        "adapter": {"dropout": 0.3},
        "training": {"activation_checkpointing": mode},
    }
    run, batch = first_run(make_recipe, **sections)
    assert batch.parts
    torch.manual_seed(5)
    _, expected = loss_and_gradients(run, evolve(batch, parts=()))
    state = torch.get_rng_state()
    for _ in range(2):
        torch.manual_seed(5)
        _, found = loss_and_gradients(run, batch)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("mode", ["none", "block"])
def test_the_generator_is_as_it_was(mode, make_recipe):
    run, batch = first_run(make_recipe, training={"activation_checkpointing": mode})
    state = torch.get_rng_state()
    loss_and_gradients(run, batch)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_gradients_it_is_left_whole(make_recipe):
    run, batch = first_run(make_recipe)
    with torch.no_grad():
        found = batch_loss(run.base.causal_lm, batch)
        assert torch.equal(found, batch_loss(run.base.causal_lm, evolve(batch, parts=())))


def test_a_run_comes_to_the_same_and_resumes_exactly(make_recipe, monkeypatch, read_metrics):
    training = {**BATCH, "epochs": 4, "max_grad_norm": 1.0}
    sections = {"training": training, "schedule": {"name": "constant"}}
    whole = lorakit.train(make_recipe(**sections))
    half = make_recipe(**sections)
    lorakit.train(half, overrides={"training.max_steps": 3})
    resumed = lorakit.train(half, resume=True)
    adapters = [
        load_file(result.output / "adapter" / "adapter_model.safetensors")
        for result in (whole, resumed)
    ]
    assert all(torch.equal(tensor, adapters[1][key]) for key, tensor in adapters[0].items())
    monkeypatch.setattr(assembling, "document_threads", lambda *_: 1)
    apart = lorakit.train(make_recipe(**sections))
    losses = [[x["loss"] for x in read_metrics(r.output)] for r in (whole, apart)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != losses[1]


def test_torch_has_its_threads_again_whatever_happens():
    before = torch.get_num_threads()
    done = []

    def work(item):
        if item == "bad":
            raise ValueError("no such item")
        done.append((item, torch.get_num_threads()))

    torch.set_num_threads(4)
    try:
        with pytest.raises(ValueError, match="no such item"):
            in_threads(work, ["bad", "good"])
        assert torch.get_num_threads() == 4
        assert done == [("good", 2)]
    finally:
        torch.set_num_threads(before)


@given(lengths=st.lists(st.integers(1, 2000), min_size=1, max_size=12), threads=st.integers(1, 6))
def test_shares(lengths, threads):
    found = shared_out(apart(lengths), threads)
    assert sorted(place for share in found for place in share) == list(range(len(lengths)))
    sizes = [sum(lengths[place] for place in share) for share in found]
    if len(found) > 1:
        assert len(found) in (2, 4)
        assert min(sizes) >= 1
        each = threads // len(found)
        assert sum(sizes) / threads >= 0.5 * max(sizes) / each


@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=7))
def test_halves_are_as_even_as_can_be(lengths):
    places = range(len(lengths))
    best = min(
        abs(sum(lengths) - 2 * sum(some))
        for count in range(len(lengths) + 1)
        for some in combinations(lengths, count)
    )
    one, other = halved(places, lengths)
    assert sorted([*one, *other]) == list(places)
    difference = sum(lengths[p] for p in one) - sum(lengths[p] for p in other)
    assert abs(difference) == best


def test_many_documents_are_halved_evenly_too():
    lengths = [(7 * i) % 250 + 50 for i in range(100)]
    one, other = halved(range(100), lengths)
    difference = sum(lengths[p] for p in one) - sum(lengths[p] for p in other)
    assert abs(difference) < 0.01 * sum(lengths)


def test_what_documents_share_is_not_computed_by_each_thread(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(shares, "SMALLEST", 1)
    # 900 tokens in common, and 100 of each document's own: two threads would compute 2,200 tokens
    # where one computes 1,300.
    beginning = slice(0, 900)
    documents = [(slice(0, 1000),)]
    documents += [(beginning, slice(stop - 100, stop)) for stop in (1100, 1200, 1300)]
    assert shared_out(documents, 2) == [[0, 1, 2, 3]]
    # 20 in common are worth it.
    documents = [(slice(0, 300),)]
    documents += [(slice(0, 20), slice(stop - 280, stop)) for stop in (580, 860, 1140)]
    assert [len(share) for share in shared_out(documents, 2)] == [2, 2]


def test_an_interrupted_thread_waits_for_the_others():
    """They write to memory that what comes next writes to."""
    started, done = threading.Event(), []

    def work(item):
        started.set()
        time.sleep(0.5)
        done.append(item)

    def interrupt():
        started.wait()
        _thread.interrupt_main()
        time.sleep(0.1)
        _thread.interrupt_main()

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        in_threads(work, ["one", "other"])
    assert sorted(done) == ["one", "other"]


@pytest.mark.parametrize("form", ["one gradient for two", "one number for all"])
def test_gradients_that_share_memory(form):
    """As an adapter of another package may give them."""
    model = torch.nn.Module()
    model.a, model.b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))

    def part_loss(x):
        return ((model.a + model.b) * x).sum() if form.startswith("one g") else model.a.sum() * x

    loss_in_threads(part_loss, [1.0, 2.0], model).backward()
    assert model.a.grad.tolist() == [3.0] * 3
    if form.startswith("one g"):
        assert model.b.grad.tolist() == [3.0] * 3


def test_weights_stored_in_bf16(make_recipe):
    run, batch = first_run(make_recipe)
    for parameter in run.base.model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    compute_in(run.base.model, torch.float32)
    assert any(isinstance(m, NarrowLinear) for m in run.base.model.modules())
    whole, expected = loss_and_gradients(run, evolve(batch, parts=()))
    for _ in range(3):
        loss, gradients = loss_and_gradients(run, batch)
        assert float(loss) == pytest.approx(float(whole), rel=1e-5)
        for found, wanted in zip(gradients, expected, strict=True):
            scale = float(wanted.abs().max())
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("dora", [False, True])
def test_weights_that_kernels_take_as_stored_need_no_memory(dora, monkeypatch, make_recipe):
    class Kernels:
        def multiplies(self, rows, weight):
            return weight.dtype == torch.bfloat16

    monkeypatch.setattr("lorakit.builtin.precisions.cpu_has_bf16", lambda: False)
    run, _ = first_run(make_recipe, precision={"name": "bf16"}, adapter={"dora": dora})
    model, cpu = run.base.causal_lm, torch.device("cpu")
    monkeypatch.setenv("LORAKIT_TUNE", "1")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr("lorakit.document_threads.MOST_MATERIALIZED", 1)
    assert document_threads(model, cpu, TrainingOptions()) == 1
    monkeypatch.setattr(matmul, "_kernels", [Kernels()])
    assert document_threads(model, cpu, TrainingOptions()) == 2


def test_what_is_not_run_in_threads(monkeypatch, make_recipe):
    run, _ = first_run(make_recipe, quantization={"name": "nf4", "block_size": 32})
    model, cpu = run.base.causal_lm, torch.device("cpu")
    monkeypatch.setenv("LORAKIT_TUNE", "1")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert document_threads(model, cpu, TrainingOptions()) == 2
    assert document_threads(model, torch.device("cuda"), TrainingOptions()) == 1
    assert document_threads(model, cpu, TrainingOptions(compile=True)) == 1
    assert document_threads(model, cpu, TrainingOptions(profile=True)) == 1
    monkeypatch.setattr("lorakit.document_threads.MOST_MATERIALIZED", 100)
    assert document_threads(model, cpu, TrainingOptions()) == 1
    monkeypatch.setattr("lorakit.document_threads.MOST_MATERIALIZED", 2**24)
    monkeypatch.setenv("LORAKIT_TUNE", "0")
    assert document_threads(model, cpu, TrainingOptions()) == 1
    monkeypatch.setenv("LORAKIT_TUNE", "1")
    dropping, _ = first_run(make_recipe, adapter={"dropout": 0.1})
    assert document_threads(dropping.base.causal_lm, cpu, TrainingOptions()) == 1


def test_uneven_or_short_documents_stay_together(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(shares, "SMALLEST", 128)
    assert sorted(shared_out(apart([300, 310, 290, 300]), 2)) == [[0, 3], [1, 2]]
    assert sorted(shared_out(apart([300, 310, 290, 300]), 4)) == [[0], [1], [2], [3]]
    assert sorted(shared_out(apart([300, 250, 200, 150, 100]), 2)) == [[0, 2], [1, 3, 4]]
    # Four shares would wait for the first; two, of two threads each, do not.
    found = sorted(shared_out(apart([600, 310, 290, 300, 300]), 4), key=len)
    assert found in ([[0, 4], [1, 2, 3]], [[0, 3], [1, 2, 4]])
    # A third of three threads would have nothing to do.
    assert shared_out(apart([300, 310, 290, 300]), 3) == [[0, 1, 2, 3]]
    assert shared_out(apart([300, 310, 290, 300]), 1) == [[0, 1, 2, 3]]
    assert shared_out(apart([434, 51]), 2) == [[0, 1]]
    assert shared_out(apart([100, 100]), 2) == [[0, 1]]
    assert shared_out(apart([4096]), 2) == [[0]]
