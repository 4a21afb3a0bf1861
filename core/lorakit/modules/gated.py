"""The gated feed-forward layer as one function that keeps little for its backward pass.

y = down(act(g) * u), with g and u from x.  Plain autograd keeps act(g), the product and the inputs
of all layers besides; here it is x, g, u and the thin products of the adapters: the rest is
computed again from those, which takes no large matrix product.  Where memory is short, g and u are
computed again too, which takes two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lorakit.modules.low_rank import (
    KEPT,
    LowRank,
    backward_products,
    forward_product,
    low_ranks_of,
    trained,
)

Activation = Callable[[Tensor], Tensor]


def gated(
    x: Tensor,
    inner: Sequence[nn.Module],
    down: nn.Module,
    activation: Activation,
    *,
    recompute: bool = False,
) -> Tensor:
    """down(activation(g) * u).

    Args:
        x: `[T, D]`.
        inner: Give g and u: a layer each, or one `[2F, D]` for both, g's rows first.
        down: `[D, F]`.
        activation: Applied to g.
        recompute: Compute g and u again in the backward pass.
    """
    parts = low_ranks_of([*inner, down])
    y: Tensor
    if parts is not None:
        y = _Gated.apply(x, parts, activation, recompute, *trained(parts))
    elif recompute:
        y = checkpoint(_by_autograd, x, inner, down, activation, use_reentrant=False)
    else:
        y = _by_autograd(x, inner, down, activation)
    return y


def _by_autograd(
    x: Tensor, inner: Sequence[nn.Module], down: nn.Module, activation: Activation
) -> Tensor:
    g, u = halves([layer(x) for layer in inner])
    y: Tensor = down(activation(g) * u)
    return y


def halves(made: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """g and u `[T, F]` from what the inner layers made."""
    if len(made) == 1:
        g, u = made[0].chunk(2, dim=-1)
        return g, u
    g, u = made
    return g, u


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        parts: list[LowRank],
        activation: Activation,
        recompute: bool,
        *parameters: Tensor | None,
    ) -> Tensor:
        results = [forward_product(part, x) for part in parts[:-1]]
        g, u = halves([result.y for result in results])
        h = activation(g).mul_(u)
        last = forward_product(parts[-1], h)
        ctx.parts, ctx.activation, ctx.recompute = parts, activation, recompute
        if recompute:
            ctx.save_for_backward(x, *(result.dropped for result in results), *last.kept)
        else:
            kept = [tensor for result in [*results, last] for tensor in result.kept]
            ctx.save_for_backward(x, *(result.y for result in results), *kept)
        return last.y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        *inner, down = ctx.parts
        x, *saved = ctx.saved_tensors
        made, kept = saved[: len(inner)], saved[len(inner) :]
        if ctx.recompute:
            again = [forward_product(p, x, dropped) for p, dropped in zip(inner, made, strict=True)]
            made = [result.y for result in again]
            kept = [tensor for result in again for tensor in result.kept] + kept
        g, u = halves(made)
        with torch.enable_grad():
            leaf = g.detach().requires_grad_()
            a = ctx.activation(leaf)
        h = a.detach() * u
        dh, of_down = backward_products([down], h, [dy], kept[-KEPT:])
        assert dh is not None
        # One [T, F] after the other is given back, or written over by the next.
        du = torch.mul(a.detach(), dh, out=h)
        (dg,) = torch.autograd.grad(a, leaf, dh.mul_(u))
        dmade = [dg, du] if len(made) == 2 else [torch.cat([dg, du], dim=-1)]
        dx, gradients = backward_products(inner, x, dmade, kept, wanted=ctx.needs_input_grad[0])
        return dx, None, None, None, *gradients, *of_down
