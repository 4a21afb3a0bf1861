"""A block's halves, x + attention(norm(x)) and x + mlp(norm(x)), each as one call of kernels that
can do so: `lorakit.sublayer_protocol`.

Chosen by what the parts compute, never by whose they are; all that is otherwise (a bias, a norm of
heads, dropped inputs, a weight that must be dequantized first) goes part by part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from lorakit.arena import empty, empty_like
from lorakit.kernel_protocol import Kernels
from lorakit.modules.attention import Attention, FusedAttention
from lorakit.modules.cache import KeyValueCache
from lorakit.modules.kernel_attention import attention_workspace, documents_of
from lorakit.modules.layout import Layout
from lorakit.modules.low_rank import LowRank, fused_now, low_ranks_of, trained
from lorakit.modules.matmul import kernels_for_such
from lorakit.modules.mlp import FusedGatedMLP, GatedMLP
from lorakit.modules.narrow import NarrowLinear
from lorakit.modules.norm import RMSNorm
from lorakit.modules.projections import factors, of_magnitude, ratio_of
from lorakit.modules.recompute import note_norm
from lorakit.modules.residual import residual
from lorakit.modules.rope import Rotary, one_angle_a_token
from lorakit.sublayer_protocol import (
    Adapted,
    FactorGradients,
    Heads,
    Made,
    Sublayer,
    SublayerKernels,
    Work,
)


def add_attention(
    x: Tensor,
    norm: nn.Module,
    attention: nn.Module,
    layout: Layout,
    cache: KeyValueCache | None = None,
) -> Tensor:
    """x + attention(norm(x)), x `[T, D]`."""
    kernels = kernels_for_such(x)
    if kernels is not None and cache is None and attends_in_one_call(attention, layout):
        attending = _attending(kernels, attention, layout, x)
        layers = (*attention.inner, attention.o_proj)
        half = None if attending is None else _half_of(x, norm, layers, kernels)
        if half is not None:
            again = attention.recompute
            y: Tensor = _SelfAttention.apply(x, half, attending, again, *trained(half.parts))
            return y
    return residual(x, attention(norm(x), layout, cache))


def add_feed_forward(x: Tensor, norm: nn.Module, mlp: nn.Module) -> Tensor:
    """x + mlp(norm(x)), x `[T, D]`."""
    kernels = kernels_for_such(x)
    if kernels is not None and feeds_in_one_call(mlp):
        half = _half_of(x, norm, (*mlp.inner, mlp.down_proj), kernels)
        if half is not None:
            y: Tensor = _FeedForward.apply(x, half, mlp.recompute, *trained(half.parts))
            return y
    return residual(x, mlp(norm(x)))


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, half: _Half, again: bool, *parameters: Tensor | None
    ) -> Tensor:
        made, out = half.made(x), empty_like(x)
        work = Work(empty_like(x), outer=half.outer_input(x))
        if isinstance(x, FakeTensor):
            kept = half.small(x)
        else:
            kept = half.by.feed_forward(x, half.sublayer, made, out, work)
        ctx.half, ctx.again = half, again
        ctx.save_for_backward(x, kept, None if again else made.inner, made.outer)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        half: _Half = ctx.half
        x, kept, *made = ctx.saved_tensors
        memory = half.again(x, *made)
        dx = empty_like(x) if ctx.needs_input_grad[0] else None
        work = Work(empty_like(x), dmade=empty_like(memory.inner), low=half.low(x))
        if isinstance(x, FakeTensor):
            return dx, None, None, *half.fake_gradients()
        found = half.by.feed_forward_backward(
            dout.contiguous(), x, half.sublayer, memory, kept, dx, work, again=ctx.again
        )
        return dx, None, None, *half.gradients(found)


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        half: _Half,
        attending: _Attending,
        again: bool,
        *parameters: Tensor | None,
    ) -> Tensor:
        heads = attending.heads
        made, out = half.made(x), empty_like(x)
        work = Work(empty_like(x), rotated=attending.rotated(x))
        attended = half.outer_input(x)
        workspace = attending.workspace(half.kernels, x)
        if isinstance(x, FakeTensor):
            kept = half.small(x, more=heads.heads * len(heads.documents.places))
        else:
            kept = half.by.self_attention(
                x, half.sublayer, heads, made, attended, out, workspace, work
            )
        ctx.half, ctx.attending, ctx.again = half, attending, again
        ctx.save_for_backward(x, attended, kept, None if again else made.inner, made.outer)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        half: _Half = ctx.half
        x, attended, kept, *made = ctx.saved_tensors
        memory = half.again(x, *made)
        dx = empty_like(x) if ctx.needs_input_grad[0] else None
        work = Work(
            empty_like(x),
            outer=half.outer_input(x),
            dmade=empty_like(memory.inner),
            rotated=ctx.attending.rotated(x),
            low=half.low(x),
        )
        workspace = ctx.attending.workspace(half.kernels, x)
        if isinstance(x, FakeTensor):
            return dx, None, None, None, *half.fake_gradients()
        found = half.by.self_attention_backward(
            dout.contiguous(), x, half.sublayer, ctx.attending.heads, memory, attended, kept, dx,
            workspace, work, again=ctx.again,
        )  # fmt: skip
        return dx, None, None, None, *half.gradients(found)


@frozen(eq=False)
class _Half:
    """Half of a block, and what computes it.

    Attributes:
        kernels: What they are part of.
        by: What computes it.
        parts: The layers, the inner ones first.
        sublayer: The same for the kernels.
    """

    kernels: Kernels
    by: SublayerKernels
    parts: list[LowRank]
    sublayer: Sublayer

    @property
    def layers(self) -> tuple[Adapted, ...]:
        return *self.sublayer.inner, self.sublayer.outer

    def outer_input(self, x: Tensor) -> Tensor:
        """Memory for what the outer layer is given."""
        return empty((len(x), self.sublayer.outer.weight.shape[1]), x)

    def low(self, x: Tensor) -> Tensor:
        """Memory for the thin product of any layer."""
        return empty((len(x) * max(len(each.down) for each in self.layers),), x)

    def made(self, x: Tensor) -> Made:
        """Memory for what the layers make of x."""
        outer = empty_like(x) if self.sublayer.outer.ratio is not None else None
        return Made(self._inner(x), outer)

    def again(self, x: Tensor, inner: Tensor | None, outer: Tensor | None) -> Made:
        """What was made; with memory for what was not kept."""
        return Made(self._inner(x) if inner is None else inner, outer)

    def _inner(self, x: Tensor) -> Tensor:
        return empty((len(x) * sum(len(each.weight) for each in self.sublayer.inner),), x)

    def small(self, x: Tensor, more: int = 0) -> Tensor:
        """As much as kernels keep of a fake x: a token's root and thin products, and more."""
        return x.new_empty(len(x) * (1 + sum(len(each.down) for each in self.layers)) + more)

    def gradients(self, found: Sequence[FactorGradients]) -> list[Tensor | None]:
        """Those of A, B and m of each layer."""
        gradients: list[Tensor | None] = []
        for part, of_part in zip(self.parts, found, strict=True):
            down, up = of_part.down, of_part.up
            if part.down is not None and part.down.dtype != down.dtype:
                down, up = down.to(part.down.dtype), up.to(part.down.dtype)
            gradients += [down, up, of_magnitude(part, of_part.sums)]
        return gradients

    def fake_gradients(self) -> list[Tensor | None]:
        def like(factor: Tensor | None) -> Any:
            return None if factor is None else torch.empty_like(factor)

        return self.gradients(
            [
                FactorGradients(like(each.down), like(each.up), like(each.ratio))
                for each in self.layers
            ]
        )


