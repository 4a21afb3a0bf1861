"""What a run left behind, loaded again: for generation and evaluation."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, cast

import torch
from attrs import frozen
from torch import nn

from lorakit.adapter_origin import (
    find_adapter,
    open_base_of,
    quantization_of,
    recipe_of,
    tokenizer_of,
)
from lorakit.adapters import (
    SavedAdapter,
    apply_adapter,
    check_copies,
    load_adapter_tensors,
    read_adapter,
)
from lorakit.base_model import (
    BaseModel,
    load_weights,
    open_base_model,
    resolve_device,
)
from lorakit.catalog import Catalog, load_catalog
from lorakit.context import context_length
from lorakit.data.dataset import load_dataset
from lorakit.data.evaluation_set import EvaluationSet
from lorakit.data.tokenizer import Tokenizer
from lorakit.document_threads import document_threads
from lorakit.errors import RecipeError, UserError, near_path
from lorakit.foreign_names import OURS
from lorakit.kernels import choose_kernels
from lorakit.loss import batch_loss
from lorakit.options import AUTO, AdapterOptions, TrainingOptions
from lorakit.progress import TerminalProgress
from lorakit.protocols import CausalLM, Progress
from lorakit.recipes import Section, read_section
from lorakit.records import AdapterMethod, DatasetFormat
from lorakit.runtime import tune_process

TOKENS_AT_ONCE = 1024
"""That are evaluated together: many more take as long each, and more memory."""


@frozen
class Trained:
    """A model with its adapter on, if it has one, in evaluation mode.

    Attributes:
        model: On its device.
        tokenizer: With the template that training used.
        device: Where it is.
        catalog: What is installed.
        context: Tokens that the model was made for; None if its config.json does not say.
        adapter: As it was saved; None for a model.
    """

    model: nn.Module
    tokenizer: Tokenizer
    device: torch.device
    catalog: Catalog
    context: int | None = None
    adapter: SavedAdapter | None = None


@frozen
class Scores:
    """Evaluation over a data file.

    Attributes:
        loss: The mean over its trained tokens.
        trained_tokens: How many there are.
        rows: Those that have them.
        rows_cut: Those of them whose end was cut off.
        rows_left_out: Rows of the file beside them: too long, or without a trained token once
            they were cut.
        losses: What was cut or left out, each as part of a sentence.
    """

    loss: float
    trained_tokens: int
    rows: int
    rows_cut: int = 0
    rows_left_out: int = 0
    losses: tuple[str, ...] = ()

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def load_trained(path: str, device_name: str = "auto", *, full_precision: bool = False) -> Trained:
    """Loads a run, an adapter or a model.

    Args:
        path: A run directory, a checkpoint, an adapter directory, or a `model.path`.
        device_name: As in a recipe.
        full_precision: Leave a base unquantized that the adapter was trained over quantized.

    Raises:
        UserError: It is none of these, or cannot be loaded.
    """
    catalog = load_catalog()
    device = resolve_device(device_name)
    progress = TerminalProgress()
    directory = find_adapter(Path(os.path.expanduser(path)))
    adapter = read_adapter(directory, catalog) if directory else None
    tune_process(device)
    choose_kernels(AUTO, catalog, device)
    base = open_base_of(adapter, catalog, progress) if adapter else None
    base = base or _named_base(path, catalog, progress)
    precision = catalog.defaults("precision")[0]
    resolved = precision.resolve(device, precision.options())
    quantization = None if full_precision else quantization_of(adapter, catalog)
    load_weights(
        base, device=device, precision=resolved, progress=progress, quantization=quantization
    )
    tokenizer = base.tokenizer
    if adapter is not None:
        names = apply_adapter(base.model, adapter.method, adapter.options, resolved.adapter)
        check_copies(adapter, base.checkpoint)
        load_adapter_tensors(base.model, names, adapter.flat, adapter.path)
        tokenizer = tokenizer_of(adapter, base)
    base.model.eval()
    context = context_length(base.checkpoint.config)
    return Trained(base.model, tokenizer, device, catalog, context, adapter)


def _named_base(path: str, catalog: Catalog, progress: Progress) -> BaseModel:
    try:
        return open_base_model(path, catalog, progress)
    except UserError as error:
        # It was an argument, not a recipe's key.
        raise UserError(error.message.removeprefix("model.path: "), error.fix) from error


def load_start(
    model: nn.Module, names: list[str], method: AdapterMethod, options: Any, catalog: Catalog
) -> None:
    """Gives the adapter on a model the values of the one that `adapter.path` names, if any.

    Args:
        model: With the adapter on.
        names: The adapted layers.
        method: The adapter's.
        options: Its options.
        catalog: The methods there are.

    Raises:
        UserError: There is no adapter, or it has other settings or layers.
    """
    path = options.path if isinstance(options, AdapterOptions) else ""
    if not path:
        return
    directory = find_adapter(Path(os.path.expanduser(path)))
    if directory is None:
        raise UserError(
            f"adapter.path: {path} is no run and no adapter directory{near_path(Path(path))}"
        )
    saved = read_adapter(directory, catalog)
    if saved.method is not method:
        raise UserError(f"adapter.path: {directory} is of the method {saved.method.name!r}")
    if saved.copies:
        raise UserError(f"adapter.path: {directory} brings whole layers beside the adapter's own")
    there, here = method.to_config(saved.options, names), method.to_config(options, names)
    problems = [
        f"{OURS.get(key, f'adapter.{key}')}: {directory} has {there[key]!r}, the recipe comes to "
        f"{here[key]!r}"
        for key in here
        # The same layers can be written in several ways; the tensors' names tell.
        if key != "target_modules" and there[key] != here[key]
    ]
    if problems:
        raise RecipeError("adapter.path", problems)
    load_adapter_tensors(model, names, saved.flat, directory)


def data_section(trained: Trained, data: str, form_name: str | None = None) -> Section:
    """The data set format and its options for a `data.path` to evaluate over.

    Args:
        trained: The model.
        data: A `data.path`.
        form_name: The format, with its options at their defaults; None: those of the run that the
            adapter lies in, else `messages`.

    Raises:
        UserError: There is no such format, or the run's recipe is broken.
    """
    adapter = trained.adapter
    table = recipe_of(adapter).get("data") if form_name is None and adapter else None
    if adapter and table:
        # Which part of the training data was read says nothing about these.
        others = {k: v for k, v in table.items() if k not in ("path", "split", "files")}
        where = str(adapter.path)
        return read_section("dataset", {**others, "path": data}, trained.catalog, where)
    form: DatasetFormat = trained.catalog.get("dataset", form_name or "messages")
    return Section(form, form.options(path=data))


@torch.no_grad()
def evaluate(trained: Trained, data: str, form_name: str | None = None) -> Scores:
    """Loss over the trained tokens of a data file.

    Args:
        trained: The model.
        data: A `data.path`.
        form_name: The data set format, see `data_section`.

    Raises:
        UserError: There is no such format, or the data is wrong.
    """
    section = data_section(trained, data, form_name)
    progress = TerminalProgress()
    dataset = load_dataset(
        section.record,
        section.options,
        trained.tokenizer,
        progress,
        catalog=trained.catalog,
        setting="--format {}",
    )
    model = cast(CausalLM, trained.model)
    rows = EvaluationSet.packed(
        dataset,
        TOKENS_AT_ONCE,
        share_prefixes=getattr(model, "shares_prefixes", False),
        threads=document_threads(model, trained.device, TrainingOptions()),
    )
    total, count = 0.0, 0
    with progress.task("evaluating", len(dataset.examples), unit="rows") as task:
        for indices in rows.micro_batches:
            batch = rows.batch_of(indices).to(trained.device)
            total += float(batch_loss(model, batch))
            count += batch.trained
            task.advance(len(indices))
    report = dataset.report
    return Scores(
        total / count,
        count,
        len(dataset.examples),
        report.truncated,
        report.dropped + report.untrained,
        tuple(report.losses(section.options.max_seq_len)),
    )
