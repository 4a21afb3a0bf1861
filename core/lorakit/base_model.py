"""A base model in memory, from its path: the part that training, generation and merging share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from attrs import frozen
from torch import nn

from lorakit.catalog import Catalog
from lorakit.data.tokenizer import Tokenizer, load_tokenizer
from lorakit.errors import UserError
from lorakit.modules.narrow import compute_in
from lorakit.options import check_device
from lorakit.protocols import BaseCheckpoint, CausalLM, Precision, Progress
from lorakit.recipes import Section
from lorakit.records import ModelFamily
from lorakit.weights.base import check_family, family_of, fetch_base, open_base
from lorakit.weights.stream import (
    HEAD,
    Quantize,
    check_not_quantized,
    check_tensors,
    linear_names,
    stream_weights,
)


@frozen
class BaseModel:
    """An opened base model; its weights are on disk until `load_weights`.

    Attributes:
        checkpoint: The files.
        family: Builds the model.
        model: On the meta device at first.
        tokenizer: Its tokenizer.
        parameters: How many numbers its weights are, however they will be stored.
    """

    checkpoint: BaseCheckpoint
    family: ModelFamily
    model: nn.Module
    tokenizer: Tokenizer
    parameters: int

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def causal_lm(self) -> CausalLM:
        return cast(CausalLM, self.model)


def open_base_model(
    path: str,
    catalog: Catalog,
    progress: Progress,
    *,
    family: Section | None = None,
) -> BaseModel:
    """Fetches, opens and checks a base model, and builds it on the meta device.

    Args:
        path: A `model.path`.
        catalog: The sources, formats and families there are.
        progress: Shows what takes long.
        family: As a recipe names it; None takes the one that owns the checkpoint.

    Raises:
        UserError: Anything about the path, its files or their fit is wrong.
    """
    checkpoint = open_base(fetch_base(path, catalog, progress), catalog)
    if family is None:
        record = family_of(checkpoint.config, catalog, checkpoint.path)
        options = record.options(path=path)
    else:
        record, options = family.record, family.options
        check_family(record, checkpoint.config, catalog)
    check_not_quantized(checkpoint)
    model = build_on_meta(record, checkpoint.config, options)
    check_tensors(model, checkpoint)
    tokenizer = load_tokenizer(checkpoint.files(), str(checkpoint.path))
    parameters = sum(p.numel() for p in model.parameters())
    return BaseModel(checkpoint, record, model, tokenizer, parameters)


def build_on_meta(family: ModelFamily, config: Any, options: Any) -> nn.Module:
    """The family's model without memory for its weights."""
    with torch.device("meta"):
        return cast(nn.Module, family.build(config, options))


def load_weights(
    base: BaseModel,
    *,
    device: torch.device,
    precision: Precision,
    progress: Progress,
    quantization: Section | None = None,
) -> None:
    """Streams the weights into the model, frozen, quantized as they arrive.  Those that are
    stored in another dtype than they are computed with are widened where they are used.

    Raises:
        UserError: The model has nothing to quantize, or a weight cannot be.
    """
    quantize = None
    if quantization is not None:
        quantize = quantizer(quantization, precision.compute)
        if linear_names(base.model) == [HEAD]:
            raise UserError(
                f"quantization: {base.path} has no linear layer but its head, which is never "
                "quantized",
                "Leave [quantization] out of the recipe.",
            )
    stream_weights(
        base.model,
        base.checkpoint,
        device=device,
        dtype=precision.storage,
        progress=progress,
        quantize=quantize,
        kept_linears=frozenset({HEAD}),
    )
    if precision.storage is None:
        _widen_unusual(base.model)
    compute_in(base.model, precision.compute)


def _widen_unusual(model: nn.Module) -> None:
    """Weights kept as they are stored are in fp32, bf16 or fp16: of others, torch knows too few
    operations, or they would take more memory."""
    for parameter in model.parameters():
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def quantizer(quantization: Section, compute: torch.dtype) -> Quantize:
    """`(linear, weight) -> module`: the scheme with its options, for products in a dtype."""
    record, options = quantization.record, quantization.options

    def quantize(linear: nn.Linear, weight: torch.Tensor) -> nn.Module:
        module: nn.Module = record.quantize(linear, weight, options, compute)
        return module

    return quantize


def resolve_device(name: str) -> torch.device:
    """The device a recipe names; `auto` takes the fastest there is.

    Raises:
        UserError: No device is called so, or this machine has none.
    """
    try:
        check_device(None, None, name)
    except ValueError as error:
        raise UserError(f"device: {error}") from None
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind, _, index = name.partition(":")
    there = {
        "cpu": 1,
        "mps": int(torch.backends.mps.is_available()),
        "cuda": torch.cuda.device_count(),
    }[kind]
    # Compared before torch reads it, which wraps or refuses large ones.
    if int(index or 0) >= there:
        raise UserError(f"device: this machine has no {name}", 'Set device = "auto" or "cpu".')
    return torch.device(name)
