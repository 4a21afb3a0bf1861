"""Conformance of kernels: all they compute is as exact as torch's in fp32."""

from __future__ import annotations

import unittest
from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from lorakit.kernel_protocol import Kernels
from lorakit.modules.kernel_attention import documents_of
from lorakit.modules.layout import Layout, Segments, apart
from lorakit.records import KernelLibrary
from lorakit.testing.exactness import (
    attention_of,
    cos_sin,
    ensure_close,
    ensure_each_close,
    rotated,
    torch_threads,
)
from lorakit.testing.failure import ensure
from lorakit.testing.offers import check_offer
from lorakit.testing.sublayers import check_sublayers

SIZES = (64, 70, 257)
LENGTHS = (1, 33, 130)
HEADS = ((4, 2), (3, 3), (4, 1))
HEAD_DIM = 64
OTHER_DOCUMENTS = ((400, 2, 1, 32), (290, 3, 1, 96), (70, 2, 2, 256))
"""Tokens, query heads, key heads and their width."""
SHARING: Sequence[Segments] = (
    (slice(0, 200),),
    (slice(0, 140), slice(200, 460)),
    (slice(0, 140), slice(200, 210), slice(460, 500)),
    (slice(0, 140), slice(500, 500)),
    (slice(0, 5), slice(500, 501)),
    (slice(0, 70), slice(501, 580)),
    (slice(0, 33), slice(580, 590)),
    (slice(590, 629),),
)
"""Documents that begin like others, by less and by more than kernels may take at a time; the fourth
is all another's."""


def check_kernels(record: KernelLibrary) -> None:
    """Checks kernels against float64, beside torch's fp32.

    Raises:
        ConformanceError: Something does not hold.
        unittest.SkipTest: They cannot be used on this machine.
    """
    check_offer(record)
    reason = record.unusable()
    if reason is not None:
        ensure(reason and "\n" not in reason, f"unusable: {reason!r} is no line")
        raise unittest.SkipTest(f"{record.name}: {reason}")
    kernels = record.load()
    torch.manual_seed(0)
    for rows, columns, inner in product(SIZES, SIZES, SIZES):
        _check_product(kernels, torch.randn(rows, inner), torch.randn(columns, inner))
    wide = torch.randn(65, 128)
    _check_product(kernels, wide, torch.randn(64, 128).bfloat16())
    for rank, weight in product((1, 8, 70), (torch.randn(60, 65), torch.randn(70, 65).bfloat16())):
        _check_adapted(kernels, weight, rank, rows=67)
    # A part of a larger weight, and more of everything than kernels take at a time.
    _check_adapted(kernels, torch.randn(650, 703).bfloat16()[:, :700], 12, rows=400)
    g, u, dout = torch.randn(3, 65, 130).mul_(4).unbind()
    if kernels.gates(g):
        _check_gate(kernels, g, u, dout)
    if kernels.normalizes(g):
        _check_norm(kernels, g, dout)
    _check_rotation(kernels)
    usual = ((length, *heads, HEAD_DIM) for length, heads in product(LENGTHS, HEADS))
    for length, heads, kv_heads, head_dim in (*usual, *OTHER_DOCUMENTS):
        q = torch.randn(length, heads, head_dim)
        k, v = torch.randn(2, length, kv_heads, head_dim)
        if kernels.attends(q, k):
            _check_attention(kernels, q, k, v, apart([length]))
    for segments in (apart([5, 40, 1, 129]), SHARING):
        tokens = segments[-1][-1].stop
        q, k, v = (torch.randn(tokens, heads, HEAD_DIM) for heads in (6, 2, 2))
        if kernels.attends(q, k):
            _check_attention(kernels, q, k, v, segments)
    if (sublayers := kernels.sublayers()) is not None:
        check_sublayers(kernels, sublayers, SHARING)


