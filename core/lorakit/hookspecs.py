"""The hooks a plugin may implement: the whole surface between lorakit and its plugins.

Every hook but the last takes no argument and returns a list of records (see
`lorakit.records`).  Core files the records in one registry per kind; nothing is called back
into a plugin while it registers, and no hook runs inside the training loop.

This module imports nothing at run time but pluggy, so that reading it costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorakit.recipes import Recipe
    from lorakit.records import (
        AdapterMethod,
        CheckpointerType,
        DatasetFormat,
        KernelLibrary,
        LoggerType,
        ModelFamily,
        ModelSource,
        OptimizerType,
        PrecisionPolicy,
        QuantizationScheme,
        WeightFormat,
    )

GROUP = "lorakit"
"""The entry-point group plugins are found in, and pluggy's project name."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def lorakit_model_families() -> Sequence[ModelFamily]:
    """Model architectures: each builds a model on the meta device from a config.json."""
    raise NotImplementedError


@hookspec
def lorakit_adapters() -> Sequence[AdapterMethod]:
    """Adapter methods: each wraps an `nn.Linear`, and saves, loads and merges what it trained."""
    raise NotImplementedError


@hookspec
def lorakit_quantizations() -> Sequence[QuantizationScheme]:
    """Quantization schemes: each stores a frozen linear's weight in fewer bits."""
    raise NotImplementedError


@hookspec
def lorakit_optimizers() -> Sequence[OptimizerType]:
    """Optimizers: each is built over the trainable parameters."""
    raise NotImplementedError


@hookspec
def lorakit_precisions() -> Sequence[PrecisionPolicy]:
    """Precision policies: which dtypes a run stores and computes in on a given device."""
    raise NotImplementedError


@hookspec
def lorakit_checkpointers() -> Sequence[CheckpointerType]:
    """Checkpointers: each saves, lists and loads the snapshots of a run."""
    raise NotImplementedError


@hookspec
def lorakit_loggers() -> Sequence[LoggerType]:
    """Loggers: metric sinks; a recipe may use any number of them at once."""
    raise NotImplementedError


@hookspec
def lorakit_datasets() -> Sequence[DatasetFormat]:
    """Data set formats: each turns a row of a data file into a conversation or a text."""
    raise NotImplementedError


@hookspec
def lorakit_weight_formats() -> Sequence[WeightFormat]:
    """Weight formats: each streams a base checkpoint's tensors under Hugging Face names."""
    raise NotImplementedError


@hookspec
def lorakit_model_sources() -> Sequence[ModelSource]:
    """Model sources: each turns a `model.path` it recognizes into a local path."""
    raise NotImplementedError


@hookspec
def lorakit_kernels() -> Sequence[KernelLibrary]:
    """Kernels: each computes fp32 products on CPUs with units that torch does not use for them."""
    raise NotImplementedError


@hookspec
def lorakit_recipe_problems(recipe: Recipe) -> Sequence[str]:
    """Rules across sections: what is wrong with `recipe`, one sentence each, or an empty list.

    Called after every section has been structured on its own.  A sentence starts with the key
    it is about: `optimizer.name: paged optimizers page on CUDA only`.
    """
    raise NotImplementedError
