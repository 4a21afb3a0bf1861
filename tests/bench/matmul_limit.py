"""The matrix products of a training step, and nothing else: what the step could at best take.

    python -m tests.bench.matmul_limit RECIPE

Builds the recipe's run as `lorakit train` does, with its process settings, and goes through the
same batches.  Timed are, at the shapes, layer by layer and with the weights of the step:

    linear layers   x W^T; backward dy W, where the input needs a gradient
    low-rank        x A^T and (x A^T) B^T; backward dy B, (x A^T)^T dy, (dy B)^T x and (dy B) A;
                    those with x and A once for all layers that share x, but by kernels that make
                    a layer with its update in one go
    attention       q k^T and p v for each document, as whole squares; backward the four of
                    their gradients (two of them by MKL: oneDNN has no faster way)
    head            h W^T for the trained tokens, in the chunks of the loss; backward dz W

All that can be written into memory that is there before is.  They are made by each library that
torch has for them (see `lorakit.modules.matmul`), and by the kernels of a plugin that the recipe's
run uses; the fastest counts.  Prints one JSON object, as the peers do; a step's `torch_seconds` are
those of torch's fastest.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lorakit.assemble import Run, assemble
from lorakit.data.batches import Batch
from lorakit.kernel_protocol import Kernels
from lorakit.loss import chunk_tokens
from lorakit.modules.attention import Attention
from lorakit.modules.low_rank import LowRank, low_rank_of
from lorakit.modules.matmul import (
    add_times,
    kernels_for,
    times,
    times_into,
    times_transposed,
    times_transposed_into,
    transposed_times,
    use_kernels,
    use_onednn,
)
from lorakit.modules.narrow import factor_dtype, factor_of, row_blocks
from lorakit.progress import TerminalProgress
from lorakit.recipes import resolve_recipe

READS_INPUT = ("q_proj", "k_proj", "v_proj", "qkv_proj")
"""Layers that read what their block reads."""
INNER = ("gate_proj", "up_proj")
"""Layers that share the input of the feed-forward layer."""


class Scratch:
    """Memory by name and shape, filled once with random numbers.

    Args:
        onednn: Whether oneDNN makes the products with frozen weights.
        kernels: Those that make them.
    """

    def __init__(self, *, onednn: bool = False, kernels: Kernels | None = None) -> None:
        self.onednn = use_onednn(onednn)
        use_kernels(kernels)
        self.kernels = kernels
        self._kept: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        key = name, shape
        if key not in self._kept:
            self._kept[key] = torch.randn(shape).mul_(0.1)
        return self._kept[key]


def project(x: Tensor, weight: Tensor, y: Tensor, scratch: Scratch) -> Tensor:
    """x W^T; oneDNN's cannot be written into y."""
    if scratch.onednn:
        return times_transposed(x, weight)
    times_transposed_into(y, x, weight)
    return y


def project_back(dy: Tensor, weight: Tensor, dx: Tensor, scratch: Scratch) -> Tensor:
    """dy W; oneDNN's cannot be written into dx."""
    if scratch.onednn:
        return times(dy, weight)
    times_into(dx, dy, weight, add=False)
    return dx


def linear_forward(parts: Sequence[LowRank], tokens: int, scratch: Scratch) -> None:
    """y = x W^T + (x A^T) B^T, of layers that share x."""
    base = parts[0].base
    x = scratch("x", tokens, base.in_features)
    kernels = adapting(parts, tokens, scratch)
    if kernels is not None:
        for part in parts:
            down, up = cast(Tensor, part.down), cast(Tensor, part.up)
            y = scratch("y", tokens, part.base.out_features)
            kernels.adapt(x, factor_of(part.base, x), down, up, part.scale, y)
        return
    adapted = [part for part in parts if part.down is not None and part.up is not None]
    lows = {}
    if adapted:
        ranks = [len(cast(Tensor, part.down)) for part in adapted]
        downs = scratch("downs", sum(ranks), base.in_features)
        low = project(x, downs, scratch("low", tokens, sum(ranks)), scratch)
        lows = dict(zip(map(id, adapted), low.split(ranks, dim=1), strict=True))
    for part in parts:
        y = scratch("y", tokens, part.base.out_features)
        y = project(x, factor_of(part.base, x), y, scratch)
        if id(part) in lows:
            add_times(y, lows[id(part)], cast(Tensor, part.up).t())


def adapting(parts: Sequence[LowRank], tokens: int, scratch: Scratch) -> Kernels | None:
    """What makes a layer's products and its update's in one go, as the step has them."""
    x = scratch("x", tokens, parts[0].base.in_features)
    for part in parts:
        dtype = factor_dtype(part.base, x)
        if part.down is None or not (scratch.kernels and scratch.kernels.adapts(tokens, dtype)):
            return None
    return scratch.kernels


def linear_backward(
    parts: Sequence[LowRank], tokens: int, scratch: Scratch, needs_dx: bool
) -> None:
    """dx = dy W + (dy B) A, and the gradients of A and B, of layers that share x."""
    wide = parts[0].base.in_features
    x, dx = scratch("x", tokens, wide), scratch("dx", tokens, wide)
    kernels = adapting(parts, tokens, scratch)
    if kernels is not None:
        for index, part in enumerate(parts):
            down, up = cast(Tensor, part.down), cast(Tensor, part.up)
            dy, low = scratch("y", tokens, len(up)), scratch("low", tokens, len(down))
            weight, into = factor_of(part.base, dy), dx if needs_dx else None
            kernels.adapt_backward(dy, x, low, weight, down, up, part.scale, into, add=index > 0)
        return
    ranks = 0
    for part in parts:
        dy = scratch("y", tokens, part.base.out_features)
        if needs_dx:
            dx = project_back(dy, factor_of(part.base, dy), dx, scratch)
        if part.down is not None and part.up is not None:
            rank = len(part.down)
            project_back(dy, part.up, scratch("d_low", tokens, rank), scratch)
            transposed_times(scratch("low", tokens, rank), dy)
            ranks += rank
    if ranks:
        d_low, downs = scratch("d_low", tokens, ranks), scratch("downs", ranks, wide)
        transposed_times(d_low, x)
        if needs_dx:
            add_times(dx, d_low, downs)


