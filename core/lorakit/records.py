"""The records plugins return: what a plugin offers, and the verb core will call.

All records are frozen attrs classes.  `name` is what a recipe writes, `summary` one line for
`lorakit plugins list`, `options` the attrs class that the rest of the recipe's section is
structured into.  Verbs receive an instance of that class.

No record imports torch; annotations only name it.  A plugin's entry-point module keeps to
that too, and imports torch inside its verbs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from lorakit.options import NoOptions

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lorakit.kernel_protocol import Kernels
    from lorakit.protocols import (
        BaseCheckpoint,
        CausalLM,
        Example,
        Logger,
        Precision,
        Progress,
        Serving,
        SnapshotStore,
    )


@frozen(kw_only=True)
class Offer:
    """What all records have in common.

    Attributes:
        name: What a recipe writes; unique within its kind.
        summary: One line, shown by `lorakit plugins list`.
        options: The attrs class of the section's remaining keys.
        default: Chosen where a recipe leaves the section out.
    """

    name: str
    summary: str
    options: type[Any] = NoOptions
    default: bool = False


@frozen(kw_only=True)
class ModelFamily(Offer):
    """A model architecture.

    Attributes:
        model_types: The `model_type` values of config.json that this family owns.
        build: `build(config, options)` returns the model on the meta device, its parameters
            named and shaped as in the Hugging Face checkpoint.  `config` is the parsed
            config.json.  Raises `UserError` for a field it cannot honour.
        vllm_architectures: Those `architectures` of config.json of which vLLM serves LoRA
            adapters; empty where that is not known.
    """

    model_types: tuple[str, ...]
    build: Callable[[Mapping[str, Any], Any], CausalLM]
    vllm_architectures: tuple[str, ...] = ()


@frozen(kw_only=True)
class AdapterMethod(Offer):
    """A way to train a few parameters beside a frozen linear layer.

    If the options class extends `lorakit.options.AdapterOptions`, training can go on from a saved
    adapter.

    Attributes:
        peft_type: The `peft_type` of adapter_config.json that this method reads and writes.
        parameter_prefix: How the names of its parameters start within a wrapped layer, which is
            how a key of an adapter file is split into layer and parameter.
        targets: `targets(options, linears)` picks, from the dotted names of the model's linear
            layers (the output head last), those to wrap.  Raises `UserError` if none match.
        wrap: `wrap(linear, options, name)` returns the module that takes the linear's place.
            It keeps the linear as `.base`; all other parameters of it are the adapter's.
        to_config: `to_config(options, names)` gives the method's part of adapter_config.json.
        from_config: `from_config(config)` gives the options back.  Raises `UserError` for a
            setting it cannot honour.
        merge: `merge(weight, tensors, options, name)` returns the weight `[out, in]` with the
            adapter folded in, in fp32; `tensors` are the adapter's for that linear.
        serving: `serving(options, names)` says whether vLLM serves such an adapter on those
            layers as it is; None where that is not known.
    """

    peft_type: str
    parameter_prefix: str
    targets: Callable[[Any, Sequence[str]], list[str]]
    wrap: Callable[[nn.Module, Any, str], nn.Module]
    to_config: Callable[[Any, Sequence[str]], dict[str, Any]]
    from_config: Callable[[Mapping[str, Any]], Any]
    merge: Callable[[torch.Tensor, Mapping[str, torch.Tensor], Any, str], torch.Tensor]
    serving: Callable[[Any, Sequence[str]], Serving] | None = None


@frozen(kw_only=True)
class QuantizationScheme(Offer):
    """A way to store a frozen linear's weight in fewer bits.

    Attributes:
        quantize: `quantize(linear, weight, options, compute_dtype)` returns the module that
            takes the place of `linear`, whose own weight is still on the meta device.  `weight`
            may lie in the file's memory map, so the module keeps no reference to it.  It has
            `in_features`, `out_features`, `bias` and `dequantize() -> [out, in]`, and passes
            gradients to its input only (`lorakit.modules.StoredLinear` is a base class that
            does).
        stored_bytes: `stored_bytes(shape, options)` gives the bytes that a weight `[out, in]` of
            that shape takes as stored, for the memory estimate.
    """

    quantize: Callable[[nn.Linear, torch.Tensor, Any, torch.dtype], nn.Module]
    stored_bytes: Callable[[tuple[int, ...], Any], int] | None = None


@frozen(kw_only=True)
class OptimizerType(Offer):
    """An optimizer.

    Attributes:
        build: `build(parameters, options)` sees the trainable parameters only; the options class
            has an `lr` field, which the schedule scales.
        state_bytes: `state_bytes(shape, itemsize, options)` gives the bytes of state kept for one
            parameter of that shape and that many bytes an element, for the memory estimate.
        notice: `notice(device, options)` gives a sentence the user should read before the run
            (something the optimizer cannot do there), or None.
    """

    build: Callable[[Sequence[torch.nn.Parameter], Any], torch.optim.Optimizer]
    state_bytes: Callable[[tuple[int, ...], int, Any], int] | None = None
    notice: Callable[[torch.device, Any], str | None] | None = None


@frozen(kw_only=True)
class PrecisionPolicy(Offer):
    """`resolve(device, options)` decides a run's dtypes; see `lorakit.protocols.Precision`."""

    resolve: Callable[[torch.device, Any], Precision]


