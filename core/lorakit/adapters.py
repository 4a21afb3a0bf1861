"""Adapters on a model, and in files in PEFT's format.

Core knows only this of an adapter: its modules stand where linear layers stood, and all their
parameters but those of `.base` are trained.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from attrs import field, frozen
from torch import Tensor, nn

from lorakit import __version__
from lorakit.atomic import replaced_directory, write_bytes
from lorakit.catalog import Catalog
from lorakit.errors import UserError, listing
from lorakit.protocols import BaseCheckpoint
from lorakit.records import AdapterMethod
from lorakit.weights.stream import linear_names

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
OWN = "lorakit.json"
"""lorakit's own data beside an adapter; adapter_config.json has PEFT's keys only."""
TOKENIZER_FILES = ("tokenizer", "special_tokens", "chat_template", "generation_")
"""How the names of the files start that an adapter directory holds for its tokenizer."""
PREFIX = "base_model.model."
"""What PEFT puts before a module's Hugging Face name."""
PEFT_VERSION = "0.21.2"
"""The PEFT release whose format is written, and is tested against."""


@frozen
class SavedAdapter:
    """An adapter as read from a directory.

    Attributes:
        path: The directory.
        method: The adapter method that reads it.
        options: That method's options.
        config: adapter_config.json.
        tensors: By linear layer's dotted name, then by the name within the adapter.
        origin: lorakit.json, or an empty mapping for an adapter lorakit did not write.
        copies: The base's own tensors by their names, which PEFT stores beside an adapter on
            the head; see `check_copies`.
    """

    path: Path
    method: AdapterMethod
    options: Any
    config: Mapping[str, Any]
    tensors: Mapping[str, Mapping[str, Tensor]]
    origin: Mapping[str, Any]
    copies: Mapping[str, Tensor] = field(factory=dict)

    @property
    def flat(self) -> dict[str, Tensor]:
        """The tensors under PEFT's keys."""
        return {
            f"{PREFIX}{layer}.{suffix}": tensor
            for layer, tensors in self.tensors.items()
            for suffix, tensor in tensors.items()
        }


def apply_adapter(
    model: nn.Module, method: AdapterMethod, options: Any, dtype: torch.dtype
) -> list[str]:
    """Wraps the linear layers that the options target, freezes the rest.

    Args:
        model: With its weights loaded.
        method: The adapter method.
        options: Its options.
        dtype: Of the adapter's parameters.

    Returns:
        The dotted names of the wrapped layers.

    Raises:
        UserError: A target matches nothing, or is a head that shares the embedding's weight.
    """
    names = method.targets(options, linear_names(model))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in names:
        if _is_shared(model, model.get_submodule(name)):
            raise UserError(
                f"adapter.targets: {name} shares its weight with the embedding, which an adapter "
                "on it would part",
                "Leave it out of adapter.targets.",
            )
        wrap_linear(model, name, method, options, dtype)
    return names


def wrap_linear(
    module: nn.Module,
    name: str,
    method: AdapterMethod,
    options: Any,
    dtype: torch.dtype,
    *,
    prefix: str = "",
) -> nn.Module:
    """Puts an adapter around one linear layer of a module, and returns it.

    Args:
        module: A model, or the part of one whose names in the model start with `prefix`.
        name: The linear's dotted name in the module.
        method: The adapter method.
        options: Its options.
        dtype: Of the adapter's parameters.
        prefix: Completes the name for the method.
    """
    parent, _, child = name.rpartition(".")
    owner = module.get_submodule(parent)
    linear = owner.get_submodule(child)
    wrapped = method.wrap(linear, options, prefix + name)
    # A quantized layer may keep all it has in buffers.
    device = next(chain(linear.parameters(), linear.buffers())).device
    for suffix, parameter in _own_parameters(wrapped).items():
        place, _, attribute = suffix.rpartition(".")
        # A new one: `.data` cannot go to the meta device, where a dry run leaves the base.
        moved = nn.Parameter(parameter.detach().to(device=device, dtype=dtype))
        setattr(wrapped.get_submodule(place), attribute, moved)
    setattr(owner, child, wrapped)
    return wrapped


def _is_shared(model: nn.Module, linear: nn.Module) -> bool:
    weight = getattr(linear, "weight", None)
    return any(
        isinstance(module, nn.Embedding) and module.weight is weight for module in model.modules()
    )


def _own_parameters(wrapped: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in wrapped.named_parameters() if not n.startswith("base.")}


def adapted_modules(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, nn.Module]]:
    """The wrapped layers by their dotted names."""
    for name in names:
        yield name, model.get_submodule(name)


