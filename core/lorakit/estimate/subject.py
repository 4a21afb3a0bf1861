"""What there is to estimate: the recipe's model and data, without its weights."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from attrs import define
from torch import Tensor

from lorakit.assemble import batch_plan
from lorakit.base_model import build_on_meta
from lorakit.data.batches import BatchPlan
from lorakit.data.dataset import load_dataset
from lorakit.data.evaluation_set import hold_out
from lorakit.data.files import hub_data
from lorakit.data.tokenizer import load_tokenizer
from lorakit.errors import UserError
from lorakit.estimate.rehearsal import MicroBatch
from lorakit.protocols import BaseCheckpoint, Progress, TensorSpec
from lorakit.recipes import Recipe
from lorakit.weights.base import check_family, fetch_base, open_base, source_of
from lorakit.weights.dtypes import dtype_name
from lorakit.weights.stream import check_not_quantized, check_tensors


def open_shapes(recipe: Recipe, progress: Progress) -> BaseCheckpoint:
    """The recipe's base model, of which no more than its configuration need be local.

    Raises:
        UserError: As `lorakit.base_model.open_base_model`.
    """
    catalog, path = recipe.catalog, recipe.model.options.path
    source = source_of(path, catalog)
    fetch = source.fetch_configuration
    local = fetch(path, progress) if fetch else fetch_base(path, catalog, progress)
    formats = catalog.all("weight format")
    config = local / "config.json"
    if not any(form.claims(local) for form in formats) and config.is_file():
        checkpoint: BaseCheckpoint = ConfigurationOnly.of(local, recipe)
    else:
        checkpoint = open_base(local, catalog)
    check_family(recipe.model.record, checkpoint.config, catalog)
    check_not_quantized(checkpoint)
    check_tensors(
        build_on_meta(recipe.model.record, checkpoint.config, recipe.model.options), checkpoint
    )
    return checkpoint


@define
class ConfigurationOnly:
    """A checkpoint whose weights are elsewhere: shapes are what config.json says."""

    path: Path
    config: Mapping[str, Any]
    specs: Mapping[str, TensorSpec]

    @classmethod
    def of(cls, path: Path, recipe: Recipe) -> ConfigurationOnly:
        """Raises `UserError` for a config.json that cannot be read, or is another family's."""
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            name = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
            stored = dtype_name(getattr(torch, name))
        except (OSError, ValueError, AttributeError, TypeError) as error:
            raise UserError(f"{path / 'config.json'}: not readable: {error}") from None
        check_family(recipe.model.record, config, recipe.catalog)
        model = build_on_meta(recipe.model.record, config, recipe.model.options)
        specs = {n: TensorSpec(tuple(p.shape), stored) for n, p in model.named_parameters()}
        return cls(path, config, specs)

    def files(self) -> Mapping[str, bytes]:
        return {p.name: p.read_bytes() for p in sorted(self.path.iterdir()) if p.is_file()}

    def shards(self) -> Mapping[str, Mapping[str, TensorSpec]]:
        return {"model.safetensors": self.specs}

    def tensors(self, shard: str | None = None) -> Iterator[tuple[str, Tensor]]:
        raise UserError(f"{self.path} has no weights")


def measured_micro_batch(
    recipe: Recipe, checkpoint: BaseCheckpoint, progress: Progress
) -> MicroBatch | None:
    """The largest micro-batch of the run's data; None where they are not on this machine, or no
    tokenizer is.

    Raises:
        UserError: The data are wrong.
    """
    data = recipe.data.options
    if hub_data(data.path) is not None:
        return None
    if not any("tokenizer" in name or "tekken" in name for name in checkpoint.files()):
        return None
    tokenizer = load_tokenizer(checkpoint.files(), str(checkpoint.path))
    tokenizer = tokenizer.with_template(data.chat_template)
    dataset = load_dataset(recipe.data.record, data, tokenizer, progress, catalog=recipe.catalog)
    if recipe.evaluation is not None and recipe.evaluation.fraction is not None:
        dataset, _ = hold_out(dataset, recipe.evaluation, recipe.run.seed)
    model = build_on_meta(recipe.model.record, checkpoint.config, recipe.model.options)
    return largest_micro_batch(batch_plan(recipe, dataset, model), recipe)


def largest_micro_batch(plan: BatchPlan, recipe: Recipe) -> MicroBatch:
    """The one with the most tokens to compute among those that the run will see."""
    examples = plan.dataset.examples
    training = recipe.training
    most = MicroBatch((), 0)
    size = 0
    windows = plan.first_windows(training.epochs, training.max_steps)
    for rows in chain.from_iterable(windows):
        if sum(len(examples[i]) for i in rows) <= size:
            continue
        order, segments = plan.arranged(rows)
        tokens = max(parts[-1].stop for parts in segments)
        if tokens > size:
            most, size = (
                MicroBatch(
                    tuple(len(examples[i]) for i in order),
                    sum(examples[i].targets for i in order),
                    tuple(segments),
                ),
                tokens,
            )
    return most


def worst_micro_batch(recipe: Recipe) -> MicroBatch:
    """Every row as long as it may be, every token trained."""
    rows, length = recipe.training.batch_size, recipe.data.options.max_seq_len
    return MicroBatch((length,) * rows, rows * length)
