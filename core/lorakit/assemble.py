"""Everything a run is made of, out of a resolved recipe, top to bottom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from attrs import evolve, frozen
from torch import nn

from lorakit.adapters import adapter_config, apply_adapter
from lorakit.base_model import BaseModel, load_weights, open_base_model, resolve_device
from lorakit.blocks import check_block_count, checkpoint_blocks
from lorakit.compilation import check_compiler, compile_blocks
from lorakit.context import rows_notice
from lorakit.data.batches import BatchPlan
from lorakit.data.dataset import Dataset
from lorakit.data.evaluation_set import EvaluationSet, evaluation_lines, load_datasets
from lorakit.data.tokenizer import Tokenizer
from lorakit.document_threads import document_threads
from lorakit.errors import UserError
from lorakit.kernels import choose_kernels
from lorakit.loop import trainable_parameters
from lorakit.modules.low_rank import set_fused
from lorakit.offloading import ActivationOffload, offload_to_host
from lorakit.options import AUTO, TrainingOptions, mode_text
from lorakit.protocols import CausalLM, Precision, Progress
from lorakit.recipes import Recipe
from lorakit.results import check_room_for_merged
from lorakit.run_directory import ADAPTER
from lorakit.runtime import tune_process
from lorakit.serving import serving_advice
from lorakit.trained import load_start
from lorakit.weights.base import base_name

if TYPE_CHECKING:
    from lorakit.estimate.rehearsal import MicroBatch


@frozen
class Run:
    """Everything a run is made of, before its first step.

    Attributes:
        recipe: With its output decided.
        device: Where it runs.
        precision: Its dtypes.
        base: The base model, with its adapter on.
        tokenizer: With the template training uses.
        adapted: Dotted names of the adapted layers.
        dataset: What is trained on, tokenized.
        evaluation: What it is evaluated over, if anything.
        plan: The order of the data.
        total_steps: Optimizer steps of the whole run.
        notices: What the user should read before it starts.
    """

    recipe: Recipe
    device: torch.device
    precision: Precision
    base: BaseModel
    tokenizer: Tokenizer
    adapted: list[str]
    dataset: Dataset
    evaluation: EvaluationSet | None
    plan: BatchPlan
    total_steps: int
    notices: list[str]

    @property
    def parameters(self) -> tuple[int, int]:
        """Trained parameters, and all."""
        trained = sum(p.numel() for p in trainable_parameters(self.base.model))
        return trained, trained + self.base.parameters

    def snapshot_config(self) -> dict[str, Any]:
        """adapter_config.json."""
        adapter, path = self.recipe.adapter, self.recipe.model.options.path
        name, revision = base_name(path, self.base.path, self.recipe.catalog)
        return adapter_config(
            adapter.record, adapter.options, self.adapted, name, revision=revision
        )

    def serving_advice(self) -> str:
        """See `lorakit.serving`."""
        adapter, path = self.recipe.adapter, self.recipe.model.options.path
        return serving_advice(
            adapter.record,
            adapter.options,
            self.adapted,
            family=self.base.family,
            base=self.base.checkpoint,
            base_name=base_name(path, self.base.path, self.recipe.catalog)[0],
            adapter=self.recipe.output / ADAPTER,
        )


def assemble(
    recipe: Recipe, progress: Progress, *, weights: bool = True, check_memory: bool = False
) -> Run:
    """Builds the run: data, meta model, streamed weights, adapter.

    Args:
        recipe: Resolved.
        progress: Shows what takes long.
        weights: False leaves the base model on the meta device, for a dry run.
        check_memory: Refuse a run that cannot fit, before its weights are loaded.
    """
    device = resolve_device(recipe.run.device)
    if recipe.training.compile:
        check_compiler(device)
    precision = recipe.precision.record.resolve(device, recipe.precision.options)
    base = open_base_model(recipe.model.options.path, recipe.catalog, progress, family=recipe.model)
    check_block_count(base.causal_lm, recipe.training.checkpointed_blocks)
    check_room_for_merged(recipe, base.checkpoint)
    data = recipe.data.options
    tokenizer = base.tokenizer.with_template(data.chat_template)
    dataset, evaluated = load_datasets(recipe, tokenizer, progress)
    for rows in (dataset, *([evaluated] if evaluated else [])):
        _check_ids(rows, int(base.causal_lm.lm_head.out_features), recipe.model.options.path)
    plan = batch_plan(recipe, dataset, base.model)
    # Before anything is estimated: they need memory.
    kernels = choose_kernels(recipe.training.kernels, recipe.catalog, device)
    tuned = tune_process(device)
    largest = _largest_micro_batch(plan, recipe)
    if recipe.training.join_micro_batches:
        # No more than the largest by itself: the memory of a run stays what it is.
        plan.join_limits = largest.tokens, largest.trained
    training = _with_mode(recipe, base, largest, device, precision).training
    if check_memory:
        from lorakit.estimate.check import check_that_it_fits

        sized = evolve(recipe, training=training)
        check_that_it_fits(sized, base.checkpoint, largest, device, precision)
    if weights:
        load_weights(
            base,
            device=device,
            precision=precision,
            progress=progress,
            quantization=recipe.quantization,
        )
    # From here on every random number follows from the seed: the adapter's start, dropout.
    torch.manual_seed(recipe.run.seed)
    adapter = recipe.adapter
    adapted = apply_adapter(base.model, adapter.record, adapter.options, precision.adapter)
    if weights:
        load_start(base.model, adapted, adapter.record, adapter.options, recipe.catalog)
    base.model.train()
    plan.threads = document_threads(base.causal_lm, device, training)
    evaluation = _evaluation_set(evaluated, largest.tokens, plan) if evaluated else None
    offload = _arrange_blocks(base.causal_lm, training, device)
    set_fused(training.fused)
    total = sum(1 for _ in plan.first_windows(training.epochs, training.max_steps))
    lengths = [*dataset.report.lengths, *(evaluated.report.lengths if evaluated else [])]
    long = rows_notice(lengths, base.checkpoint.config, data.max_seq_len)
    said = (long, tuned, *kernels, precision.notice, _optimizer_notice(recipe, device))
    notices = [n for n in said if n]
    if plan.threads > 1:
        notices.append(
            f"process: documents of a micro-batch are shared out over {plan.threads} threads "
            "where that can be done evenly (LORAKIT_TUNE=0 turns this off)"
        )
    if recipe.training.activation_checkpointing == AUTO:
        chosen = mode_text(str(training.activation_checkpointing), training.checkpointed_blocks)
        notices.append(f"activation checkpointing: {chosen}, the fastest that fits")
    if training.activation_offloading and offload is None:
        notices.append(
            f"training.activation_offloading: changes nothing, for on {device.type} activations "
            "are in host memory already"
        )
    if recipe.schedule.warmup_steps >= total:
        notices.append(
            f"schedule.warmup_steps: {recipe.schedule.warmup_steps} is not less than the run's "
            f"{total} steps; the learning rate never reaches its peak. schedule.warmup_ratio "
            "follows the run's length."
        )
    return Run(
        recipe=recipe,
        device=device,
        precision=precision,
        base=base,
        tokenizer=tokenizer,
        adapted=adapted,
        dataset=dataset,
        evaluation=evaluation,
        plan=plan,
        total_steps=total,
        notices=notices,
    )


def _check_ids(dataset: Dataset, vocabulary: int, path: str) -> None:
    """Every token has a row in the embedding: else the first step would fail, minutes later."""
    for example, where in zip(dataset.examples, dataset.where, strict=True):
        if max(example.ids) >= vocabulary:
            raise UserError(
                f"model.path: {path}: its tokenizer gives token {max(example.ids)} for {where}, "
                f"but the model has only {vocabulary:,}",
                "Put the tokenizer that the model was trained with beside its weights.",
            )


def _evaluation_set(dataset: Dataset, tokens: int, plan: BatchPlan) -> EvaluationSet:
    """As much at a time as training takes: no more memory, for lack of a backward pass."""
    return EvaluationSet.packed(
        dataset, tokens, share_prefixes=plan.share_prefixes, threads=plan.threads
    )


def batch_plan(recipe: Recipe, dataset: Dataset, model: nn.Module) -> BatchPlan:
    """The order of a recipe's data, for a model of its family."""
    training, data = recipe.training, recipe.data.options
    return BatchPlan(
        dataset=dataset,
        seed=recipe.run.seed,
        batch_size=training.batch_size,
        window=training.gradient_accumulation_steps,
        packed_length=data.max_seq_len if data.packed else 0,
        shuffle=data.shuffle,
        share_prefixes=training.share_prefixes and getattr(model, "shares_prefixes", False),
    )


