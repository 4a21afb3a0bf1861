"""Whether an adapter can be served as it is, told to the user."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit.protocols import BaseCheckpoint
from lorakit.records import AdapterMethod
from lorakit.run_directory import ADAPTER


def serving_advice(
    method: AdapterMethod,
    options: Any,
    names: Sequence[str],
    *,
    base: BaseCheckpoint,
    base_name: str,
    adapter: Path,
) -> str:
    """A line: vLLM's command for the adapter, or why there is none and what to do instead.

    Args:
        method: The adapter's.
        options: Its options.
        names: The adapted layers.
        base: The base model's files.
        base_name: What the adapter calls it.
        adapter: The adapter's directory.
    """
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