@torch.no_grad()
def _half_of(
    x: Tensor, norm: nn.Module, layers: Sequence[nn.Module], kernels: Kernels
) -> _Half | None:
    """None where it is not of this kind, or not for these kernels."""
    by = kernels.sublayers()
    if by is None or not (x.dim() == 2 and x.is_contiguous()):
        return None
    if not (type(norm) is RMSNorm and _is_as_written(norm, RMSNorm.forward)):
        return None
    if norm.unit_offset or norm.weight.requires_grad:
        return None
    parts = low_ranks_of(layers)
    if parts is None or not all(_is_adapted(part, x, kernels) for part in parts):
        return None
    *inner, outer = [_adapted(part, x) for part in parts]
    weight = norm.weight.to(x.dtype).contiguous()
    return _Half(kernels, by, parts, Sublayer(weight, norm.eps, tuple(inner), outer))


def _is_adapted(part: LowRank, x: Tensor, kernels: Kernels) -> bool:
    """Whether a layer is nothing but a weight that kernels multiply as it lies, and its update."""
    base = part.base
    if part.down is None or part.dropout or getattr(base, "bias", None) is not None:
        return False
    if not _is_there(base, x, kernels):
        return False
    weight = cast(Tensor, base.weight)
    return weight.stride(-1) == 1 and kernels.adapts(len(x), weight.dtype)


