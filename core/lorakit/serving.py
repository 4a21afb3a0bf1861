"""Whether an adapter can be served as it is, told to the user."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.errors import listing
from lorakit.protocols import BaseCheckpoint
from lorakit.records import AdapterMethod, ModelFamily
from lorakit.run_directory import ADAPTER


def serving_advice(
    method: AdapterMethod,
    options: Any,
    names: Sequence[str],
    *,
    family: ModelFamily,
    base: BaseCheckpoint,
    base_name: str,
    adapter: Path,
) -> str:
    """A line: vLLM's command for the adapter, or why there is none and what to do instead; or
    that it is not known whether vLLM has the model at all.

    Args:
        method: The adapter's.
        options: Its options.
        names: The adapted layers.
        family: The base model's.
        base: Its files.
        base_name: What the adapter calls it.
        adapter: The adapter's directory.
    """
    unknown = _unknown_model(family, base.config)
    if unknown:
        return unknown
    if method.serving is None:
        return f"whether vLLM serves {method.name} adapters is not known; a merged model it does"
    found = method.serving(options, names)
    refused = list(found.refused)
    if not (base.path / "config.json").is_file():
        refused.append("its base is no Hugging Face model directory")
    if refused:
        return f"not as it is, since {'; '.join(refused)}. Serve the merged model instead"
    name = adapter.parent.name if adapter.name == ADAPTER else adapter.name
    modules = shlex.quote(f"{name}={adapter}")
    command = ["vllm", "serve", shlex.quote(base_name), "--enable-lora", *found.flags]
    return " ".join([*command, "--lora-modules", modules])


def _unknown_model(family: ModelFamily, config: Mapping[str, Any]) -> str:
    """What to say of a model that vLLM is not known to serve; empty of one that it is."""
    if not family.vllm_architectures:
        return f"whether vLLM serves {family.name} models is not known to lorakit"
    named = config.get("architectures")
    architectures = [str(name) for name in named] if isinstance(named, list) else []
    if not architectures:
        return "its config.json has no `architectures`, by which vLLM would know the model"
    if not set(architectures) & set(family.vllm_architectures):
        return f"whether vLLM serves {listing(architectures)} is not known to lorakit"
    return ""
