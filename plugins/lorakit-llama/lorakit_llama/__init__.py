"""The Llama family for lorakit: the plugin's entry point, torch-free."""

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
class LlamaOptions(ModelOptions):
    """`[model]` with `name = "llama"`: `path` is all there is, the rest is in config.json."""


def build(config: Mapping[str, Any], options: LlamaOptions) -> CausalLM:
    """See `lorakit_llama.model.build`."""
    from lorakit_llama.model import build

    return build(config)


@hookimpl
def lorakit_model_families() -> list[ModelFamily]:
    return [
        ModelFamily(
            name="llama",
            summary="Llama 2, Code Llama, Llama 3, SmolLM2",
            options=LlamaOptions,
            model_types=("llama",),
            build=build,
            vllm_architectures=("LlamaForCausalLM",),
        )
    ]