def _adapted(part: LowRank, x: Tensor) -> Adapted:
    weight = cast(Tensor, part.base.weight)
    down, up = factors(part, x)
    return Adapted(weight, down, up, part.scale, ratio_of(part, weight, x.dtype))


def _is_there(base: nn.Module, x: Tensor, kernels: Kernels) -> bool:
    """Whether the layer's weight lies in memory as kernels multiply it."""
    if type(base) is nn.Linear:
        return base.weight.dtype == x.dtype
    return isinstance(base, NarrowLinear) and kernels.multiplies(len(x), base.weight)


def _is_as_written(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether calling the module is calling this, and nobody looks on."""
    if type(module).forward is not forward or "forward" in vars(module):
        return False
    others = module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not others and all(hook is note_norm for hook in module._forward_hooks.values())


def attends_in_one_call(module: nn.Module, layout: Layout) -> TypeGuard[Attention]:
    """Whether it is attention that a call for half a block computes, of these documents."""
    if not fused_now() or type(module) not in (Attention, FusedAttention):
        return False
    attention = cast(Attention, module)
    plain = attention.q_norm is None and attention.k_norm is None and attention.softcap is None
    window = attention.window
    return (
        plain
        and (window is None or max(layout.lengths) <= window)
        and _is_as_written(attention, Attention.forward)
        and type(attention.rotary).rotate is Rotary.rotate
    )


def feeds_in_one_call(module: nn.Module) -> TypeGuard[GatedMLP | FusedGatedMLP]:
    """Whether it is a feed-forward layer that a call for half a block computes."""
    if not fused_now() or type(module) not in (GatedMLP, FusedGatedMLP):
        return False
    return module.activation is F.silu and _is_as_written(module, type(module).forward)


@frozen(eq=False)
class _Attending:
    """How a micro-batch's tokens attend.

    Attributes:
        heads: The same for kernels.
        longest: q `[S, H, Dh]` and k `[S, Hkv, Dh]` of the longest document, without memory.
    """

    heads: Heads
    longest: tuple[Tensor, Tensor]

    def workspace(self, kernels: Kernels, x: Tensor) -> Tensor:
        return attention_workspace(kernels, self.longest, x)

    def rotated(self, x: Tensor) -> Tensor:
        """Memory for q and k."""
        heads = self.heads
        return empty((len(x) * (heads.heads + heads.kv_heads) * heads.head_dim,), x)


def _attending(
    kernels: Kernels, attention: Attention, layout: Layout, x: Tensor
) -> _Attending | None:
    """The same for every block; None where the kernels do not attend such."""
    key = (
        id(kernels),
        attention.rotary,
        attention.widths,
        attention.head_dim,
        attention.scale,
        x.dtype,
    )
    return layout.derived(key, lambda: _find_attending(kernels, attention, layout, x))


def _find_attending(
    kernels: Kernels, attention: Attention, layout: Layout, x: Tensor
) -> _Attending | None:
    head_dim = attention.head_dim
    heads, kv_heads, _ = (width // head_dim for width in attention.widths)
    q, k = (torch.empty(len(x), n, head_dim, device="meta") for n in (heads, kv_heads))
    cos, sin = attention.rotary.tables(layout, x.dtype)
    if not (kernels.attends(q, k) and one_angle_a_token(q, cos, sin)):
        return None
    longest = max(layout.lengths)
    scale = head_dim**-0.5 if attention.scale is None else attention.scale
    half = cos.shape[-1] // 2
    return _Attending(
        Heads(
            cos[..., :half], sin[..., :half], heads, kv_heads, head_dim, scale, documents_of(layout)
        ),
        (q[:longest], k[:longest]),
    )
