"""Streaming a checkpoint's tensors into a model that is on the meta device.

Each tensor goes from the file's memory map to its parameter on its own, quantized on the way
if its layer is; nothing holds the whole checkpoint.
Resident memory peaks at the model as stored plus one tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from lorakit.errors import UserError
from lorakit.protocols import BaseCheckpoint, Progress
from lorakit.runtime import tensors_in_own_pages

Quantize = Callable[[nn.Linear, Tensor], nn.Module]


def check_tensors(model: nn.Module, checkpoint: BaseCheckpoint) -> None:
    """Compares names and shapes of checkpoint and model, from headers alone.

    Raises:
        UserError: One message with everything that is missing, unexpected or of another shape.
    """
    stored = {n: s for shard in checkpoint.shards().values() for n, s in shard.items()}
    wanted = _parameters(model)
    tied = _tied_names(model)
    problems = [
        f"missing: {name} {list(p.shape)}" for name, p in wanted.items() if name not in stored
    ]
    for name, spec in stored.items():
        if name in wanted and tuple(wanted[name].shape) != spec.shape:
            expected = list(wanted[name].shape)
            problems.append(f"shape: {name} is {list(spec.shape)}, config.json says {expected}")
        elif name not in wanted and name not in tied and not _is_derived(name):
            problems.append(f"unexpected: {name} {list(spec.shape)}")
    if problems:
        shown = problems[:12]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        lines = "\n".join(f"  {line}" for line in shown)
        raise UserError(
            f"{checkpoint.path}: the tensors do not fit config.json "
            f"({len(problems)} problem{'s' if len(problems) > 1 else ''}):\n{lines}"
        )


def stream_weights(
    model: nn.Module,
    checkpoint: BaseCheckpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress,
    quantize: Quantize | None = None,
    kept_linears: frozenset[str] = frozenset(),
) -> None:
    """Gives every parameter of `model` its value, frozen.

    Args:
        model: On the meta device.
        checkpoint: Has all its tensors; see `check_tensors`.
        device: Where the parameters go.
        dtype: What floating-point parameters are kept in.
        progress: Counts tensors.
        quantize: Replaces each linear layer by a quantized one as its weight arrives.
        kept_linears: Dotted names that are not quantized: the head.
    """
    wanted = _parameters(model)
    total = sum(name in wanted for shard in checkpoint.shards().values() for name in shard)
    aliases = _aliases(model)
    with (
        progress.task("loading weights", total, unit="tensors") as task,
        tensors_in_own_pages(),
        torch.no_grad(),
    ):
        for name, tensor in checkpoint.tensors():
            if name not in wanted:
                continue
            owner, _, leaf = name.rpartition(".")
            linear = model.get_submodule(owner)
            if (
                quantize is not None
                and leaf == "weight"
                and isinstance(linear, nn.Linear)
                and owner not in kept_linears
            ):
                # Cast first: the scheme must not see a wider copy than would be stored.
                _set(model, owner, quantize(linear, tensor.to(device=device, dtype=dtype)))
            else:
                # Copied even where it could stay in the file's map: a file that is written over
                # while a model trains on it must not change the model.
                value = tensor.to(device=device, dtype=dtype, copy=True).contiguous()
                parameter = nn.Parameter(value, requires_grad=False)
                for full in [name, *aliases.get(name, [])]:
                    _set(model, full, parameter)
            task.advance()


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


def _tied_names(model: nn.Module) -> set[str]:
    """Second names of tied parameters; some checkpoints store those tensors as well."""
    return {alias for names in _aliases(model).values() for alias in names}


def _is_derived(name: str) -> bool:
    """Old checkpoints store RoPE's frequencies, which config.json gives already."""
    return name.endswith("rotary_emb.inv_freq")


def linear_names(model: nn.Module) -> list[str]:
    """Dotted names of all linear layers, quantized ones too, the output head last."""
    head = cast(nn.Module, model.lm_head)
    names = [n for n, m in model.named_modules() if _is_linear(m) and m is not head]
    return [*names, "lm_head"]


def _is_linear(module: nn.Module) -> bool:
    # A scheme's module need not be an nn.Linear: `dequantize` is what its record asks for.
    return isinstance(module, nn.Linear) or hasattr(module, "dequantize")
