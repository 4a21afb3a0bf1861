"""The kernels of `native/` for torch's tensors."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from lorakit.kernel_protocol import Documents
from lorakit.sublayer_protocol import SublayerKernels
from lorakit_x86 import AMX, AVX512
from lorakit_x86.arguments import layer, places, threads
from lorakit_x86.sublayers import NativeSublayers

FEWEST_ROWS = 64
"""Rows from which on a product on AMX is faster than MKL's."""
NARROWEST = 64
"""Width of a weight from which on it is."""

FEWEST_ADAPTED = 16
"""Rows from which on a product with an fp32 weight, which is copied first, is as fast as MKL's."""

SHORTEST = 32
"""Tokens of a micro-batch from which on attention is faster than torch's."""
HEAD_DIMS = range(32, 257, 32)


class AVX512Kernels:
    """See `lorakit.kernel_protocol.Kernels`.

    Args:
        native: What is compiled.
    """

    units = AVX512

    def __init__(self, native: ModuleType) -> None:
        self.native = native
        self._sublayers = NativeSublayers(native, self.units)

    def multiplies(self, rows: int, weight: Tensor) -> bool:
        # Others would have to widen it first.
        return weight.dtype == torch.bfloat16

    def multiply(
        self,
        out: Tensor,
        x: Tensor,
        weight: Tensor,
        *,
        transposed: bool,
        add: bool,
        scale: Tensor | None = None,
    ) -> None:
        rows, inner = x.shape
        self.native.multiply(
            self.units,
            out.data_ptr(),
            out.stride(0),
            x.data_ptr(),
            x.stride(0),
            0 if scale is None else scale.data_ptr(),
            weight.data_ptr(),
            weight.stride(0),
            weight.dtype == torch.bfloat16,
            transposed,
            rows,
            out.shape[1],
            inner,
            add,
            *threads(),
        )

    def adapts(self, rows: int, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16 or rows >= FEWEST_ADAPTED

    def adapt(
        self,
        x: Tensor,
        weight: Tensor,
        down: Tensor,
        up: Tensor,
        scale: float,
        out: Tensor,
        *,
        ratio: Tensor | None = None,
    ) -> Tensor:
        low = x.new_empty(len(x), len(down))
        given = layer(len(x), weight, down, up, scale, ratio)
        self.native.adapt(self.units, *places(x, out), low.data_ptr(), given, *threads())
        return low

    def adapt_backward(
        self,
        dout: Tensor,
        x: Tensor,
        low: Tensor,
        weight: Tensor,
        down: Tensor,
        up: Tensor,
        scale: float,
        dx: Tensor | None,
        *,
        add: bool,
        ratio: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        d_low, d_down, d_up = (torch.empty_like(each) for each in (low, down, up))
        self.native.adapt_backward(
            self.units,
            *places(dout, x),
            low.data_ptr(),
            d_low.data_ptr(),
            *((0, 0) if dx is None else places(dx)),
            add,
            d_down.data_ptr(),
            d_up.data_ptr(),
            layer(len(x), weight, down, up, scale, ratio),
            *threads(),
        )
        return d_down, d_up

    def sublayers(self) -> SublayerKernels:
        return self._sublayers

    def gates(self, g: Tensor) -> bool:
        return True

    def gate(self, g: Tensor, u: Tensor, out: Tensor) -> None:
        self.native.gate(*places(out, g, u), *out.shape, *threads())

    def gate_backward(self, dout: Tensor, g: Tensor, u: Tensor, dg: Tensor, du: Tensor) -> None:
        self.native.gate_backward(*places(dg, du, dout, g, u), *g.shape, *threads())

    def normalizes(self, x: Tensor) -> bool:
        return True

    def normalize(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
        roots = x.new_empty(len(x))
        given = out.data_ptr(), roots.data_ptr(), x.data_ptr(), x.stride(0), weight.data_ptr()
        self.native.normalize(*given, eps, *x.shape, *threads())
        return roots

    def normalize_backward(
        self, dout: Tensor, x: Tensor, weight: Tensor, kept: Tensor, dx: Tensor
    ) -> None:
        given = dx.data_ptr(), *places(dout, x), weight.data_ptr(), kept.data_ptr()
        self.native.normalize_backward(*given, *x.shape, *threads())

    def rotates(self, x: Tensor) -> bool:
        return True

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, back: bool) -> None:
        given = out.data_ptr(), x.data_ptr(), x.stride(0), cos.data_ptr(), sin.data_ptr()
        half = cos.shape[-1]
        self.native.rotate(*given, cos.stride(0), back, *x.shape, half, *threads())

    def attends(self, q: Tensor, k: Tensor) -> bool:
        return len(q) >= SHORTEST and q.shape[-1] in HEAD_DIMS

    def attention_bytes(self, q: Tensor, k: Tensor) -> int:
        return self.native.attention_bytes(self.units, len(q), *_heads(q, k), threads()[0])

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents,
        scale: float,
        out: Tensor,
        workspace: Tensor,
    ) -> Tensor:
        normalizer = q.new_empty(q.shape[1], len(documents.places))
        attended = _attended(q, k, v, documents, scale, (out, normalizer, workspace))
        self.native.attend(self.units, attended, *threads())
        return normalizer

    def attend_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        documents: Documents,
        out: Tensor,
        kept: Tensor,
        scale: float,
        into: tuple[Tensor, Tensor, Tensor],
        workspace: Tensor,
    ) -> None:
        self.native.attend_backward(
            self.units,
            *places(dout),
            *(gradient.data_ptr() for gradient in into),
            _attended(q, k, v, documents, scale, (out, kept, workspace)),
            *threads(),
        )


class AMXKernels(AVX512Kernels):
    """The same, but products and attention on AMX."""

    units = AMX

    def multiplies(self, rows: int, weight: Tensor) -> bool:
        worthwhile = rows >= FEWEST_ROWS and min(weight.shape) >= NARROWEST
        return super().multiplies(rows, weight) or (worthwhile and weight.dtype == torch.float32)

    def adapts(self, rows: int, dtype: torch.dtype) -> bool:
        return dtype == torch.bfloat16 or rows >= FEWEST_ROWS


def _attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    scale: float,
    others: tuple[Tensor, Tensor, Tensor],
) -> tuple[float, ...]:
    """Attention within documents: where all is, and sizes; of the others, result, normalizer and
    workspace."""
    return (
        *places(q, k, v),
        *(x.data_ptr() for x in others),
        *_heads(q, k),
        scale,
        documents.places.data_ptr(),
        documents.lengths.data_ptr(),
        len(documents.lengths),
    )


def _heads(q: Tensor, k: Tensor) -> tuple[int, int, int]:
    """How many of q and of k, and how wide they are."""
    return q.shape[1], k.shape[1], q.shape[2]
