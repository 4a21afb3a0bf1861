"""What kernels that a plugin brings compute, torch-free.

Shapes: T tokens, D hidden width, F inner width, H heads, Hkv key heads, Dh a head's width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from attrs import frozen

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lorakit.sublayer_protocol import SublayerKernels


@frozen
class Documents:
    """Where the tokens of a micro-batch's documents lie.

    Attributes:
        places: `[S]` int64, contiguous: for each token of each document, one after the other, in
            which of T rows it is.
        lengths: `[N, 2]` int64, contiguous: of each document its tokens, and how many of them, the
            last, are its own.  The others are those of documents before it.
    """

    places: Tensor
    lengths: Tensor


class Kernels(Protocol):
    """What takes most of a step in fp32 on a CPU, to fp32's accuracy.

    Tensors are fp32 and on the CPU, each row's numbers next to each other in memory; weights may
    be bf16 too.  Results do not depend on the number of threads, `torch.get_num_threads()` of them.
    """

    def multiplies(self, rows: int, weight: Tensor) -> bool:
        """Whether `multiply` takes such a weight, and is faster than torch for so many rows."""
        ...

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
        """out = x W, or x W^T where `transposed`; out += that where `add`.

        Args:
            out: `[T, N]`.
            x: `[T, K]`.
            weight: `[K, N]`, or transposed `[N, K]`.
            scale: `[K]`, contiguous, what x's columns are multiplied by first; None for nothing.
        """
        ...

    def adapts(self, rows: int, dtype: torch.dtype) -> bool:
        """Whether `adapt` is faster than torch for so many rows and a weight of that dtype, fp32 or
        one that `multiplies` has taken."""
        ...

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
        """out = x W^T + scale (x A^T) B^T, times the ratio: a layer with a low-rank update.

        Args:
            x: `[T, K]`.
            weight: W `[N, K]`.
            down: A `[r, K]`, contiguous.
            up: B `[N, r]`, contiguous.
            scale: Of the update.
            out: `[T, N]`.
            ratio: `[N]`, contiguous; None for nothing (DoRA's m / ||W + s B A||).

        Returns:
            scale x A^T `[T, r]`, contiguous.
        """
        ...

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
        """The gradients of A and of B, given that of out.

        Args:
            dout: `[T, N]`.
            x: As given to `adapt`, as are `weight`, `down`, `up`, `scale` and `ratio`.
            low: What that returned.
            dx: `[T, K]`, where x's gradient is written to, or added to where `add`; None where
                nobody needs it.
            add: Whether dx holds anything yet.
            ratio: Likewise.
        """
        ...

    def sublayers(self) -> SublayerKernels | None:
        """What computes halves of blocks in one call each, if anything does."""
        ...

    def gates(self, g: Tensor) -> bool:
        """Whether `gate` is faster than torch for g `[T, F]`."""
        ...

    def gate(self, g: Tensor, u: Tensor, out: Tensor) -> None:
        """out = silu(g) u, each `[T, F]`."""
        ...

    def gate_backward(self, dout: Tensor, g: Tensor, u: Tensor, dg: Tensor, du: Tensor) -> None:
        """Writes the gradients of g and u to dg and du, one of which may be `dout` itself."""
        ...

    def normalizes(self, x: Tensor) -> bool:
        """Whether `normalize` is faster than torch for x `[T, D]`."""
        ...

    def normalize(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> Tensor:
        """out = x w / sqrt(mean(x^2) + eps), the mean over a row.

        Args:
            x: `[T, D]`.
            weight: w `[D]`, contiguous.
            eps: Keeps the root from being zero.
            out: `[T, D]`, contiguous.

        Returns:
            What `normalize_backward` needs of it.
        """
        ...

    def normalize_backward(
        self, dout: Tensor, x: Tensor, weight: Tensor, kept: Tensor, dx: Tensor
    ) -> None:
        """Writes the gradient of x to dx, contiguous, given that of out; `kept` is what `normalize`
        returned."""
        ...

    def rotates(self, x: Tensor) -> bool:
        """Whether `rotate` is faster than torch for x `[T, H, Dh]`."""
        ...

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, *, back: bool) -> None:
        """Turns element i of a head and element i + R, i < R, by an angle.

        Args:
            x: `[T, H, Dh]`, a token's heads one after the other.
            cos: `[T, 1, R]` of the angles; 2 R is at most Dh, and elements behind it stay.
            sin: Like cos.
            out: `[T, H, Dh]`, contiguous.
            back: Turn the other way, as gradients are.
        """
        ...

    def attends(self, q: Tensor, k: Tensor) -> bool:
        """Whether `attend` is faster than torch for a micro-batch of q `[T, H, Dh]` and k
        `[T, Hkv, Dh]`, its documents together; both may be without memory."""
        ...

    def attention_bytes(self, q: Tensor, k: Tensor) -> int:
        """Of workspace that `attend` and `attend_backward` need, the longest document being one of
        q `[T, H, Dh]` and k `[T, Hkv, Dh]`, which may be without memory."""
        ...

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
        """out = softmax(scale q k^T) v, each token seeing itself and those before it in its
        document.

        Args:
            q: `[T, H, Dh]`, a token's heads one after the other, as with all.
            k: `[T, Hkv, Dh]`; query head h sees key head h // (H / Hkv).
            v: Like k.
            documents: Each of the T rows is some document's own.
            scale: Of the scores.
            out: Like q, contiguous.
            workspace: `attention_bytes` of memory, for this call only.

        Returns:
            What `attend_backward` needs of it besides `out`.
        """
        ...

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
        """Writes the gradients of q, k and v to `into`, contiguous, given that of out; `kept` is
        what `attend` returned."""
        ...
