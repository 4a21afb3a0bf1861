"""What a run left behind, loaded again: for generation, evaluation and merging."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import tomli
import torch
from attrs import frozen
from torch import nn

from lorakit.adapters import (
    CONFIG,
    TOKENIZER_FILES,
    SavedAdapter,
    apply_adapter,
    check_adapter_tensors,
    check_copies,
    load_adapter_tensors,
    read_adapter,
)
from lorakit.base_model import BaseModel, load_weights, open_base_model, resolve_device
from lorakit.catalog import Catalog, load_catalog
from lorakit.data.batches import make_batch
from lorakit.data.dataset import load_dataset
from lorakit.data.tokenizer import Tokenizer, load_tokenizer
from lorakit.errors import RecipeError, UserError
from lorakit.loss import batch_loss
from lorakit.merging import merge_adapter
from lorakit.options import AdapterOptions
from lorakit.progress import TerminalProgress
from lorakit.protocols import Progress
from lorakit.recipes import Section, read_section
from lorakit.records import AdapterMethod, DatasetFormat
from lorakit.run_directory import ADAPTER, CHECKPOINTS, RECIPE
from lorakit.serving import serving_advice
from lorakit.weights.base import fetch_base


@frozen
class Trained:
    """A model with its adapter on, if it has one, in evaluation mode."""

    model: nn.Module
    tokenizer: Tokenizer
    device: torch.device
    catalog: Catalog


@frozen
class Scores:
    """Evaluation over a data file; `loss` is the mean over its trained tokens."""

    loss: float
    trained_tokens: int
    rows: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


def find_adapter(path: Path) -> Path | None:
    """The adapter directory a run, a checkpoint or an adapter directory stands for; None for
    anything else.

    Raises:
        UserError: It is a run that has no adapter yet.
    """
    if (path / CONFIG).is_file():
        return path
    if (path / ADAPTER / CONFIG).is_file():
        return path / ADAPTER
    checkpoints = sorted((path / CHECKPOINTS).glob("step-*"))
    complete = [c for c in checkpoints if (c / CONFIG).is_file()]
    if complete:
        return complete[-1]
    if (path / RECIPE).is_file():
        raise UserError(f"{path}: the run has no adapter and no checkpoint yet")
    return None


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
    directory = find_adapter(Path(path).expanduser())
    adapter = read_adapter(directory, catalog) if directory else None
    base = _open_base_of(adapter, catalog, progress) if adapter else None
    base = base or open_base_model(path, catalog, progress)
    precision = catalog.defaults("precision")[0]
    resolved = precision.resolve(device, precision.options())
    quantization = None if full_precision else _quantization_of(adapter, catalog)
    load_weights(
        base, device=device, precision=resolved, progress=progress, quantization=quantization
    )
    tokenizer = base.tokenizer
    if adapter is not None:
        names = apply_adapter(base.model, adapter.method, adapter.options, resolved.adapter)
        check_copies(adapter, base.checkpoint)
        load_adapter_tensors(base.model, names, adapter.flat, adapter.path)
        tokenizer = _tokenizer_of(adapter, base)
    base.model.eval()
    return Trained(base.model, tokenizer, device, catalog)


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
    directory = find_adapter(Path(path).expanduser())
    if directory is None:
        raise UserError(f"adapter.path: {path} is no run and no adapter directory")
    saved = read_adapter(directory, catalog)
    if saved.method is not method:
        raise UserError(f"adapter.path: {directory} is of the method {saved.method.name!r}")
    if saved.copies:
        raise UserError(f"adapter.path: {directory} brings whole layers beside the adapter's own")
    there, here = method.to_config(saved.options, names), method.to_config(options, names)
    problems = [
        f"{key}: {directory} has {there[key]!r}, the recipe comes to {here[key]!r}"
        for key in here
        # The same layers can be written in several ways; the tensors' names tell.
        if key != "target_modules" and there[key] != here[key]
    ]
    if problems:
        raise RecipeError("adapter.path", problems)
    load_adapter_tensors(model, names, saved.flat, directory)


def _open_base_of(adapter: SavedAdapter, catalog: Catalog, progress: Progress) -> BaseModel:
    """The adapter's base: where adapter_config.json says, else where the recipe had it from."""
    named = str(adapter.config.get("base_model_name_or_path") or "")
    origin = str(adapter.origin.get("model", {}).get("path", ""))
    revision = adapter.config.get("revision")
    here = Path(named).expanduser().exists()
    pinned = f"{named}@{revision}" if named and revision and not here else named
    sources = catalog.all("model source")
    reasons = []
    for path in dict.fromkeys((pinned, origin)):
        if path and any(source.claims(path) for source in sources):
            try:
                fetch_base(path, catalog, progress)
            except UserError as error:
                reasons.append(error)
                continue
            return open_base_model(path, catalog, progress)
    why = f" ({reasons[0].message})" if reasons else ""
    raise UserError(
        f"{adapter.path}: its base model {named or origin or '(not named)'} is not here{why}",
        (f"{reasons[0].fix} " if reasons else "")
        + "Put it there, or change base_model_name_or_path in adapter_config.json.",
    )


