"""Finding and opening the base model a recipe or an adapter names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.catalog import Catalog
from lorakit.errors import UserError, listing, near_path
from lorakit.protocols import BaseCheckpoint, Progress
from lorakit.records import ModelFamily, ModelSource


def source_of(path: str, catalog: Catalog) -> ModelSource:
    """The source a `model.path` is of.

    Raises:
        UserError: None claims it.
    """
    sources = catalog.all("model source")
    claiming: list[ModelSource] = [source for source in sources if source.claims(path)]
    if not claiming:
        examples = listing([e for source in sources for e in source.examples])
        raise UserError(
            f"model.path: {path!r} is no directory or file here{near_path(Path(path))}, and of no "
            "other model source",
            f"Such paths look like: {examples}",
        )
    return claiming[0]


def fetch_base(path: str, catalog: Catalog, progress: Progress) -> Path:
    """Makes a `model.path` local.

    Raises:
        UserError: No source claims it, or its source cannot get it.
    """
    return source_of(path, catalog).fetch(path, progress)


def base_name(path: str, local: Path, catalog: Catalog) -> tuple[str, str | None]:
    """What an adapter calls its base model, and the base's revision: the hub's name for it if
    it came from there, so that it is found on another machine too; else the local path."""
    for source in catalog.all("model source"):
        if source.hub_name is not None and source.claims(path):
            name, revision = source.hub_name(path)
            return name, revision
    return str(local), None


def open_base(path: Path, catalog: Catalog) -> BaseCheckpoint:
    """Opens a local base checkpoint in whichever format it has.

    Raises:
        UserError: No format claims it, or it cannot be read.
    """
    for form in catalog.all("weight format"):
        if form.claims(path):
            return form.open(path)
    formats = listing(catalog.names("weight format"))
    if path.is_dir() and not (path / "config.json").exists():
        raise UserError(
            f"model.path: {path} has no config.json",
            f"Expected a Hugging Face model directory, or another of: {formats}.",
        )
    raise UserError(
        f"model.path: {path} holds no weights in a known format (known: {formats})",
        "A Hugging Face model directory holds config.json and model.safetensors, or shards of it.",
    )


def family_of(config: Mapping[str, Any], catalog: Catalog, where: Path) -> ModelFamily:
    """The family that owns a config.json's `model_type`.

    Raises:
        UserError: None does.
    """
    model_type = config.get("model_type")
    for family in catalog.all("model family"):
        if model_type in family.model_types:
            found: ModelFamily = family
            return found
    known = listing(sorted({t for f in catalog.all("model family") for t in f.model_types}))
    raise UserError(
        f"{where}: no installed plugin builds model_type {model_type!r} (there is: {known})",
        f"A plugin for it would be called lorakit-{model_type}; `lorakit plugins list` shows all.",
    )


def check_family(family: ModelFamily, config: Mapping[str, Any], catalog: Catalog) -> None:
    """Refuses a checkpoint that another family owns.

    Raises:
        UserError: `config` is not of this family.
    """
    model_type = config.get("model_type")
    if model_type in family.model_types:
        return
    owner = next((f.name for f in catalog.all("model family") if model_type in f.model_types), None)
    raise UserError(
        f"model.name: {family.name!r} builds model_type {listing(family.model_types)}, but the "
        f"checkpoint's config.json says {model_type!r}",
        f'Set model.name to "{owner}".' if owner else "No installed plugin builds that.",
    )
