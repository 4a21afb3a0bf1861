"""The Qwen family for lorakit: the plugin's entry point, torch-free."""

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
class QwenOptions(ModelOptions):
    """`[model]` with `name = "qwen"`: `path` is all there is, the rest is in config.json."""


def build(config: Mapping[str, Any], options: QwenOptions) -> CausalLM:
    """See `lorakit_qwen.model.build`."""
    from lorakit_qwen.model import build

    return build(config)


@hookimpl
def lorakit_model_families() -> list[ModelFamily]:
    return [
        ModelFamily(
            name="qwen",
            summary="Qwen 2, Qwen 2.5, Qwen 3 (dense)",
            options=QwenOptions,
            model_types=("qwen2", "qwen3"),
            build=build,
            vllm_architectures=("Qwen2ForCausalLM", "Qwen3ForCausalLM"),
        )
    ]
