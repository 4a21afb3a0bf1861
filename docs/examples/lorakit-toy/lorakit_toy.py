"""The toy family: a decoder with squared-ReLU layers and a learned gate on each block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakit import hookimpl
from lorakit.options import ModelOptions
from lorakit.records import ModelFamily


def build(config: Mapping[str, Any], options: ModelOptions) -> Any:
    """The model, its parameters named and shaped as in the checkpoint."""
    # torch is imported in here, and so the layers are defined in here: `lorakit plugins list`
    # loads this module, and has no use for torch.
    import torch
    from torch import nn

    from lorakit.model_config import ModelConfig
    from lorakit.modules import Attention, CausalDecoder, Decoder, RMSNorm, Rotary

    class SquaredReLU(nn.Module):
        """y = down(relu(up(x))^2)."""

        def __init__(self, dim: int, hidden: int) -> None:
            super().__init__()
            self.up_proj = nn.Linear(dim, hidden, bias=False)
            self.down_proj = nn.Linear(hidden, dim, bias=False)

        def forward(self, x: Any) -> Any:
            return self.down_proj(torch.relu(self.up_proj(x)).square())

    class GatedBlock(nn.Module):
        """x + g (attention(norm(x)) + mlp(norm(x))), g one learned number."""

        def __init__(self, dim: int, attention: nn.Module, mlp: nn.Module, eps: float) -> None:
            super().__init__()
            self.norm = RMSNorm(dim, eps)
            self.self_attn = attention
            self.mlp = mlp
            self.gate = nn.Parameter(torch.empty(1))

        def forward(self, x: Any, layout: Any, cache: Any = None) -> Any:
            y = self.norm(x)
            return x + self.gate * (self.self_attn(y, layout, cache) + self.mlp(y))

    c = ModelConfig(config, "toy")
    dim, vocabulary = c.integer("hidden_size"), c.integer("vocab_size")
    heads, eps = c.integer("num_attention_heads"), c.number("norm_eps", default=1e-5)
    rotary = Rotary.of_base(dim // heads, c.number("rope_theta", default=10_000.0))
    blocks = [
        GatedBlock(
            dim,
            Attention(
                dim, heads=heads, kv_heads=heads, head_dim=dim // heads, rotary=rotary, layer=layer
            ),
            SquaredReLU(dim, c.integer("intermediate_size")),
            eps,
        )
        for layer in range(c.integer("num_hidden_layers"))
    ]
    # Whatever else config.json says may change what the model computes.
    c.refuse_unread()
    decoder = Decoder(vocabulary=vocabulary, dim=dim, blocks=blocks, norm=RMSNorm(dim, eps))
    return CausalDecoder(decoder, vocabulary=vocabulary, dim=dim, tied=False)


@hookimpl
def lorakit_model_families() -> list[ModelFamily]:
    return [
        ModelFamily(
            name="toy",
            summary="toy decoders: squared ReLU, gated blocks",
            options=ModelOptions,
            model_types=("toy",),
            build=build,
        )
    ]