def attention_products(
    heads: int, kv_heads: int, head_dim: int, length: int, scratch: Scratch, *, backward: bool
) -> None:
    """Of one document: 2 forward, 4 backward, each `[T, T, Dh]` multiplications a head; the query
    heads that share a key head in one."""
    rows = heads // kv_heads * length
    q, d_out = scratch("q", rows, head_dim), scratch("d_out", rows, head_dim)
    k, v = scratch("k", length, head_dim), scratch("v", length, head_dim)
    scores, d_scores = scratch("scores", rows, length), scratch("d_scores", rows, length)
    attended, into = scratch("attended", rows, head_dim), scratch("into", length, head_dim)
    for _ in range(kv_heads):
        if not backward:
            project(q, k, scores, scratch)
            project_back(scores, v, attended, scratch)
            continue
        project(d_out, v, d_scores, scratch)
        torch.mm(scores.t(), d_out, out=into)
        torch.mm(d_scores.t(), q, out=into)
        project_back(d_scores, k, attended, scratch)


def head_products(weight: Tensor, trained: int, scratch: Scratch) -> None:
    vocabulary, dim = weight.shape
    chunk = min(chunk_tokens(vocabulary), trained)
    for start in range(0, trained, chunk):
        count = min(chunk, trained - start)
        h, logits = scratch("h", count, dim), scratch("logits", chunk, vocabulary)[:count]
        for rows, block in row_blocks(weight, h):
            logits[:, rows] = project(h, block, logits[:, rows], scratch)
        for rows, block in row_blocks(weight, h):
            project_back(logits[:, rows], block, scratch("dh", count, dim), scratch)


def step_products(run: Run, batch: Batch, scratch: Scratch) -> None:
    """Forward block by block, the head, then backward."""
    tokens = len(batch.tokens)
    blocks = list(run.base.causal_lm.blocks)
    for block in blocks:
        for _, parts in layers_by_input(block):
            linear_forward(parts, tokens, scratch)
        _attend(block, batch, scratch, backward=False)
    weight = run.base.causal_lm.lm_head.weight
    assert isinstance(weight, Tensor)
    head_products(weight, batch.trained, scratch)
    for index, block in reversed(list(enumerate(blocks))):
        _attend(block, batch, scratch, backward=True)
        for name, parts in reversed(layers_by_input(block)):
            # Embeddings are frozen: what reads them needs no gradient of its input.
            reads_embeddings = index == 0 and name in READS_INPUT
            linear_backward(parts, tokens, scratch, not reads_embeddings)


def layers_by_input(block: nn.Module) -> list[tuple[str, list[LowRank]]]:
    """Layers in order, those that share an input together, by the last one's own name."""
    found: list[tuple[str, list[LowRank]]] = []
    for path, part in linear_layers(block):
        name = path.rsplit(".", 1)[-1]
        if found and any({name, found[-1][0]} <= set(shared) for shared in (READS_INPUT, INNER)):
            found[-1] = name, [*found[-1][1], part]
        else:
            found.append((name, [part]))
    return found


def linear_layers(block: nn.Module) -> Iterator[tuple[str, LowRank]]:
    adapted: set[str] = set()
    for name, module in block.named_modules():
        if any(name.startswith(f"{outer}.") for outer in adapted):
            continue
        part = low_rank_of(module) if isinstance(module, nn.Module) else None
        if part is not None:
            adapted.add(name)
            yield name, part


def _attend(block: nn.Module, batch: Batch, scratch: Scratch, *, backward: bool) -> None:
    for module in block.modules():
        if isinstance(module, Attention):
            heads, kv_heads = (width // module.head_dim for width in module.widths[:2])
            for length in batch.layout.lengths:
                attention_products(
                    heads, kv_heads, module.head_dim, length, scratch, backward=backward
                )


def main() -> None:
    recipe = resolve_recipe(sys.argv[1])
    run = assemble(recipe, TerminalProgress())
    kernels = kernels_for(torch.empty(1))
    steps = []
    with torch.no_grad():
        for _, window in zip(range(run.total_steps), run.plan.windows(0, 0), strict=False):
            by_torch = min(timed(run, window, Scratch(onednn=on)) for on in (False, True))
            own = timed(run, window, Scratch(kernels=kernels)) if kernels else by_torch
            counts = {
                "tokens": sum(batch.size for batch in window),
                "trained_tokens": sum(batch.trained for batch in window),
            }
            steps.append({"seconds": min(own, by_torch), "torch_seconds": by_torch, **counts})
    print(json.dumps({"steps": steps, "losses": []}))


def timed(run: Run, window: list[Batch], scratch: Scratch) -> float:
    """Seconds of the window's products, made once before to fill the memory."""
    for batch in window:
        step_products(run, batch, scratch)
    started = time.perf_counter()
    for batch in window:
        step_products(run, batch, scratch)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
