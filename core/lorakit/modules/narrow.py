"""Weights kept in a narrower float than they are computed with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lorakit.arena import empty
from lorakit.modules.frozen import StoredLinear, materialized
from lorakit.modules.matmul import multiplies_as_stored, times_into, times_transposed_into
from lorakit.scratch import scratch

BLOCK_ELEMENTS = 16 * 2**20
"""Weights widened at a time: 64 MB of fp32.  Smaller blocks make narrow, slower products."""


def row_blocks(weight: Tensor, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A matrix's rows, block by block, in a dtype that x can be multiplied with.

    Args:
        weight: `[out, in]`.
        x: Of the weight's dtype, or where products take the weight as it is: there is one block,
            the weight itself.  Else blocks are in the dtype of x.

    Yields:
        Which rows, and their values `[rows, in]`: good until the next block, which takes the
        same memory.
    """
    dtype = x.dtype
    if weight.dtype == dtype or multiplies_as_stored(x, weight):
        yield slice(0, len(weight)), weight
        return
    count = min(len(weight), max(1, BLOCK_ELEMENTS // weight.shape[1]))
    (buffer,) = scratch("rows", weight, ((count, weight.shape[1]), dtype))
    for start in range(0, len(weight), count):
        rows = slice(start, min(start + count, len(weight)))
        yield rows, buffer[: rows.stop - start].copy_(weight[rows])


class NarrowLinear(StoredLinear):
    """y = x W^T + b, with W kept as it is and widened a block of rows at a time.

    Neither forward nor backward ever holds W whole in the dtype of x, as large as it may be: the
    head of a 128k vocabulary too.

    Args:
        linear: Gives W and b.
        compute_dtype: Of x.
    """

    def __init__(self, linear: nn.Linear, compute_dtype: torch.dtype) -> None:
        super().__init__(linear, compute_dtype)
        self.weight = linear.weight

    def dequantize(self, out: Tensor | None = None) -> Tensor:
        """W `[out, in]`, whole, in the compute dtype or that of `out`."""
        return self.weight.to(self.compute_dtype) if out is None else out.copy_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in]` -> `[..., out]`, in x's dtype."""
        y: Tensor = _NarrowProduct.apply(x, self.weight)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class _NarrowProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        y = empty((*x.shape[:-1], len(weight)), x)
        project(x.flatten(0, -2), weight, out=y.view(-1, len(weight)))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        dx = empty((*dy.shape[:-1], ctx.weight.shape[1]), dy)
        project_back(dy.flatten(0, -2), ctx.weight, out=dx.view(-1, ctx.weight.shape[1]))
        return dx, None


def project(x: Tensor, weight: Tensor, *, out: Tensor) -> None:
    """out = x W^T: x `[N, in]`, W `[out, in]` in any float, out `[N, out]`."""
    for rows, block in row_blocks(weight, x):
        times_transposed_into(out[:, rows], x, block)


def project_back(dy: Tensor, weight: Tensor, *, out: Tensor) -> None:
    """out = dy W: dy `[N, out]`, W `[out, in]` in any float, out `[N, in]`."""
    for rows, block in row_blocks(weight, dy):
        times_into(out, dy[:, rows], block, add=rows.start > 0)


def factor_of(base: nn.Module, x: Tensor) -> Tensor:
    """W `[out, in]` in the dtype of x, or in another that products with x take it in; for the next
    product only."""
    if isinstance(base, NarrowLinear) and multiplies_as_stored(x, base.weight):
        return base.weight
    return weight_of(base, x)


def factor_dtype(base: nn.Module, x: Tensor) -> torch.dtype:
    """Of what `factor_of` gives."""
    if isinstance(base, NarrowLinear) and multiplies_as_stored(x, base.weight):
        return base.weight.dtype
    return x.dtype


def weight_of(base: nn.Module, like: Tensor) -> Tensor:
    """W `[out, in]` in the dtype of `like`, for the next product only."""
    if type(base) is nn.Linear and base.weight.dtype == like.dtype:
        return base.weight
    if type(base) is nn.Linear:
        return base.weight.to(like.dtype)
    if isinstance(base, (StoredLinear, NarrowLinear)):
        return materialized(base, like)
    # A scheme's own module need not know how to write into a buffer.
    dequantize = cast("Callable[[], Tensor]", base.dequantize)
    return dequantize().to(like.dtype)


class NarrowEmbedding(nn.Embedding):
    """Looks rows up as they are stored, and widens those.

    Args:
        embedding: Gives the table.
        compute_dtype: Of the result.
    """

    def __init__(self, embedding: nn.Embedding, compute_dtype: torch.dtype) -> None:
        count, width = embedding.weight.shape
        # With a weight: drawing one, even on the meta device, imports the compiler, which takes a
        # second.
        super().__init__(count, width, embedding.padding_idx, _weight=embedding.weight)
        self.weight = embedding.weight
        self.compute_dtype = compute_dtype

    def forward(self, input: Tensor) -> Tensor:
        """input: tokens `[T]` -> `[T, D]`."""
        return super().forward(input).to(self.compute_dtype)


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Has embeddings and linear layers whose weights are stored in another float compute in
    `dtype`; all else (norms, biases) is small, and its modules cast it where they use it.

    Args:
        model: With its weights loaded, and no adapter yet.
        dtype: Of the activations.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            weight = getattr(child, "weight", None)
            if weight is None or cast(Tensor, weight).dtype == dtype:
                continue
            if type(child) is nn.Linear:
                setattr(module, name, NarrowLinear(child, dtype))
            elif type(child) is nn.Embedding:
                setattr(module, name, NarrowEmbedding(child, dtype))
