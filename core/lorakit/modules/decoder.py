"""The decoder most families share: embedding, pre-norm blocks, norm, head."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lorakit.modules.cache import KeyValueCache
from lorakit.modules.layout import Layout
from lorakit.modules.residual import residual
from lorakit.modules.sublayers import add_attention, add_feed_forward


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
        x = add_attention(x, self.input_layernorm, self.self_attn, layout, cache)
        return add_feed_forward(x, self.post_attention_layernorm, self.mlp)


class SandwichBlock(nn.Module):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))), under Hugging Face's names."""

    def __init__(
        self,
        *,
        norm: nn.Module,
        attention: nn.Module,
        attention_out_norm: nn.Module,
        mlp_norm: nn.Module,
        mlp: nn.Module,
        mlp_out_norm: nn.Module,
    ) -> None:
        super().__init__()
        self.input_layernorm = norm
        self.self_attn = attention
        self.post_attention_layernorm = attention_out_norm
        self.pre_feedforward_layernorm = mlp_norm
        self.mlp = mlp
        self.post_feedforward_layernorm = mlp_out_norm

    def forward(self, x: Tensor, layout: Layout, cache: KeyValueCache | None = None) -> Tensor:
        """x `[T, D]` -> `[T, D]`."""
        attended = self.self_attn(self.input_layernorm(x), layout, cache)
        x = residual(x, self.post_attention_layernorm(attended))
        y = self.mlp(self.pre_feedforward_layernorm(x))
        return residual(x, self.post_feedforward_layernorm(y))


class Decoder(nn.Module):
    """Embedding, blocks and final norm: what Hugging Face calls `model`.

    Args:
        vocabulary: V.
        dim: D.
        blocks: The repeated layers.
        norm: Of what the last of them gives.
        embedding_scale: Multiplies embeddings, rounded to their dtype first.
        switches_at: Tokens after which positions are encoded differently, from a document's start
            on: see `Rotary.switches_at`.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        dim: int,
        blocks: Iterable[nn.Module],
        norm: nn.Module,
        embedding_scale: float | None = None,
        switches_at: int | None = None,
    ) -> None:
        super().__init__()
        # Not nn.Embedding(V, D): drawing its start, even on the meta device, imports torch's
        # compiler, which takes a second.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(vocabulary, dim), freeze=False)
        self.layers = nn.ModuleList(blocks)
        self.norm = norm
        self.embedding_scale = embedding_scale
        self.switches_at = switches_at

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens `[T]` -> `[T, D]`."""
        x: Tensor = self.embed_tokens(tokens)
        if self.embedding_scale is not None:
            x = x * torch.tensor(self.embedding_scale, dtype=x.dtype, device=x.device)
        return x

    def forward(self, tokens: Tensor, layout: Layout, cache: KeyValueCache | None = None) -> Tensor:
        """tokens `[T]` -> normalized hidden states `[T, D]`.

        The pass that takes a cached document over `switches_at` computes all of it anew: what is
        cached was encoded as in a short document.
        """
        fresh = len(tokens)
        if cache is not None and self._switches(cache.length, fresh):
            tokens = torch.cat([cache.tokens.to(tokens.device), tokens])
            layout = Layout.continued(0, len(tokens), tokens.device)
            cache.clear()
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, layout, cache)
        if cache is not None:
            cache.advance(tokens)
        hidden: Tensor = self.norm(x[-fresh:])
        return hidden

    def _switches(self, cached: int, fresh: int) -> bool:
        limit = self.switches_at
        return limit is not None and 0 < cached <= limit < cached + fresh


class CausalDecoder(nn.Module):
    """A decoder with its head: a `lorakit.protocols.CausalLM`.

    Args:
        decoder: Gives the hidden states.
        vocabulary: V.
        dim: D.
        tied: The head shares the embedding's parameter.
        head_bias: The head has a bias.
        logit_softcap: Logits z become logit_softcap * tanh(z / logit_softcap).
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        vocabulary: int,
        dim: int,
        tied: bool,
        head_bias: bool = False,
        logit_softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.model = decoder
        self.logit_softcap = logit_softcap
        self.lm_head = nn.Linear(dim, vocabulary, bias=head_bias)
        if tied:
            self.lm_head.weight = decoder.embed_tokens.weight

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return list(self.model.layers)

    @property
    def shares_prefixes(self) -> bool:
        """Not where a token's hidden state depends on how long its document will be."""
        return self.model.switches_at is None

    def hidden(self, tokens: Tensor, layout: Layout, cache: KeyValueCache | None = None) -> Tensor:
        """tokens `[T]` -> `[T, D]`."""
        states: Tensor = self.model(tokens, layout, cache)
        return states

    def logits(self, hidden: Tensor) -> Tensor:
        """`[N, D]` -> `[N, V]`."""
        scores: Tensor = self.lm_head(hidden)
        if self.logit_softcap is None:
            return scores
        return (scores / self.logit_softcap).tanh() * self.logit_softcap
