"""Conformance of kernels that compute halves of blocks: as exact as torch's in fp32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from attrs import evolve
from torch import Tensor

from lorakit.kernel_protocol import Kernels
from lorakit.modules.kernel_attention import documents_of
from lorakit.modules.layout import Layout, Segments, apart
from lorakit.sublayer_protocol import (
    Adapted,
    FactorGradients,
    Heads,
    Made,
    Sublayer,
    SublayerKernels,
    Work,
)
from lorakit.testing.exactness import (
    attention_of,
    cos_sin,
    ensure_each_close,
    rotated,
    torch_threads,
)

EPS, SCALE = 1e-5, 0.5
Half = Callable[[Tensor, Sublayer], Tensor]
"""x + f(norm(x)), by torch."""


def check_sublayers(kernels: Kernels, by: SublayerKernels, sharing: Sequence[Segments]) -> None:
    """Checks them against float64, beside torch's fp32.

    Args:
        kernels: What they are part of.
        by: What computes halves of blocks.
        sharing: Documents that begin like others.

    Raises:
        ConformanceError: Something does not hold.
    """
    # Rows and widths that fill no vectors, layers apart and in one, ranks of their own.
    for rows, apart_, adapted in product((1, 67, 130), (True, False), ("plain", "bf16", "ratios")):
        _check_feed_forward(by, rows, 70, 90, apart_, adapted)
    for segments in (apart([5, 40, 1, 129]), sharing):
        for apart_, adapted in product((True, False), ("plain", "ratios")):
            q, k = (torch.empty(segments[-1][-1].stop, n, 64) for n in (4, 2))
            if kernels.attends(q, k):
                _check_self_attention(kernels, by, segments, apart_, adapted)


def _layer(outputs: int, inputs: int, rank: int, adapted: str) -> Adapted:
    weight = torch.randn(outputs, inputs) / inputs**0.5
    return Adapted(
        weight.bfloat16() if adapted == "bf16" else weight,
        torch.randn(rank, inputs) / inputs**0.5,
        torch.randn(outputs, rank),
        SCALE,
        torch.rand(outputs) + 0.5 if adapted == "ratios" else None,
    )


def _sublayer(widths: Sequence[int], apart_: bool, dim: int, inputs: int, adapted: str) -> Sublayer:
    """With inner layers of these widths, or one of all."""
    each = widths if apart_ else [sum(widths)]
    inner = tuple(_layer(width, dim, 3 + i, adapted) for i, width in enumerate(each))
    return Sublayer(torch.rand(dim) + 0.5, EPS, inner, _layer(dim, inputs, 8, adapted))


def _check_feed_forward(
    by: SublayerKernels, rows: int, dim: int, hidden: int, apart_: bool, adapted: str
) -> None:
    half = _sublayer([hidden, hidden], apart_, dim, hidden, adapted)
    x, dout = torch.randn(2, rows, dim).unbind()

    def by_torch(x: Tensor, half: Sublayer) -> Tensor:
        g, u = torch.cat(_inner(x, half), dim=-1).chunk(2, dim=-1)
        return x + _applied(half.outer, F.silu(g) * u)

    def ours(dx: Tensor | None, *, again: bool) -> tuple[Tensor, list[FactorGradients]]:
        made, out = _made(x, half), torch.empty_like(x)
        work = Work(torch.empty_like(x), outer=torch.empty(rows, hidden))
        kept = by.feed_forward(x, half, made, out, work)
        if again:
            made.inner.fill_(torch.nan)
        dmade, low = torch.empty_like(made.inner), torch.empty(rows * 8)
        work = Work(torch.empty_like(x), dmade=dmade, low=low)
        return out, by.feed_forward_backward(
            dout, x, half, made, kept, dx, work, again=again
        )  # fmt: skip

    how = f"{rows} rows, {len(half.inner)} inner layers, {adapted}"
    _compare(f"feed_forward, {how}", half, by_torch, ours, x, dout)


def _check_self_attention(
    kernels: Kernels, by: SublayerKernels, segments: Sequence[Segments], apart_: bool, adapted: str
) -> None:
    dim, heads, kv_heads, head_dim = 70, 4, 2, 64
    widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
    half = _sublayer(widths, apart_, dim, widths[0], adapted)
    layout = Layout.of_segments(segments)
    rows, longest = len(layout.positions), max(layout.lengths)
    x, dout = torch.randn(2, rows, dim).unbind()
    angles = torch.randn(rows, 1, head_dim // 2)
    told = Heads(*cos_sin(angles), heads, kv_heads, head_dim, 0.2, documents_of(layout))

    def by_torch(x: Tensor, half: Sublayer) -> Tensor:
        parts = torch.cat(_inner(x, half), dim=-1).split(widths, dim=-1)
        q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in parts)
        q, k = (rotated(part, *cos_sin(angles.to(x.dtype))) for part in (q, k))
        attended = attention_of(q, k, v, scale=0.2, segments=segments)
        return x + _applied(half.outer, attended.flatten(-2))

    def ours(dx: Tensor | None, *, again: bool) -> tuple[Tensor, list[FactorGradients]]:
        made, out, attended = _made(x, half), torch.empty_like(x), torch.empty(rows, widths[0])
        q, k = (torch.empty(longest, n, head_dim, device="meta") for n in (heads, kv_heads))
        workspace = torch.empty(kernels.attention_bytes(q, k), dtype=torch.uint8)
        turned = torch.empty(rows * (heads + kv_heads) * head_dim)
        work = Work(torch.empty_like(x), rotated=turned)
        kept = by.self_attention(x, half, told, made, attended, out, workspace, work)
        if again:
            made.inner.fill_(torch.nan)
        work = Work(
            torch.empty_like(x),
            outer=torch.empty_like(attended),
            dmade=torch.empty_like(made.inner),
            rotated=turned,
            low=torch.empty(rows * 8),
        )
        return out, by.self_attention_backward(
            dout, x, half, told, made, attended, kept, dx, workspace, work, again=again
        )

    how = f"documents of {layout.lengths}, {len(half.inner)} inner layers, {adapted}"
    _compare(f"self_attention, {how}", half, by_torch, ours, x, dout)


def _compare(
    name: str,
    half: Sublayer,
    by_torch: Half,
    ours: Callable[..., tuple[Tensor, list[FactorGradients]]],
    x: Tensor,
    dout: Tensor,
) -> None:
    exact = _by_autograd(by_torch, _wide(half), x.double(), dout.double())
    theirs = _by_autograd(by_torch, _wide(half, torch.float32), x, dout)
    names = [f"{name}: {each}" for each in ("result", "dx", *_names(half))]
    found = []
    for threads, again in ((1, False), (2, False), (2, True)):
        dx = torch.empty_like(x)
        with torch_threads(threads):
            out, gradients = ours(dx, again=again)
            _, alone = ours(None, again=again)
        found.append([out, dx, *_flat(gradients)])
        ensure_each_close(names[2:], _flat(alone), theirs[2:], exact[2:], _flat(gradients))
    ensure_each_close(names, found[0], theirs, exact, found[1])
    ensure_each_close(names, found[2], theirs, exact, found[1])


def _by_autograd(half: Half, record: Sublayer, x: Tensor, dout: Tensor) -> list[Tensor]:
    """The result, and the gradients as kernels give them."""
    x = x.clone().requires_grad_()
    layers = [
        evolve(
            each,
            down=each.down.clone().requires_grad_(),
            up=each.up.clone().requires_grad_(),
            ratio=None if each.ratio is None else each.ratio.clone().requires_grad_(),
        )
        for each in (*record.inner, record.outer)
    ]
    out = half(x, evolve(record, inner=tuple(layers[:-1]), outer=layers[-1]))
    wanted = [
        factor
        for each in layers
        for factor in (each.down, each.up, each.ratio)
        if factor is not None
    ]
    dx, *gradients = torch.autograd.grad(out, [x, *wanted], dout)
    # y = ratio z, so that the ratio's gradient, sum(dy z), is sum(dy y) / ratio.
    ratios = {id(each.ratio) for each in layers if each.ratio is not None}
    scaled = [
        gradient * factor.detach() if id(factor) in ratios else gradient
        for gradient, factor in zip(gradients, wanted, strict=True)
    ]
    return [out.detach(), dx, *scaled]


def _inner(x: Tensor, half: Sublayer) -> list[Tensor]:
    normal = F.rms_norm(x, half.norm.shape, half.norm, half.eps)
    return [_applied(each, normal) for each in half.inner]


def _applied(layer: Adapted, x: Tensor) -> Tensor:
    y = x @ layer.weight.t() + layer.scale * (x @ layer.down.t()) @ layer.up.t()
    return y if layer.ratio is None else y * layer.ratio


def _wide(half: Sublayer, dtype: torch.dtype = torch.float64) -> Sublayer:
    def wide(layer: Adapted) -> Adapted:
        ratio = None if layer.ratio is None else layer.ratio.to(dtype)
        weight, down, up = (each.to(dtype) for each in (layer.weight, layer.down, layer.up))
        return Adapted(weight, down, up, layer.scale, ratio)

    inner = tuple(map(wide, half.inner))
    return Sublayer(half.norm.to(dtype), half.eps, inner, wide(half.outer))


def _made(x: Tensor, half: Sublayer) -> Made:
    inner = torch.empty(len(x) * sum(len(each.weight) for each in half.inner))
    return Made(inner, None if half.outer.ratio is None else torch.empty_like(x))


def _names(half: Sublayer) -> list[str]:
    count = len(half.inner) + 1
    names = ("dA", "dB") if half.outer.ratio is None else ("dA", "dB", "sums")
    return [f"{name} of layer {i}" for i in range(count) for name in names]


def _flat(gradients: Sequence[FactorGradients]) -> list[Tensor]:
    return [
        tensor
        for each in gradients
        for tensor in (each.down, each.up, each.sums)
        if tensor is not None
    ]