def adapter_tensors(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """The adapter's parameters under PEFT's keys, detached and on the CPU."""
    return {
        f"{PREFIX}{name}.{suffix}": parameter.detach().cpu()
        for name, wrapped in adapted_modules(model, names)
        for suffix, parameter in _own_parameters(wrapped).items()
    }


@torch.no_grad()
def load_adapter_tensors(
    model: nn.Module, names: Sequence[str], tensors: Mapping[str, Tensor], where: Path
) -> None:
    """Copies tensors under PEFT's keys into the wrapped layers.

    Raises:
        UserError: See `check_adapter_tensors`.
    """
    for key, parameter in check_adapter_tensors(model, names, tensors, where).items():
        parameter.copy_(tensors[key])


def check_adapter_tensors(
    model: nn.Module, names: Sequence[str], tensors: Mapping[str, Tensor], where: Path
) -> dict[str, nn.Parameter]:
    """The parameters of the wrapped layers under PEFT's keys, if each has its tensor.

    Raises:
        UserError: A key is missing, unexpected, or of another shape; the message lists them.
    """
    wanted = {
        f"{PREFIX}{name}.{suffix}": parameter
        for name, wrapped in adapted_modules(model, names)
        for suffix, parameter in _own_parameters(wrapped).items()
    }
    problems = [f"missing: {key}" for key in wanted if key not in tensors]
    problems += [f"unexpected: {key}" for key in tensors if key not in wanted]
    problems += [
        f"shape: {key} is {list(tensors[key].shape)}, the model needs {list(parameter.shape)}"
        for key, parameter in wanted.items()
        if key in tensors and tensors[key].shape != parameter.shape
    ]
    if problems:
        shown = "\n".join(f"  {p}" for p in problems[:8])
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise UserError(
            f"{where}: the adapter does not fit the model:\n{shown}{more}",
            "It was trained on another base model, or with other settings than it is stored with.",
        )
    return wanted


def adapter_config(
    method: AdapterMethod,
    options: Any,
    names: Sequence[str],
    base: str,
    *,
    revision: str | None = None,
) -> dict[str, Any]:
    """The contents of adapter_config.json; `base` and its `revision` as `base_name` gives them."""
    return {
        "peft_type": method.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "peft_version": PEFT_VERSION,
        **method.to_config(options, names),
    }


def write_adapter(
    directory: Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    files: Mapping[str, bytes],
    origin: Mapping[str, Any],
) -> None:
    """Writes an adapter directory, whole or not at all.

    Args:
        directory: Replaced if it exists.
        tensors: Under PEFT's keys.
        config: adapter_config.json.
        files: The tokenizer's files.
        origin: Where the base model came from; goes into lorakit.json.
    """
    from lorakit.weights.shard_writer import write_tensors

    with replaced_directory(directory) as folder:
        write_tensors(folder / TENSORS, tensors)
        write_bytes(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
        own = {"lorakit_version": __version__, **origin}
        write_bytes(folder / OWN, (json.dumps(own, indent=2) + "\n").encode())
        for name, data in files.items():
            if name.startswith(TOKENIZER_FILES):
                write_bytes(folder / name, data)


def read_adapter(directory: Path, catalog: Catalog) -> SavedAdapter:
    """Reads an adapter directory, lorakit's or PEFT's.

    Raises:
        UserError: It is no adapter, cannot be read, or no installed method knows its type.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        flat = load_file(directory / TENSORS)
        own = directory / OWN
        origin = json.loads(own.read_text(encoding="utf-8")) if own.exists() else {}
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{directory}: not a readable adapter: {error}") from None
    method = _method_of(config, catalog, directory)
    options = method.from_config(config)
    own_keys = {k for k in flat if any(p.startswith(method.parameter_prefix) for p in k.split("."))}
    tensors = group_by_layer(
        {k: t for k, t in flat.items() if k in own_keys}, method.parameter_prefix, directory
    )
    copies = {
        k.removeprefix(PREFIX).replace(".base_layer.", "."): t
        for k, t in flat.items()
        if k not in own_keys
    }
    return SavedAdapter(directory, method, options, config, tensors, origin, copies)


def check_copies(adapter: SavedAdapter, base: BaseCheckpoint) -> None:
    """Refuses an adapter that brings other weights than its base has.

    Raises:
        UserError: A tensor beside the adapter's own is none of the base, or differs from it.
    """
    for name, copy in adapter.copies.items():
        shards = [file for file, specs in base.shards().items() if name in specs]
        stored = next((t for file in shards for n, t in base.tensors(file) if n == name), None)
        if stored is None or not stored.to(copy.dtype).equal(copy):
            raise UserError(
                f"{adapter.path}: it brings a {name} of its own, which is not supported: lorakit "
                "trains and merges low-rank updates only, not whole layers beside them",
                "Merge it with PEFT (merge_and_unload), and use the merged model as the base.",
            )


def _method_of(config: Mapping[str, Any], catalog: Catalog, where: Path) -> AdapterMethod:
    kind = config.get("peft_type")
    for method in catalog.all("adapter"):
        if method.peft_type == kind:
            return cast(AdapterMethod, method)
    known = listing(sorted({m.peft_type for m in catalog.all("adapter")}))
    raise UserError(
        f"{where / CONFIG}: no installed plugin reads peft_type {kind!r} (there is: {known})"
    )


def split_key(key: str, parameter_prefix: str, where: Path) -> tuple[str, str]:
    """`base_model.model.a.b.q_proj.X_A.weight` -> `a.b.q_proj`, `X_A.weight`, for an adapter
    whose parameters' names start with `X_`.

    Raises:
        UserError: No part of the key starts so.
    """
    parts = key.removeprefix(PREFIX).split(".")
    for index, part in enumerate(parts):
        if part.startswith(parameter_prefix):
            return ".".join(parts[:index]), ".".join(parts[index:])
    raise UserError(f"{where}: {key!r} is no key of such an adapter")


def group_by_layer(
    flat: Mapping[str, Tensor], parameter_prefix: str, where: Path
) -> dict[str, dict[str, Tensor]]:
    """Tensors under PEFT's keys -> layer -> name within the adapter -> tensor."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        name, suffix = split_key(key, parameter_prefix, where)
        tensors.setdefault(name, {})[suffix] = tensor
    return tensors
