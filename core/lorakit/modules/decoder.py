"""The decoder most families share: embedding, pre-norm blocks, norm, head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from lorakit.modules.cache import KeyValueCache
from lorakit.modules.layout import Layout


class DecoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), under Hugging Face's names."""

    def __init__(
        self, *, norm: nn.Module, attention: nn.Module, mlp_norm: nn.Module, mlp: nn.Module
    ) -> None:
        super().__init__()
        self.input_layernorm = norm
        self.self_attn = attention
        self.post_attention_layernorm = mlp_norm
        self.mlp = mlp

    def forward(self, x: Tensor, layout: Layout, cache: KeyValueCache | None = None) -> Tensor:
        """x `[T, D]` -> `[T, D]`."""
        x = x + self.self_attn(self.input_layernorm(x), layout, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: what Hugging Face calls `model`."""

    def __init__(
        self, *, vocabulary: int, dim: int, blocks: Iterable[nn.Module], norm: nn.Module
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleList(blocks)
        self.norm = norm

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens `[T]` -> `[T, D]`; families that scale embeddings override it."""
        x: Tensor = self.embed_tokens(tokens)
        return x

    def forward(self, tokens: Tensor, layout: Layout, cache: KeyValueCache | None = None) -> Tensor:
        """tokens `[T]` -> normalized hidden states `[T, D]`."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, layout, cache)
        if cache is not None:
            cache.advance(len(tokens))
        hidden: Tensor = self.norm(x)
        return hidden


class CausalDecoder(nn.Module):
    """A decoder with its head: a `lorakit.protocols.CausalLM`.

    Args:
        decoder: Gives the hidden states.
        vocabulary: V.
        dim: D.
        tied: The head shares the embedding's parameter.
        head_bias: The head has a bias.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        vocabulary: int,
        dim: int,
        tied: bool,
        head_bias: bool = False,
    ) -> None:
        super().__init__()
        self.model = decoder
        self.lm_head = nn.Linear(dim, vocabulary, bias=head_bias)
        if tied:
            self.lm_head.weight = decoder.embed_tokens.weight

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.layers)

    def hidden(self, tokens: Tensor, layout: Layout, cache: KeyValueCache | None = None) -> Tensor:
        """tokens `[T]` -> `[T, D]`."""
        states: Tensor = self.model(tokens, layout, cache)
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """`[N, D]` -> `[N, V]`."""
        scores: Tensor = self.lm_head(hidden)
        return scores