def _arrange_blocks(
    model: CausalLM, training: TrainingOptions, device: torch.device
) -> ActivationOffload | None:
    """Compiles blocks and checkpoints their activations, as the recipe says; returns what moves
    those to the host, if anything does."""
    offload = offload_to_host(device) if training.activation_offloading else None
    if training.compile:
        compile_blocks(model)
    mode, count = str(training.activation_checkpointing), training.checkpointed_blocks
    checkpoint_blocks(model, mode, offload, count=count, compiled=training.compile)
    return offload


def _with_mode(
    recipe: Recipe,
    base: BaseModel,
    largest: MicroBatch,
    device: torch.device,
    precision: Precision,
) -> Recipe:
    if recipe.training.activation_checkpointing != AUTO:
        return recipe
    from lorakit.estimate.check import with_checkpointing_chosen

    return with_checkpointing_chosen(recipe, base.checkpoint, largest, device, precision)


def _largest_micro_batch(plan: BatchPlan, recipe: Recipe) -> MicroBatch:
    # The estimate assembles recipes too: imported when both are there.
    from lorakit.estimate.subject import largest_micro_batch

    return largest_micro_batch(plan, recipe)


def _optimizer_notice(recipe: Recipe, device: torch.device) -> str | None:
    record = recipe.optimizer.record
    notice: str | None = record.notice(device, recipe.optimizer.options) if record.notice else None
    return notice


def describe(run: Run) -> list[str]:
    """What is about to happen, a line each."""
    trained, everything = run.parameters
    name = run.recipe.adapter.name
    training, data = run.recipe.training, run.recipe.data.options
    evaluation = []
    if run.recipe.evaluation is not None and run.evaluation is not None:
        evaluation = evaluation_lines(
            run.recipe.evaluation, data, run.evaluation.dataset, run.dataset
        )
    return [
        f"model: {run.base.path}, {run.base.family.name}, {run.device}",
        f"{name}: training {trained:,} of {everything:,} parameters "
        f"({trained / everything:.2%}), in {len(run.adapted)} linear layers",
        run.dataset.report.sentence(data.max_seq_len),
        *evaluation,
        f"run: {run.total_steps:,} steps of {training.batch_size} x "
        f"{training.gradient_accumulation_steps} rows -> {run.recipe.output}",
        *run.notices,
    ]
