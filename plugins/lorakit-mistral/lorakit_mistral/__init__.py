"""The Mistral family for lorakit: the plugin's entry point, torch-free."""

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
class MistralOptions(ModelOptions):
    """`[model]` with `name = "mistral"`: `path` is all there is, the rest is in config.json."""


def build(config: Mapping[str, Any], options: MistralOptions) -> CausalLM:
    """See `lorakit_mistral.model.build`."""
    from lorakit_mistral.model import build

    return build(config)


@hookimpl
def lorakit_model_families() -> list[ModelFamily]:
    return [
        ModelFamily(
            name="mistral",
            summary="Mistral 7B v0.1, v0.2, v0.3",
            options=MistralOptions,
            model_types=("mistral",),
            build=build,
            vllm_architectures=("MistralForCausalLM",),
        )
    ]
