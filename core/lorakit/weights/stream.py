"""Streaming a checkpoint's tensors into a model that is on the meta device.

Each tensor goes from the file's memory map to its parameter on its own, quantized on the way
if its layer is; nothing holds the whole checkpoint.
Resident memory peaks at the model as stored plus one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from lorakit.errors import UserError
from lorakit.protocols import BaseCheckpoint, Progress
from lorakit.runtime import tensors_in_own_pages
from lorakit.weights.dtypes import NOT_WEIGHTS

_QUANTIZED_ENDINGS = (
    *(".qweight", ".qzeros", ".g_idx"),  # GPTQ, AWQ
    *(".weight.absmax", ".weight.quant_map", ".SCB"),  # bitsandbytes
    *(".weight_packed", ".weight_scale", ".weight_scale_inv"),  # compressed-tensors, FP8
    *("_blocks", "_scales"),  # MXFP4
)

Quantize = Callable[[nn.Linear, Tensor], nn.Module]
HEAD = "lm_head"
"""The output projection, which stays as stored when the linear layers are quantized."""


def check_tensors(model: nn.Module, checkpoint: BaseCheckpoint) -> None:
    """Compares names, shapes and dtypes of checkpoint and model, from headers alone.

    Raises:
        UserError: One message with everything that is missing, unexpected, of another shape, or
            of a dtype that a weight cannot have.
    """
    stored = {n: s for shard in checkpoint.shards().values() for n, s in shard.items()}
    wanted = _parameters(model)
    first = _first_names(model)
    there = {first.get(name, name) for name in stored}
    problems = [
        f"missing: {name} {list(p.shape)}" for name, p in wanted.items() if name not in there
    ]
    for name, spec in stored.items():
        parameter = wanted.get(first.get(name, name))
        if parameter is None:
            if not _is_derived(name):
                problems.append(f"unexpected: {name} {list(spec.shape)}")
        elif tuple(parameter.shape) != spec.shape:
            expected = list(parameter.shape)
            problems.append(f"shape: {name} is {list(spec.shape)}, config.json says {expected}")
        elif spec.dtype in NOT_WEIGHTS:
            problems.append(f"dtype: {name} is stored as {spec.dtype}, a weight is floating-point")
    if problems:
        shown = problems[:12]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        lines = "\n".join(f"  {line}" for line in shown)
        raise UserError(
            f"{checkpoint.path}: the tensors do not fit config.json "
            f"({len(problems)} problem{'s' if len(problems) > 1 else ''}):\n{lines}"
        )


def check_not_quantized(checkpoint: BaseCheckpoint) -> None:
    """Refuses a checkpoint that GPTQ, AWQ, bitsandbytes or the like has been over.

    Raises:
        UserError: It is quantized; `check_tensors` would have a line for each of its tensors.
    """
    stored = [name for shard in checkpoint.shards().values() for name in shard]
    settings = checkpoint.config.get("quantization_config")
    method = settings.get("quant_method", "unknown") if isinstance(settings, Mapping) else None
    marks = [name for name in stored if name.endswith(_QUANTIZED_ENDINGS)]
    if settings or marks:
        how = f"({method}) " if method else ""
        seen = f"it stores {marks[0]}" if marks else "config.json has a quantization_config"
        raise UserError(
            f"{checkpoint.path}: quantized already {how}and cannot be trained from: {seen}",
            "Take the model it was made from, in bf16 or fp16; a recipe's quantization stores "
            "that in fewer bits while it loads.",
        )


def stream_weights(
    model: nn.Module,
    checkpoint: BaseCheckpoint,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    progress: Progress,
    quantize: Quantize | None = None,
    kept_linears: frozenset[str] = frozenset(),
) -> None:
    """Gives every parameter of `model` its value, frozen.

    Args:
        model: On the meta device.
        checkpoint: Has all its tensors; see `check_tensors`.
        device: Where the parameters go.
        dtype: What floating-point parameters are kept in; None keeps each as it is stored.
        progress: Counts tensors.
        quantize: Replaces each linear layer by a quantized one as its weight arrives.
        kept_linears: Dotted names that are not quantized: the head.
    """
    wanted = _parameters(model)
    first = _first_names(model)
    stored = {name for shard in checkpoint.shards().values() for name in shard}
    # Of a tied parameter that is stored under several names, the first is read.
    read = {n: first.get(n, n) for n in stored if n in wanted or first.get(n) not in stored}
    read = {name: target for name, target in read.items() if target in wanted}
    aliases = _aliases(model)
    with (
        progress.task("loading weights", len(read), unit="tensors") as task,
        tensors_in_own_pages(),
        torch.no_grad(),
    ):
        for stored_name, tensor in checkpoint.tensors():
            name = read.get(stored_name)
            if name is None:
                continue
            linear = _linear_of(model, name, kept_linears) if quantize else None
            if quantize is not None and linear is not None:
                # Cast first: the scheme must not see a wider copy than would be stored.
                weight = tensor.to(device=device, dtype=dtype)
                quantized = _quantized(quantize, linear, weight, name)
                _set(model, name.removesuffix(".weight"), quantized)
            else:
                # Copied even where it could stay in the file's map: a file that is written over
                # while a model trains on it must not change the model.
                value = tensor.to(device=device, dtype=dtype, copy=True).contiguous()
                parameter = nn.Parameter(value, requires_grad=False)
                for full in [name, *aliases.get(name, [])]:
                    _set(model, full, parameter)
            task.advance()


def dequantized_base(
    model: nn.Module,
    quantize: Quantize,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    kept_linears: frozenset[str] = frozenset(),
) -> Callable[[str, Tensor], Tensor]:
    """What a model that `stream_weights` quantized computes with, tensor by tensor.

    Args:
        model: On the meta device, without an adapter.
        quantize: As there, and so are the others.
        device: Where the quantization is done.
        dtype: What a weight is in when it is quantized; None: what it is stored in.
        kept_linears: Those that are not.

    Returns:
        `(name, stored) -> tensor`: a quantized linear layer's weight `[out, in]` dequantized
        again, on the CPU; any other tensor as it is stored.
    """
    parameters = _parameters(model)

    def weight(name: str, stored: Tensor) -> Tensor:
        linear = _linear_of(model, name, kept_linears) if name in parameters else None
        if linear is None:
            return stored
        with torch.no_grad():
            module = _quantized(quantize, linear, stored.to(device=device, dtype=dtype), name)
            return cast(Tensor, cast(Any, module).dequantize()).cpu()

    return weight


def _linear_of(model: nn.Module, name: str, kept: frozenset[str]) -> nn.Linear | None:
    """The linear layer whose weight the tensor of that name is, if it is to be quantized."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    found = leaf == "weight" and isinstance(module, nn.Linear) and owner not in kept
    return cast(nn.Linear, module) if found else None


