"""What vLLM takes of LoRA adapters.

Source: vLLM's vllm/lora/peft_helper.py (what it reads of adapter_config.json and refuses),
vllm/lora/utils.py (names of layers and parameters), vllm/config/lora.py (ranks) and
vllm/model_executor/models/, as of 0.9 to 0.15.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from attrs import evolve

from lorakit.protocols import Serving

if TYPE_CHECKING:
    from lorakit.builtin.lora import LoRAOptions

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values of `--max-lora-rank`."""
DEFAULT_RANK = 16


def serving(options: LoRAOptions, names: Sequence[str]) -> Serving:
    """Whether vLLM serves such an adapter.

    Fused layers need no word: for a model whose checkpoint has `qkv_proj` and `gate_up_proj`
    (Phi-3), vLLM 0.9 and later take adapters on these very names; for the others it fuses q, k
    and v itself, and adapters have them apart.
    """
    refused = []
    if options.dora:
        refused.append("it refuses DoRA")
    ranks = {options.rank_at(name) for name in names}
    scales = {options.scale_at(name) for name in names}
    plain = evolve(options, rank_pattern={}, alpha_pattern={})
    if ranks != {options.rank} or scales != {plain.scale_at("")}:
        refused.append(
            "it reads one rank and one alpha for all layers: with rank_pattern or alpha_pattern "
            "its answers would be wrong, without an error"
        )
    if any("." not in name for name in names):
        refused.append("LoRA on the output head it has for a few architectures only")
    if max(ranks) > RANKS[-1]:
        refused.append(f"its largest rank is {RANKS[-1]}")
    if refused:
        return Serving(refused=tuple(refused))
    needed = next(rank for rank in RANKS if rank >= options.rank)
    return Serving(("--max-lora-rank", str(needed)) if needed > DEFAULT_RANK else ())
