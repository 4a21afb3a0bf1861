"""A run rehearsed without memory: the very code of loading and of a step, on fake tensors.

Nothing about a family, an adapter or a quantization is known here.  What they allocate is seen
while they do what they would do in the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
from attrs import evolve, frozen
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lorakit.adapters import apply_adapter
from lorakit.arena import fakes_told
from lorakit.base_model import BaseModel, build_on_meta, load_weights
from lorakit.blocks import checkpoint_blocks
from lorakit.data.batches import Batch
from lorakit.data.shares import most_shares, shared_out
from lorakit.document_threads import document_threads
from lorakit.estimate.remembered import RememberedResults
from lorakit.estimate.storages import Event, StorageWatch
from lorakit.loop import trainable_parameters
from lorakit.loss import batch_loss
from lorakit.modules.frozen import StoredLinear
from lorakit.modules.layout import Layout, Segments, apart
from lorakit.modules.low_rank import set_fused
from lorakit.progress import SilentProgress
from lorakit.protocols import BaseCheckpoint, CausalLM, Precision, TensorSpec
from lorakit.recipes import Recipe
from lorakit.scratch import fakes_kept
from lorakit.weights.dtypes import torch_dtype

ACTIVATIONS, LOSS, GRADIENTS = "activations", "loss", "gradients"
DEQUANTIZED, SCRATCH, FILE = "dequantized", "scratch", "file"
SHORTEST = (2,)
"""Lengths of a micro-batch whose gradients are those of any other."""
BYTES_UNKNOWN_OPTIMIZER = 8
"""State of an optimizer that does not say what it keeps: two fp32 numbers a parameter."""


@frozen
class MicroBatch:
    """Sizes of a micro-batch.

    Attributes:
        lengths: Its documents', in tokens.
        trained: How many tokens are trained.
        segments: Where the documents' tokens lie, if they share any.
    """

    lengths: tuple[int, ...]
    trained: int
    segments: tuple[Segments, ...] = ()

    @property
    def tokens(self) -> int:
        """What is computed: what documents begin with in common once."""
        return max(parts[-1].stop for parts in self.layout().segments)

    def layout(self) -> Layout:
        return Layout.of_segments(self.segments or apart(self.lengths))


@frozen
class Step:
    """What one optimizer step allocates and frees.

    Attributes:
        events: In order.
        labels: By storage: `activations`, `loss` or `gradients`.
        buffers: Bytes that stay from step to step: scratch memory, and the largest dequantized
            weight, whose memory all of them share.
        parts: How many parts of a micro-batch are computed at the same time, each with buffers of
            its own.
        in_arena: Which storages are in an arena, see `lorakit.arena`.
    """

    events: Sequence[Event]
    labels: Sequence[str]
    buffers: int
    parts: int = 1
    in_arena: Set[int] = frozenset()


@frozen
class _Left:
    """What a micro-batch leaves behind.

    Attributes:
        gradients: Of each trained parameter; None where it got none.
        scratch: Memory kept for reuse.
    """

    gradients: Sequence[Tensor | None]
    scratch: Mapping[Any, Tensor]


class Rehearsal:
    """A recipe's model as it will be in memory, without the memory.

    Args:
        recipe: Resolved.
        checkpoint: Gives config.json and the tensors' shapes.
        device: Where the run will be.
        precision: Its dtypes.

    Attributes:
        weights: Bytes by part: of the base's blocks, of embeddings and head, of the adapter.
        optimizer: Bytes of the optimizer's state.
        loading: The most bytes in use while the weights are loaded.
    """

    def __init__(
        self, recipe: Recipe, checkpoint: BaseCheckpoint, device: torch.device, precision: Precision
    ) -> None:
        self._recipe, self._device, self._precision = recipe, device, precision
        # Some families keep small tensors with values, such as rotary frequencies.
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._left: _Left | None = None
        self._results = RememberedResults(self._mode)
        family = recipe.model.record
        model = build_on_meta(family, checkpoint.config, recipe.model.options)
        watch = StorageWatch(0, device, self._results)
        base = BaseModel(_Fakes(checkpoint, watch), family, model, cast(Any, None), 0)
        with self._mode, watch:
            load_weights(
                base,
                device=device,
                precision=precision,
                progress=SilentProgress(),
                quantization=recipe.quantization,
            )
        self.loading = _loading_peak(watch)
        with self._mode:
            adapter = recipe.adapter
            apply_adapter(model, adapter.record, adapter.options, precision.adapter)
        model.train()
        training = recipe.training
        mode, count = str(training.activation_checkpointing), training.checkpointed_blocks
        checkpoint_blocks(cast(CausalLM, model), mode, count=count, compiled=training.compile)
        self.model = model
        self.weights = _weight_bytes(model)
        self.optimizer = sum(self._state_bytes(p) for p in trainable_parameters(model))

    def step(self, batch: MicroBatch) -> Step:
        """One optimizer step of micro-batches of this size."""
        model, watch = self.model, StorageWatch(batch.trained, self._device, self._results)
        trained = trainable_parameters(model)
        before = None
        if self._recipe.training.gradient_accumulation_steps > 1:
            before = self._left_by_a_micro_batch()
        fakes = fakes_told(watch.note_in_arena)
        with self._fused_as_wanted(), self._mode, fakes_kept() as kept, fakes, watch:
            watch.ignore([*model.parameters(), *model.buffers()])
            _label_dequantized(model, watch)
            if before is not None:
                watch.ignore(before.scratch.values())
                kept.update(before.scratch)
                with watch.labelled(GRADIENTS):
                    for parameter, gradient in zip(trained, before.gradients, strict=True):
                        parameter.grad = None if gradient is None else _made_like(gradient)
            self._micro_batch(batch, watch)
            watch.relabel([p.grad for p in trained if p.grad is not None], GRADIENTS)
            watch.relabel(kept.values(), SCRATCH)
            scratch = sum(t.untyped_storage().nbytes() for t in kept.values())
            for parameter in trained:
                parameter.grad = None
        made = [e for e in watch.events if e.size > 0]
        weights = [e.size for e in made if watch.labels[e.storage] == DEQUANTIZED]
        staying = {i for i, label in enumerate(watch.labels) if label in (DEQUANTIZED, SCRATCH)}
        events = [e for e in watch.events if e.storage not in staying]
        parts = self._parts(batch)
        buffers = (max(weights, default=0) + scratch) * self._most_parts(batch)
        return Step(events, watch.labels, buffers, parts, watch.in_arena)

    def _left_by_a_micro_batch(self) -> _Left:
        """What the one before leaves to the next of a step.  More is in use during the next, so
        that alone is rehearsed in full; what is left does not depend on how long it was."""
        if self._left is None:
            watch = StorageWatch(1, self._device, self._results)
            with self._fused_as_wanted(), self._mode, fakes_kept() as kept, watch:
                _label_dequantized(self.model, watch)
                self._micro_batch(MicroBatch(SHORTEST, 1), watch)
            trained = trainable_parameters(self.model)
            self._left = _Left([p.grad for p in trained], dict(kept))
            for parameter in trained:
                parameter.grad = None
        return self._left

    @contextmanager
    def _fused_as_wanted(self) -> Iterator[None]:
        before = set_fused(self._recipe.training.fused)
        try:
            yield
        finally:
            set_fused(before)

    def _parts(self, batch: MicroBatch) -> int:
        """How many parts of the micro-batch are computed at the same time."""
        model = cast(CausalLM, self.model)
        threads = document_threads(model, self._device, self._recipe.training)
        return len(shared_out(batch.segments or apart(batch.lengths), threads))

    def _most_parts(self, batch: MicroBatch) -> int:
        """Likewise of any of the run's, this one being the largest."""
        recipe, training = self._recipe, self._recipe.training
        joined = training.join_micro_batches and training.gradient_accumulation_steps > 1
        several = joined or training.batch_size > 1 or recipe.data.options.packed
        if not several and recipe.evaluation is None:
            return self._parts(batch)
        threads = document_threads(cast(CausalLM, self.model), self._device, training)
        return max(self._parts(batch), most_shares(batch.tokens, threads))

    def _micro_batch(self, sizes: MicroBatch, watch: StorageWatch) -> None:
        with watch.labelled(ACTIVATIONS):
            tokens = torch.zeros(sizes.tokens, dtype=torch.int64, device=self._device)
            labels = tokens.new_zeros(sum(sizes.lengths))
            batch = Batch(
                tokens, labels, sizes.layout(), sizes.trained, (), together=self._parts(sizes)
            ).to(self._device)
            model = _LabelledHead(cast(CausalLM, self.model), watch)
            loss = batch_loss(cast(CausalLM, model), batch) / sizes.trained
        with watch.labelled(ACTIVATIONS):
            self._precision.backward(loss)

    def _state_bytes(self, parameter: nn.Parameter) -> int:
        section = self._recipe.optimizer
        if section.record.state_bytes is None:
            return BYTES_UNKNOWN_OPTIMIZER * parameter.numel()
        size: int = section.record.state_bytes(
            tuple(parameter.shape), parameter.itemsize, section.options
        )
        return size


