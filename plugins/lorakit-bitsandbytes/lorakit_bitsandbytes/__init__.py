"""bitsandbytes for lorakit: the plugin's entry point, free of torch and of bitsandbytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit import hookimpl
from lorakit.records import OptimizerType, QuantizationScheme
from lorakit_bitsandbytes import library, optimizers, quantizations

if TYPE_CHECKING:
    from lorakit.recipes import Recipe


@hookimpl
def lorakit_quantizations() -> list[QuantizationScheme]:
    return [
        QuantizationScheme(
            name="nf4",
            summary="4 bits a weight, at the quantiles of a normal distribution (QLoRA)",
            options=quantizations.NF4Options,
            quantize=quantizations.quantize_nf4,
            stored_bytes=quantizations.nf4_bytes,
        ),
        QuantizationScheme(
            name="int8",
            summary="8 bits a weight, with a scale for each output row",
            quantize=quantizations.quantize_int8,
            stored_bytes=quantizations.int8_bytes,
        ),
    ]


@hookimpl
def lorakit_optimizers() -> list[OptimizerType]:
    return [
        OptimizerType(
            name="adamw8bit",
            summary="AdamW with its state in 8 bits",
            options=optimizers.AdamW8bitOptions,
            build=optimizers.build_adamw8bit,
            state_bytes=optimizers.adamw8bit_bytes,
        ),
        OptimizerType(
            name="paged_adamw",
            summary="AdamW whose state leaves a full GPU page by page",
            options=optimizers.AdamW8bitOptions,
            build=optimizers.build_paged_adamw,
            state_bytes=optimizers.adamw_bytes,
            notice=optimizers.paging_notice,
        ),
        OptimizerType(
            name="paged_adamw8bit",
            summary="AdamW with paged state in 8 bits",
            options=optimizers.AdamW8bitOptions,
            build=optimizers.build_paged_adamw8bit,
            state_bytes=optimizers.adamw8bit_bytes,
            notice=optimizers.paging_notice,
        ),
        OptimizerType(
            name="lion8bit",
            summary="Lion with its state in 8 bits",
            options=optimizers.Lion8bitOptions,
            build=optimizers.build_lion8bit,
            state_bytes=optimizers.lion8bit_bytes,
        ),
        OptimizerType(
            name="paged_lion8bit",
            summary="Lion with paged state in 8 bits",
            options=optimizers.Lion8bitOptions,
            build=optimizers.build_paged_lion8bit,
            state_bytes=optimizers.lion8bit_bytes,
            notice=optimizers.paging_notice,
        ),
    ]


@hookimpl
def lorakit_recipe_problems(recipe: Recipe) -> list[str]:
    """A missing bitsandbytes is told with all else that is wrong with the recipe."""
    used = []
    if recipe.quantization and recipe.quantization.record in lorakit_quantizations():
        used.append("quantization.name")
    if recipe.optimizer.record in lorakit_optimizers():
        used.append("optimizer.name")
    return [f"{key}: {problem}" for key in used for problem in library.problems()]