def _tokenizer_of(adapter: SavedAdapter, base: BaseModel) -> Tokenizer:
    """The one saved with the adapter; for a checkpoint, the base's with the run's template."""
    if (adapter.path / "tokenizer.json").is_file() or any(adapter.path.glob("tokenizer.model*")):
        # Not the adapter's own: beside merged weights, readers would apply it once more.
        names = [p for p in adapter.path.iterdir() if p.name.startswith(TOKENIZER_FILES)]
        files = {p.name: p.read_bytes() for p in names if p.is_file()}
        return load_tokenizer(files, str(adapter.path))
    recipe = _recipe_of_checkpoint(adapter)
    return (
        base.tokenizer.with_template(recipe["data"]["chat_template"]) if recipe else base.tokenizer
    )


def _quantization_of(adapter: SavedAdapter | None, catalog: Catalog) -> Section | None:
    """How the base was stored while the adapter was trained."""
    if adapter is None:
        return None
    table = {**_recipe_of_checkpoint(adapter), **adapter.origin}.get("quantization")
    return read_section("quantization", table, catalog, str(adapter.path)) if table else None


def _recipe_of_checkpoint(adapter: SavedAdapter) -> dict[str, Any]:
    """The recipe of the run that a checkpoint is of; empty for an adapter on its own."""
    recipe = adapter.path.parent.parent / RECIPE
    if adapter.path.parent.name != CHECKPOINTS or not recipe.is_file():
        return {}
    (table,) = tomli.loads(recipe.read_text(encoding="utf-8")).values()
    return dict(table)


@frozen
class Mergeable:
    """An adapter with its base, whose weights are on disk, found to fit each other.

    Attributes:
        adapter: As read.
        base: Its model is on the meta device, with the adapter on.
        names: The adapted layers.
    """

    adapter: SavedAdapter
    base: BaseModel
    names: list[str]

    def serving_advice(self) -> str:
        """See `lorakit.serving`."""
        return serving_advice(
            self.adapter.method,
            self.adapter.options,
            self.names,
            base=self.base.checkpoint,
            base_name=str(self.adapter.config.get("base_model_name_or_path") or self.base.path),
            adapter=self.adapter.path,
        )

    def merge(self, output: Path, progress: Progress) -> None:
        """See `lorakit.merging`."""
        merge_adapter(
            self.base.checkpoint,
            self.adapter.method,
            self.adapter.options,
            self.adapter.tensors,
            output,
            files=_tokenizer_of(self.adapter, self.base).files,
            progress=progress,
        )


def open_mergeable(path: str, progress: Progress) -> Mergeable:
    """Opens a run or an adapter to be merged.

    Raises:
        UserError: `path` is no run or adapter, or its base is not here, or does not fit it.
    """
    catalog = load_catalog()
    directory = find_adapter(Path(path).expanduser())
    if directory is None:
        raise UserError(
            f"{path} is no run and no adapter directory",
            "A run directory has recipe.toml in it, an adapter directory adapter_config.json.",
        )
    adapter = read_adapter(directory, catalog)
    base = _open_base_of(adapter, catalog, progress)
    # The model stays on the meta device: only names and shapes are compared.
    names = apply_adapter(base.model, adapter.method, adapter.options, torch.float32)
    check_copies(adapter, base.checkpoint)
    check_adapter_tensors(base.model, names, adapter.flat, adapter.path)
    return Mergeable(adapter, base, names)


def merge_trained(path: str, output: Path) -> None:
    """Merges a run or an adapter.

    Raises:
        UserError: See `open_mergeable`; or the output is taken.
        RunError: The merged model could not be written.
    """
    progress = TerminalProgress()
    open_mergeable(path, progress).merge(output, progress)


@torch.no_grad()
def evaluate(trained: Trained, data: str, form_name: str) -> Scores:
    """Loss over the trained tokens of a data file.

    Args:
        trained: The model.
        data: A `data.path`.
        form_name: The data set format.

    Raises:
        UserError: There is no such format, or the data is wrong.
    """
    form: DatasetFormat = trained.catalog.get("dataset", form_name)
    options: Any = form.options(path=data)
    progress = TerminalProgress()
    dataset = load_dataset(form, options, trained.tokenizer, progress)
    total, count = 0.0, 0
    with progress.task("evaluating", len(dataset.examples), unit="rows") as task:
        for row in range(len(dataset.examples)):
            batch = make_batch(dataset, [row]).to(trained.device)
            total += float(batch_loss(trained.model, batch))  # type: ignore[arg-type]
            count += batch.trained
            task.advance()
    return Scores(total / count, count, dataset.report.rows)