def _check_product(kernels: Kernels, x: Tensor, weight: Tensor) -> None:
    if not kernels.multiplies(len(x), weight):
        return
    # As a step has them: a part of a larger tensor.
    x = torch.cat([x, x], dim=1)[:, : x.shape[1]]
    for transposed in (True, False):
        stored = weight if transposed else weight.t().contiguous()
        start = torch.randn(len(x), len(weight))
        for add, scale in product((False, True), (None, torch.rand(x.shape[1]) + 0.5)):
            plus = start.double() if add else 0
            scaled = x if scale is None else x * scale
            wide = x.double() if scale is None else x.double() * scale
            exact = wide @ weight.double().t() + plus
            theirs = scaled @ weight.float().t() + (start if add else 0)
            results = []
            for threads in (1, 2):
                out = start.clone()
                with torch_threads(threads):
                    kernels.multiply(out, x, stored, transposed=transposed, add=add, scale=scale)
                results.append(out)
            how = f"multiply: transposed={transposed}, add={add}, scaled={scale is not None}"
            ensure_close(results[0], theirs, exact, how)
            ensure(torch.equal(*results), f"{how}: depends on the number of threads")


def _check_adapted(kernels: Kernels, weight: Tensor, rank: int, rows: int) -> None:
    """Layers `[N, K]` with an update."""
    outputs, inputs = weight.shape
    scale = 0.5
    if not kernels.adapts(rows, weight.dtype):
        return
    down, up = torch.randn(rank, inputs), torch.randn(outputs, rank)
    # As a step has them: parts of larger tensors.
    x = torch.randn(rows, inputs + 3)[:, :inputs]
    dout = torch.randn(rows, outputs + 3)[:, :outputs]
    start = torch.randn(rows, inputs)
    for add, ratio in product((False, True), (None, torch.rand(outputs) + 0.5)):
        plus = start if add else torch.zeros_like(start)
        given = (x, weight.float(), down, up, dout, plus)
        exact = _adapted([each.double() for each in given], scale, ratio)
        theirs = _adapted(given, scale, ratio)
        found = []
        for threads in (1, 2):
            out, dx = torch.empty(rows, outputs), start.clone()
            with torch_threads(threads):
                low = kernels.adapt(x, weight, down, up, scale, out, ratio=ratio)
                gradients = kernels.adapt_backward(
                    dout, x, low, weight, down, up, scale, dx, add=add, ratio=ratio
                )
                alone = kernels.adapt_backward(
                    dout, x, low, weight, down, up, scale, None, add=False, ratio=ratio
                )
            ensure(
                all(map(torch.equal, gradients, alone)),
                "adapt_backward: gradients of A and B depend on whether x's is wanted",
            )
            found.append((out, dx, *gradients))
        how = f"{weight.dtype}, rank {rank}, add={add}, ratio={ratio is not None}"
        names = [f"adapt, {how}", *(f"adapt_backward: d{name}, {how}" for name in ("x", "A", "B"))]
        ensure_each_close(names, found[0], theirs, exact, found[1])


def _adapted(given: Sequence[Tensor], scale: float, ratio: Tensor | None) -> tuple[Tensor, ...]:
    """The result, and the gradients of x, on top of `plus`, of A and of B."""
    x, weight, down, up, dout, plus = given
    inputs = [each.clone().requires_grad_() for each in (x, down, up)]
    x, down, up = inputs
    out = x @ weight.t() + scale * (x @ down.t()) @ up.t()
    out = out if ratio is None else out * ratio
    dx, d_down, d_up = torch.autograd.grad(out, inputs, dout)
    return out.detach(), dx + plus, d_down, d_up


def _check_gate(kernels: Kernels, g: Tensor, u: Tensor, dout: Tensor) -> None:
    exact = _gated(g.double(), u.double(), dout.double())
    theirs = _gated(g, u, dout)
    # As one layer for both makes them: halves of a tensor.
    g, u = torch.cat([g, u], dim=1).chunk(2, dim=1)
    found = []
    for threads in (1, 2):
        out, dg, du = torch.empty_like(dout), dout.clone(), torch.empty_like(dout)
        with torch_threads(threads):
            kernels.gate(g, u, out)
            kernels.gate_backward(dg, g, u, dg, du)
        found.append((out, dg, du))
    names = ("gate", "gate_backward: dg", "gate_backward: du")
    ensure_each_close(names, found[0], theirs, exact, found[1])


