"""The Gemma family for lorakit: the plugin's entry point, torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import frozen

from lorakit import hookimpl
from lorakit.options import ModelOptions
from lorakit.records import ModelFamily

if TYPE_CHECKING:
    from lorakit.protocols import CausalLM


@frozen(kw_only=True)
class GemmaOptions(ModelOptions):
    """`[model]` with `name = "gemma"`: `path` is all there is, the rest is in config.json."""


def build(config: Mapping[str, Any], options: GemmaOptions) -> CausalLM:
    """See `lorakit_gemma.model.build`."""
    from lorakit_gemma.model import build

    return build(config)


@hookimpl
def lorakit_model_families() -> list[ModelFamily]:
    return [
        ModelFamily(
            name="gemma",
            summary="Gemma, Gemma 2, Gemma 3 (text)",
            options=GemmaOptions,
            model_types=("gemma", "gemma2", "gemma3_text", "gemma3"),
            build=build,
            vllm_architectures=("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"),
        )
    ]
