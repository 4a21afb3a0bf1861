"""A trained adapter with its base, ready to be merged."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from attrs import frozen

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
    check_adapter_tensors,
    check_copies,
    read_adapter,
)
from lorakit.base_model import BaseModel, quantizer
from lorakit.catalog import Catalog, load_catalog
from lorakit.data.tokenizer import Tokenizer
from lorakit.errors import UserError, near_path
from lorakit.merging import BaseWeight, merge_adapter
from lorakit.progress import TerminalProgress
from lorakit.protocols import Precision, Progress
from lorakit.recipes import Section, read_section
from lorakit.serving import serving_advice
from lorakit.weights.stream import HEAD, dequantized_base


@frozen
class Mergeable:
    """An adapter with its base, whose weights are on disk, found to fit each other.

    Attributes:
        adapter: As read.
        base: Its model is on the meta device, without the adapter.
        names: The adapted layers.
        catalog: What is installed.
    """

    adapter: SavedAdapter
    base: BaseModel
    names: list[str]
    catalog: Catalog

    @property
    def quantization(self) -> Section | None:
        """How the base was stored while the adapter was trained.

        Raises:
            UserError: The scheme is no longer installed.
        """
        return quantization_of(self.adapter, self.catalog)

    def storage(self, device: torch.device) -> torch.dtype | None:
        """What the base's weights were in when the run quantized them: by its precision, or the
        default one where the run's recipe is not here."""
        table = recipe_of(self.adapter).get("precision")
        if table is not None:
            section = read_section("precision", table, self.catalog, str(self.adapter.path))
        else:
            record = self.catalog.defaults("precision")[0]
            section = Section(record, record.options())
        precision: Precision = section.record.resolve(device, section.options)
        return precision.storage

    def dequantized_base(self, device: torch.device) -> BaseWeight:
        """What the adapter was trained beside in the place of each stored tensor: a quantized
        weight in fp32, as it is merged.

        Raises:
            UserError: The base was not quantized, or its scheme is no longer installed.
        """
        quantization = self.quantization
        if quantization is None:
            raise UserError(
                f"--base dequantized: {self.adapter.path} was not trained over a quantized base",
                "Leave out --base: it is merged into the weights it was trained beside.",
            )
        return dequantized_base(
            self.base.model,
            quantizer(quantization, torch.float32),
            device=device,
            dtype=self.storage(device),
            kept_linears=frozenset({HEAD}),
        )

    def recipe(self) -> Mapping[str, Any]:
        """The table of the run's recipe.toml; empty where the adapter is apart from its run."""
        return recipe_of(self.adapter)

    def tokenizer(self) -> Tokenizer:
        """With the template that training used."""
        return tokenizer_of(self.adapter, self.base)

    def serving_advice(self) -> str:
        """See `lorakit.serving`."""
        return serving_advice(
            self.adapter.method,
            self.adapter.options,
            self.names,
            family=self.base.family,
            base=self.base.checkpoint,
            base_name=str(self.adapter.config.get("base_model_name_or_path") or self.base.path),
            adapter=self.adapter.path,
        )

    def merge(
        self, output: Path, progress: Progress, base_weight: BaseWeight | None = None
    ) -> None:
        """See `lorakit.merging`."""
        merge_adapter(
            self.base.checkpoint,
            self.adapter.method,
            self.adapter.options,
            self.adapter.tensors,
            output,
            files=self.tokenizer().files,
            progress=progress,
            base_weight=base_weight,
        )


def open_mergeable(path: str, progress: Progress) -> Mergeable:
    """Opens a run or an adapter to be merged.

    Raises:
        UserError: `path` is no run or adapter, or its base is not here, or does not fit it.
    """
    catalog = load_catalog()
    directory = find_adapter(Path(os.path.expanduser(path)))
    if directory is None:
        raise UserError(
            f"{path} is no run and no adapter directory{near_path(Path(path))}",
            "A run directory has recipe.toml in it, an adapter directory adapter_config.json.",
        )
    adapter = read_adapter(directory, catalog)
    base = open_base_of(adapter, catalog, progress)
    # On the meta device: only names and shapes are compared.
    model = copy.deepcopy(base.model)
    names = apply_adapter(model, adapter.method, adapter.options, torch.float32)
    check_copies(adapter, base.checkpoint)
    check_adapter_tensors(model, names, adapter.flat, adapter.path)
    return Mergeable(adapter, base, names, catalog)


def merge_trained(path: str, output: Path) -> None:
    """Merges a run or an adapter.

    Raises:
        UserError: See `open_mergeable`; or the output is taken.
        RunError: The merged model could not be written.
    """
    progress = TerminalProgress()
    open_mergeable(path, progress).merge(output, progress)
