"""Where an adapter came from: its run, its base, its tokenizer, how the base was stored."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli

from lorakit.adapters import CONFIG, TOKENIZER_FILES, SavedAdapter
from lorakit.base_model import BaseModel, open_base_model
from lorakit.catalog import Catalog
from lorakit.data.tokenizer import Tokenizer, load_tokenizer
from lorakit.errors import UserError
from lorakit.protocols import Progress
from lorakit.recipe_files import CHECKPOINTS
from lorakit.recipes import Section, read_section
from lorakit.run_directory import ADAPTER, RECIPE
from lorakit.weights.base import fetch_base


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


def open_base_of(adapter: SavedAdapter, catalog: Catalog, progress: Progress) -> BaseModel:
    """The adapter's base: where adapter_config.json says, else where the recipe had it from."""
    named = str(adapter.config.get("base_model_name_or_path") or "")
    origin = str(adapter.origin.get("model", {}).get("path", ""))
    revision = adapter.config.get("revision")
    here = os.path.exists(os.path.expanduser(named))
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


def tokenizer_of(adapter: SavedAdapter, base: BaseModel) -> Tokenizer:
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


def quantization_of(adapter: SavedAdapter | None, catalog: Catalog) -> Section | None:
    """How the base was stored while the adapter was trained; None if as it is."""
    if adapter is None or not is_quantized(adapter):
        return None
    table = _quantization_table(adapter)
    return read_section("quantization", table, catalog, str(adapter.path))


def is_quantized(adapter: SavedAdapter) -> bool:
    """Whether the base was stored by a scheme, installed or not."""
    return bool(_quantization_table(adapter))


def _quantization_table(adapter: SavedAdapter) -> Mapping[str, Any]:
    origin = {**_recipe_of_checkpoint(adapter), **adapter.origin}
    return dict(origin.get("quantization") or {})


def _recipe_of_checkpoint(adapter: SavedAdapter) -> dict[str, Any]:
    """As a checkpoint has no files of its own that would say the same; else empty."""
    return recipe_of(adapter) if adapter.path.parent.name == CHECKPOINTS else {}


def recipe_of(adapter: SavedAdapter) -> dict[str, Any]:
    """The recipe of the run that an adapter or a checkpoint lies in; empty for one on its own.

    Raises:
        UserError: It is not TOML any more.
    """
    folder = adapter.path.parent
    if folder.name == CHECKPOINTS:
        folder = folder.parent
    elif adapter.path.name != ADAPTER:
        return {}
    recipe = folder / RECIPE
    if not recipe.is_file():
        return {}
    try:
        (table,) = tomli.loads(recipe.read_text(encoding="utf-8")).values()
    except ValueError as error:
        raise UserError(f"{recipe}: no recipe in TOML: {error}") from None
    return dict(table)