def _check_norm(kernels: Kernels, x: Tensor, dout: Tensor) -> None:
    weight, eps = torch.rand(x.shape[1]) + 0.5, 1e-5

    def norm(x: Tensor, weight: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        out = F.rms_norm(x, weight.shape, weight, eps)
        return out.detach(), torch.autograd.grad(out, x, dout)[0]

    exact, theirs = norm(x.double(), weight.double(), dout.double()), norm(x, weight, dout)
    # As a step has them: a part of a larger tensor.
    x = torch.cat([x, x], dim=1)[:, : x.shape[1]]
    found = []
    for threads in (1, 2):
        out, dx = torch.empty_like(dout), torch.empty_like(dout)
        with torch_threads(threads):
            kept = kernels.normalize(x, weight, eps, out)
            kernels.normalize_backward(dout, x, weight, kept, dx)
        found.append((out, dx))
    names = ("normalize", "normalize_backward")
    ensure_each_close(names, found[0], theirs, exact, found[1])


def _check_rotation(kernels: Kernels) -> None:
    tokens, heads = 65, 3
    # A whole head, one that does not fill vectors, a part of one.
    for head_dim, half in ((64, 32), (40, 20), (80, 16)):
        x = torch.randn(tokens, heads, head_dim)
        if not kernels.rotates(x):
            continue
        angles = torch.randn(tokens, 1, half)
        cos, sin = (torch.cat([part, part], dim=-1)[..., :half] for part in cos_sin(angles))
        exact = rotated(x.double(), *cos_sin(angles.double()))
        found = []
        for threads in (1, 2):
            out, back = torch.empty_like(x), torch.empty_like(x)
            with torch_threads(threads):
                # As one layer for q and more makes it.
                kernels.rotate(torch.cat([x, x], dim=1)[:, :heads], cos, sin, out, back=False)
                kernels.rotate(out, cos, sin, back, back=True)
            found.append((out, back))
        theirs = rotated(x, cos, sin)
        names = ("rotate", "rotate back")
        ensure_each_close(names, found[0], (theirs, x), (exact, x.double()), found[1])


def _gated(g: Tensor, u: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    """silu(g) u, and the gradients of g and u."""
    inputs = [x.clone().requires_grad_() for x in (g, u)]
    out = F.silu(inputs[0]) * inputs[1]
    return (out.detach(), *torch.autograd.grad(out, inputs, dout))


def _check_attention(
    kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, segments: Sequence[Segments]
) -> None:
    scale = 0.2
    # As parts of one larger tensor, as layers that share their input make them.
    q, k, v, dout = (
        torch.cat([x, x], dim=1)[:, : x.shape[1]] for x in (q, k, v, torch.randn_like(q))
    )
    exact = _attention([x.double() for x in (q, k, v)], dout.double(), scale, segments)
    theirs = _attention((q, k, v), dout, scale, segments)
    layout = Layout.of_segments(segments)
    documents, longest = documents_of(layout), max(layout.lengths)
    found = []
    for threads in (1, 2):
        with torch_threads(threads):
            out = torch.empty(q.shape)
            size = kernels.attention_bytes(q[:longest], k[:longest])
            workspace = torch.empty(size, dtype=torch.uint8)
            kept = kernels.attend(q, k, v, documents, scale, out, workspace)
            into = torch.empty(q.shape), torch.empty(k.shape), torch.empty(v.shape)
            kernels.attend_backward(
                dout, q, k, v, documents, out, kept, scale, into, workspace.clone()
            )
        found.append((out, *into))
    parts = ("attend", *(f"attend_backward: d{name}" for name in "qkv"))
    names = [f"{part}, documents of {layout.lengths} tokens" for part in parts]
    ensure_each_close(names, found[0], theirs, exact, found[1])


def _attention(
    given: Sequence[Tensor], dout: Tensor, scale: float, segments: Sequence[Segments]
) -> tuple[Tensor, ...]:
    """The result `[T, H, Dh]` and the gradients of q, k and v, by plain autograd."""
    inputs = [x.clone().requires_grad_() for x in given]
    out = attention_of(*inputs, scale=scale, segments=segments)
    return (out.detach(), *torch.autograd.grad(out, inputs, dout))
