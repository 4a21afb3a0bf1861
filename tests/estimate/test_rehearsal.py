"""What is rehearsed without memory is what happens with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve

from lorakit import scratch
from lorakit.assemble import Run, assemble
from lorakit.builtin import precisions
from lorakit.catalog import load_catalog
from lorakit.data.batches import Batch
from lorakit.estimate import peak, rehearsal
from lorakit.estimate.rehearsal import (
    DEQUANTIZED,
    GRADIENTS,
    MicroBatch,
    Rehearsal,
    most_in_use,
)
from lorakit.estimate.remembered import RememberedResults
from lorakit.estimate.storages import StorageWatch
from lorakit.loop import trainable_parameters
from lorakit.loss import batch_loss
from lorakit.modules import matmul, sublayers
from lorakit.modules.low_rank import fused_now
from lorakit.modules.narrow import NarrowLinear
from lorakit.progress import SilentProgress
from lorakit.recipes import Recipe, resolve_recipe

CPU = torch.device("cpu")
LENGTHS = (40, 9, 23)
BATCH = MicroBatch(LENGTHS, sum(LENGTHS))

VARIANTS: list[dict[str, Any]] = [
    {},
    {"training": {"activation_checkpointing": "block"}},
    {"training": {"activation_checkpointing": "selective"}},
    {"training": {"fused": False}},
    {"adapter": {"dora": True, "dropout": 0.1}},
    {"adapter": {"targets": ["q_proj", "down_proj"]}},
    {"precision": {"name": "bf16"}},
    {"precision": {"name": "bf16_pure"}},
]


def real_step(recipe: Recipe, sizes: MicroBatch = BATCH) -> int:
    """The most bytes that a step of the real run has in use."""
    run = assemble(recipe, SilentProgress())
    watch = StorageWatch(sizes.trained, CPU)
    real_micro_batch(run, sizes)
    # Scratch memory is made by the first step, and stays.
    watch.ignore([*run.base.model.parameters(), *run.base.model.buffers()])
    watch.ignore(scratch._kept.values())
    with watch:
        real_micro_batch(run, sizes)
    return most_in_use(watch.events)


def real_micro_batch(run: Run, sizes: MicroBatch = BATCH, *, step: bool = True) -> None:
    tokens = torch.zeros(sizes.tokens, dtype=torch.int64)
    labels = torch.zeros(sum(sizes.lengths), dtype=torch.int64)
    batch = Batch(tokens, labels, sizes.layout(), sizes.trained, ())
    run.precision.backward(batch_loss(run.base.causal_lm, batch) / sizes.trained)
    if step:
        for parameter in trainable_parameters(run.base.model):
            parameter.grad = None


@pytest.mark.parametrize("sections", VARIANTS, ids=str)
def test_a_step_has_in_use_what_the_real_one_has(
    sections: dict[str, Any],
    make_recipe: Callable[..., str],
    rehearse: Callable[..., Rehearsal],
):
    recipe = resolve_recipe(make_recipe(**sections))
    rehearsed = most_in_use(rehearse(recipe).step(BATCH).events)
    # Which scalars are alive when most is in use may differ.
    assert rehearsed == pytest.approx(real_step(recipe), abs=64)


IN_ONE_CALL: list[dict[str, Any]] = [
    {},
    {"adapter": {"dora": True}},
    {"training": {"activation_checkpointing": "block"}},
    {"training": {"activation_checkpointing": "selective"}},
    {"training": {"activation_checkpointing": "selective"}, "adapter": {"dora": True}},
]


@pytest.mark.parametrize("sections", IN_ONE_CALL, ids=str)
def test_so_it_has_where_kernels_compute_half_a_block_in_one_call(
    sections: dict[str, Any],
    make_recipe: Callable[..., str],
    make_checkpoint: Callable[..., Path],
    rehearse: Callable[..., Rehearsal],
    monkeypatch: pytest.MonkeyPatch,
):
    usable = [k.name for k in load_catalog().all("kernels") if k.unusable() is None]
    if not usable:
        pytest.skip("no plugin with kernels that this machine can use")
    training = {**sections.get("training", {}), "kernels": usable[0]}
    model = make_checkpoint(head_dim=32)
    recipe = resolve_recipe(make_recipe(model=model, **{**sections, "training": training}))
    asked = []
    for half in (sublayers._FeedForward, sublayers._SelfAttention):
        own = half.backward
        told = staticmethod(lambda *given, own=own: asked.append(own) or own(*given))
        monkeypatch.setattr(half, "backward", told)
    expected = real_step(recipe)
    assert len(set(asked)) == 2
    assert most_in_use(rehearse(recipe).step(BATCH).events) == pytest.approx(expected, abs=64)


QUANTIZED: list[dict[str, Any]] = [
    {"quantization": {"name": "nf4"}},
    {"quantization": {"name": "int8"}, "precision": {"name": "bf16"}},
]


@pytest.mark.parametrize("sections", [*VARIANTS, *QUANTIZED], ids=str)
def test_remembered_results_are_those_of_fake_tensors(
    sections: dict[str, Any],
    make_recipe: Callable[..., str],
    rehearse: Callable[..., Rehearsal],
    monkeypatch: pytest.MonkeyPatch,
):
    recipe = resolve_recipe(make_recipe(**sections))
    remembered = rehearse(recipe)
    found = [remembered.step(sizes) for sizes in (BATCH, MicroBatch((5, 70), 3))]
    assert remembered._results._found
    monkeypatch.setattr(
        RememberedResults, "of", lambda _, func, args, kwargs: func(*args, **kwargs)
    )
    plain = rehearse(recipe)
    assert [plain.step(sizes) for sizes in (BATCH, MicroBatch((5, 70), 3))] == found
    assert (plain.weights, plain.loading) == (remembered.weights, remembered.loading)


@pytest.mark.parametrize("sections", [*VARIANTS, *QUANTIZED], ids=str)
def test_what_a_micro_batch_leaves_does_not_depend_on_its_length(
    sections: dict[str, Any],
    make_recipe: Callable[..., str],
    rehearse: Callable[..., Rehearsal],
    monkeypatch: pytest.MonkeyPatch,
):
    training = {**sections.get("training", {}), "gradient_accumulation_steps": 2}
    recipe = resolve_recipe(make_recipe(**{**sections, "training": training}))
    found = rehearse(recipe).step(BATCH)
    monkeypatch.setattr(rehearsal, "SHORTEST", LENGTHS)
    long = rehearse(recipe).step(BATCH)
    assert [e.size for e in long.events] == [e.size for e in found.events]
    assert long.buffers == found.buffers


@pytest.mark.parametrize("sections", VARIANTS, ids=str)
def test_a_later_micro_batch_of_a_step_has_the_gradients_beside_it(
    sections: dict[str, Any],
    make_recipe: Callable[..., str],
    rehearse: Callable[..., Rehearsal],
):
    training = {**sections.get("training", {}), "gradient_accumulation_steps": 3}
    recipe = resolve_recipe(make_recipe(**{**sections, "training": training}))
    run = assemble(recipe, SilentProgress())
    real_micro_batch(run, step=False)
    watch = StorageWatch(BATCH.trained, CPU)
    watch.ignore([*run.base.model.parameters(), *run.base.model.buffers()])
    watch.ignore(scratch._kept.values())
    gradients = [p.grad for p in trainable_parameters(run.base.model) if p.grad is not None]
    watch.ignore(gradients)
    with watch:
        real_micro_batch(run, step=False)
    real = most_in_use(watch.events) + sum(g.untyped_storage().nbytes() for g in gradients)
    rehearsed = most_in_use(rehearse(recipe).step(BATCH).events)
    assert rehearsed == pytest.approx(real, abs=64)


def test_a_step_of_documents_that_begin_alike(
    make_recipe: Callable[..., str], rehearse: Callable[..., Rehearsal]
):
    recipe = resolve_recipe(make_recipe())
    segments = (slice(0, 40),), (slice(0, 30), slice(40, 45)), (slice(45, 68),)
    sizes = MicroBatch((40, 35, 23), sum(LENGTHS), segments)
    assert sizes.tokens == 68
    rehearsed = most_in_use(rehearse(recipe).step(sizes).events)
    assert rehearsed == pytest.approx(real_step(recipe, sizes), abs=64)
    alone = most_in_use(rehearse(recipe).step(evolve(sizes, segments=())).events)
    assert rehearsed < 0.9 * alone


def test_a_step_that_fails_leaves_the_process_as_it_was(
    rehearse: Callable[..., Rehearsal], monkeypatch: pytest.MonkeyPatch
):
    failing = rehearse(training={"fused": False})

    def fail(*_: Any) -> None:
        assert not fused_now()
        raise RuntimeError("no such operation on fake tensors")

    monkeypatch.setattr(failing, "_micro_batch", fail)
    assert fused_now()
    with pytest.raises(RuntimeError, match="no such operation"):
        failing.step(BATCH)
    assert fused_now()


@pytest.mark.parametrize(
    "sections",
    [*VARIANTS, *QUANTIZED],
    ids=str,
)
def test_weights_take_what_the_loaded_model_does(
    sections: dict[str, Any], make_recipe: Callable[..., str], rehearse: Callable[..., Rehearsal]
):
    recipe = resolve_recipe(make_recipe(**sections))
    model = assemble(recipe, SilentProgress()).base.model
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}.values()
    found = rehearse(recipe).weights
    assert sum(found.values()) == sum(t.untyped_storage().nbytes() for t in tensors)
    assert found["adapter"] == sum(p.numel() * p.itemsize for p in trainable_parameters(model))
    embedding = model.get_submodule("model.embed_tokens").weight
    assert found["embeddings and head"] == embedding.numel() * embedding.itemsize


OPTIMIZERS = [
    {"name": "adamw"},
    {"name": "sgd"},
    {"name": "sgd", "momentum": 0.9},
    {"name": "adamw8bit"},
    {"name": "lion8bit"},
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_the_optimizers_state_is_as_large_as_the_real_ones(
    optimizer: dict[str, Any], make_recipe: Callable[..., str], rehearse: Callable[..., Rehearsal]
):
    sections = {"optimizer": optimizer, "adapter": {"rank": 160}}
    recipe = resolve_recipe(make_recipe(**sections))
    run = assemble(recipe, SilentProgress())
    trained = trainable_parameters(run.base.model)
    built = recipe.optimizer.record.build(trained, recipe.optimizer.options)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    built.step()
    states = [v for s in built.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    # Lookup tables that all parameters share, and counters, come on top.
    shared = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in states}
    assert rehearse(recipe).optimizer == pytest.approx(sum(shared.values()), rel=0.02, abs=4096)


def test_gradients_are_told_apart_and_are_the_adapters_size(rehearse: Callable[..., Rehearsal]):
    found = rehearse()
    step = found.step(BATCH)
    labels = [step.labels[e.storage] for e in step.events if e.size > 0]
    sizes = [e.size for e in step.events if e.size > 0]
    gradients = sum(s for s, label in zip(sizes, labels, strict=True) if label == GRADIENTS)
    assert gradients == found.weights["adapter"]
    # All of it is gone when the step is done.
    assert sum(event.size for event in step.events) == 0


def test_a_dequantized_weight_takes_one_shared_buffer(rehearse: Callable[..., Rehearsal]):
    step = rehearse(quantization={"name": "nf4"}).step(BATCH)
    # The largest linear layer of the test model is 48 x 32, computed with in fp32.
    plain = rehearse().step(BATCH)
    assert step.buffers - plain.buffers == 48 * 32 * 4
    assert not any(step.labels[e.storage] == DEQUANTIZED for e in step.events)


def test_checkpointing_keeps_less_and_more_tokens_keep_more(rehearse: Callable[..., Rehearsal]):
    deep = {"adapter": {"targets": ["q_proj"]}}
    plain = rehearse(**deep)
    saving = rehearse(**deep, training={"activation_checkpointing": True})
    small, large = MicroBatch((64,), 64), MicroBatch((128,), 128)
    assert most_in_use(saving.step(large).events) < most_in_use(plain.step(large).events)
    ratio = most_in_use(plain.step(large).events) / most_in_use(plain.step(small).events)
    assert 1.7 < ratio < 2.1


def test_nothing_is_left_behind_in_the_process(rehearse: Callable[..., Rehearsal]):
    from lorakit.modules.low_rank import set_fused

    before = set_fused(True)
    try:
        rehearse(training={"fused": False}).step(BATCH)
        assert set_fused(True) is True
    finally:
        set_fused(before)
    assert isinstance(torch.empty(1), torch.Tensor)
    assert type(torch.empty(1)) is torch.Tensor


class TakesBF16:
    """Kernels that multiply with bf16 weights as they are, and do nothing else."""

    def multiplies(self, rows: int, weight: torch.Tensor) -> bool:
        return weight.dtype == torch.bfloat16

    def adapts(self, rows: int, dtype: torch.dtype) -> bool:
        return False

    def attends(self, q: torch.Tensor, k: torch.Tensor) -> bool:
        return False

    def sublayers(self) -> None:
        return None


def test_weights_that_kernels_take_as_they_are_stored_are_not_widened(
    rehearse: Callable[..., Rehearsal], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(precisions, "cpu_has_bf16", lambda: False)
    widened = rehearse(precision={"name": "bf16"}).step(BATCH)
    monkeypatch.setattr(matmul, "_kernels", [TakesBF16()])
    taken = rehearse(precision={"name": "bf16"}).step(BATCH)
    rehearsed = rehearse(precision={"name": "bf16"})
    widest = max(m.weight.numel() for m in rehearsed.model.modules() if is_narrow(m))
    assert widened.buffers - taken.buffers >= 4 * widest
    # All else is as it was.
    assert most_in_use(taken.events) == pytest.approx(most_in_use(widened.events), abs=64)


def is_narrow(module: torch.nn.Module) -> bool:
    return isinstance(module, NarrowLinear)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_products_that_kernels_leave_to_torch_take_its_memory(
    name: str, rehearse: Callable[..., Rehearsal], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(precisions, "cpu_has_bf16", lambda: False)
    monkeypatch.setattr(peak, "WIDE", 8)
    model = rehearse(precision={"name": name}).model
    assert peak._has_wide_products_by_torch(model)
    monkeypatch.setattr(matmul, "_kernels", [TakesBF16()])
    assert peak._has_wide_products_by_torch(model) is (name == "fp32")


def test_any_micro_batch_may_be_computed_in_parts(
    rehearse: Callable[..., Rehearsal], monkeypatch: pytest.MonkeyPatch
):
    """Where the largest is one document, and smaller ones are joined, each part has its memory."""
    monkeypatch.setattr("lorakit.estimate.rehearsal.document_threads", lambda *_: 2)
    monkeypatch.setattr("lorakit.data.shares.SMALLEST", 32)
    whole = MicroBatch((64,), 64)
    alone = rehearse().step(whole)
    steps = {"gradient_accumulation_steps": 4}
    joined = rehearse(training=steps).step(whole)
    apart = rehearse(training={**steps, "join_micro_batches": False}).step(whole)
    assert alone.buffers == apart.buffers
    assert joined.buffers == 2 * alone.buffers
    assert joined.parts == 1