def _quantized(quantize: Quantize, linear: nn.Linear, weight: Tensor, name: str) -> nn.Module:
    try:
        return quantize(linear, weight)
    except UserError as error:
        raise UserError(f"{name}: {error.message}", error.fix) from None


def _set(model: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, value)


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Each parameter once: of a tied pair, the name met first (the embedding's)."""
    return dict(model.named_parameters(remove_duplicate=True))


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Name -> the other names of the same parameter."""
    first: dict[int, str] = {}
    found: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            found.setdefault(known, []).append(name)
    return found


def _first_names(model: nn.Module) -> dict[str, str]:
    """Second name of a tied parameter -> its first.  A checkpoint may store either, or both."""
    return {alias: name for name, names in _aliases(model).items() for alias in names}


def _is_derived(name: str) -> bool:
    """Old checkpoints store RoPE's frequencies, which config.json gives already."""
    return name.endswith("rotary_emb.inv_freq")


def linear_names(model: nn.Module) -> list[str]:
    """Dotted names of all linear layers, quantized ones too, the output head last."""
    head = cast(nn.Module, model.lm_head)
    names = [n for n, m in model.named_modules() if _is_linear(m) and m is not head]
    return [*names, HEAD]


def _is_linear(module: nn.Module) -> bool:
    # A scheme's module need not be an nn.Linear: `dequantize` is what its record asks for.
    return isinstance(module, nn.Linear) or hasattr(module, "dequantize")
