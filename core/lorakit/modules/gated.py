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
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lorakit.arena import empty, empty_like
from lorakit.kernel_protocol import Kernels
from lorakit.modules.low_rank import LowRank, low_ranks_of, trained
from lorakit.modules.matmul import kernels_for
from lorakit.modules.projections import KEPT, backward_products, forward_products

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
        results = forward_products(parts[:-1], x)
        g, u = halves([result.y for result in results])
        h = _gate(g, u, activation)
        (last,) = forward_products(parts[-1:], h)
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
            again = forward_products(inner, x, made)
            made = [result.y for result in again]
            kept = [tensor for result in again for tensor in result.kept] + kept
        g, u = halves(made)
        dg, du, of_down = _through_gate(g, u, ctx.activation, down, dy, kept[-KEPT:])
        dmade = [dg, du] if len(made) == 2 else [_side_by_side(dg, du)]
        dx, gradients = backward_products(inner, x, dmade, kept, wanted=ctx.needs_input_grad[0])
        return dx, None, None, None, *gradients, *of_down


def _side_by_side(dg: Tensor, du: Tensor) -> Tensor:
    rows, width = dg.shape
    return torch.cat([dg, du], dim=-1, out=empty((rows, 2 * width), dg))


def _gating(activation: Activation, g: Tensor) -> Kernels | None:
    """What computes the activation and its gradient in one go, if anything does."""
    kernels = kernels_for(g) if activation is F.silu else None
    return kernels if kernels is not None and kernels.gates(g) else None


def _gate(g: Tensor, u: Tensor, activation: Activation) -> Tensor:
    kernels = _gating(activation, g)
    if kernels is None:
        return activation(g).mul_(u)
    h = empty_like(g)
    kernels.gate(g, u, h)
    return h


def _through_gate(
    g: Tensor,
    u: Tensor,
    activation: Activation,
    down: LowRank,
    dy: Tensor,
    kept: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """The gradients of g and u, and of the last layer's parameters, given that of its result.  One
    `[T, F]` after the other is given back, or written over by the next."""
    kernels = _gating(activation, g)
    if kernels is not None:
        h = _gate(g, u, activation)
        dh, of_down = backward_products([down], h, [dy], kept)
        assert dh is not None
        kernels.gate_backward(dh, g, u, dh, h)
        return dh, h, of_down
    with torch.enable_grad():
        leaf = g.detach().requires_grad_()
        a = activation(leaf)
    h = a.detach() * u
    dh, of_down = backward_products([down], h, [dy], kept)
    assert dh is not None
    du = torch.mul(a.detach(), dh, out=h)
    (dg,) = torch.autograd.grad(a, leaf, dh.mul_(u))
    return dg, du, of_down