class _Fakes:
    """A checkpoint whose tensors are fakes, of the shapes and dtypes that headers give."""

    def __init__(self, checkpoint: BaseCheckpoint, watch: StorageWatch) -> None:
        self.path, self.config = checkpoint.path, checkpoint.config
        self._watch = watch
        self._shards = checkpoint.shards()

    def files(self) -> Mapping[str, bytes]:
        return {}

    def shards(self) -> Mapping[str, Mapping[str, TensorSpec]]:
        return self._shards

    def tensors(self, shard: str | None = None) -> Iterator[tuple[str, Tensor]]:
        for specs in self._shards.values():
            for name, spec in specs.items():
                # What torch has no dtype for (GGUF's blocks) is read as fp32.
                dtype = torch_dtype(spec.dtype) or torch.float32
                with self._watch.labelled(FILE):
                    tensor = torch.empty(spec.shape, dtype=dtype)
                yield name, tensor


class _LabelledHead:
    """The model, but that what is made once the hidden states are there counts as the loss's."""

    def __init__(self, model: CausalLM, watch: StorageWatch) -> None:
        self._model, self._watch = model, watch

    def hidden(self, *args: Any) -> Tensor:
        states = self._model.hidden(*args)
        self._watch.label = LOSS
        return states

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _made_like(tensor: Tensor) -> Tensor:
    """Another one, with as much memory of its own."""
    memory = tensor.new_empty(tensor.untyped_storage().nbytes() // tensor.itemsize)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _label_dequantized(model: nn.Module, watch: StorageWatch) -> None:
    """Stored weights are materialized by name only: of all that it takes, the result is what
    counts."""
    for module in model.modules():
        if isinstance(module, StoredLinear):
            dequantize = watch.labelling(partial(_dequantized, module), DEQUANTIZED)
            module.dequantize = dequantize  # type: ignore[method-assign]


def _dequantized(module: StoredLinear, out: Tensor | None = None) -> Tensor:
    if out is not None:
        return out
    device = next(chain(module.buffers(), module.parameters())).device
    shape = (module.out_features, module.in_features)
    return torch.empty(shape, dtype=module.compute_dtype, device=device)


def _weight_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes by part of the model, each storage once."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | {
        id(p) for p in cast(nn.Module, model.lm_head).parameters() if not p.requires_grad
    }
    found = {"base weights": 0, "embeddings and head": 0, "adapter": 0}
    for tensor in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values():
        if tensor.requires_grad:
            part = "adapter"
        else:
            part = "embeddings and head" if id(tensor) in embeddings else "base weights"
        found[part] += tensor.untyped_storage().nbytes()
    return found


def _loading_peak(watch: StorageWatch) -> int:
    """The most bytes resident while weights are loaded: of the file, one tensor's at a time,
    for the pages of the last are released before the next one's are touched."""
    now = most = file = 0
    for event in watch.events:
        if watch.labels[event.storage] != FILE:
            now += event.size
        elif event.size > 0:
            file = event.size
        most = max(most, now + file)
    return most


def most_in_use(events: Sequence[Event]) -> int:
    """The most bytes in use at any time."""
    now = most = 0
    for event in events:
        now += event.size
        most = max(most, now)
    return most


def with_checkpointing(recipe: Recipe, mode: str, blocks: int = 0) -> Recipe:
    """The recipe with another `training.activation_checkpointing`, of so many blocks; 0 for all."""
    training = evolve(
        recipe.training,
        activation_checkpointing=mode,
        checkpointed_blocks=blocks,
        # Only the blocks' inputs can be offloaded.
        activation_offloading=False,
    )
    return evolve(recipe, training=training)
