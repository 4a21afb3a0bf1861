"""The Phi-3 family for lorakit: the plugin's entry point, torch-free."""

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
class Phi3Options(ModelOptions):
    """`[model]` with `name = "phi3"`: `path` is all there is, the rest is in config.json."""


def build(config: Mapping[str, Any], options: Phi3Options) -> CausalLM:
    """See `lorakit_phi3.model.build`."""
    from lorakit_phi3.model import build

    return build(config)


@hookimpl
def lorakit_model_families() -> list[ModelFamily]:
    return [
        ModelFamily(
            name="phi3",
            summary="Phi-3 mini, Phi-3.5 mini, Phi-4, Phi-4 mini",
            options=Phi3Options,
            model_types=("phi3",),
            build=build,
            vllm_architectures=("Phi3ForCausalLM",),
        )
    ]