@frozen(kw_only=True)
class CheckpointerType(Offer):
    """`open(run_directory, options)` gives the store that keeps a run's snapshots.  The
    options class extends `lorakit.options.CheckpointerOptions`."""

    open: Callable[[Path, Any], SnapshotStore]


@frozen(kw_only=True)
class LoggerType(Offer):
    """`open(run_directory, options)` gives a sink for metrics."""

    open: Callable[[Path, Any], Logger]


@frozen(kw_only=True)
class DatasetFormat(Offer):
    """A shape of data rows.

    Attributes:
        example: `example(row, options)` returns the conversation or text that a row holds, or
            raises `ValueError` saying what is wrong with it; core adds file and row.  The
            options class extends `lorakit.options.DataOptions`.
    """

    example: Callable[[Mapping[str, Any], Any], Example]


@frozen(kw_only=True)
class WeightFormat(Offer):
    """A file format of base checkpoints.

    Attributes:
        claims: Whether the local path (a directory or a file) is in this format.  Cheap: looks
            at names and magic bytes.
        open: Opens it.  Raises `UserError` naming the file that cannot be read.
    """

    claims: Callable[[Path], bool]
    open: Callable[[Path], BaseCheckpoint]


@frozen(kw_only=True)
class ModelSource(Offer):
    """A place base models come from.

    Attributes:
        claims: Whether a `model.path` is of this source.
        fetch: `fetch(path, progress)` makes it local and returns the directory or file.  A
            second call finds it in the cache and needs no network.  Raises `UserError` for a
            path that names nothing.
        examples: What such paths look like, for error messages.
        fetch_configuration: `fetch_configuration(path, progress)` makes config.json and the
            tokenizer's files local, and returns their directory, without the weights; None where
            a source has no way to.
        hub_name: `hub_name(path)` gives the hub's repository and revision that such a path
            names, which an adapter then names as its base; None where a path is no hub's.
    """

    claims: Callable[[str], bool]
    fetch: Callable[[str, Progress], Path]
    fetch_configuration: Callable[[str, Progress], Path] | None = None
    hub_name: Callable[[str], tuple[str, str | None]] | None = None
    examples: tuple[str, ...] = field(default=())


@frozen(kw_only=True)
class KernelLibrary(Offer):
    """Kernels for CPUs that have units torch does not use for fp32.

    `summary` is also what a run's log says of them.

    Attributes:
        unusable: Says why they cannot be used on this machine; None where they can.
        load: Gives the kernels, where they can be used.
    """

    unusable: Callable[[], str | None]
    load: Callable[[], Kernels]
