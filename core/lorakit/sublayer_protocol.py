"""What kernels that compute a block's halves in one call are told, and what they do; torch-free.

Such a half is x + f(norm(x)): an RMSNorm, layers that share its results, a layer behind.  What
comes between its kernels, in Python and in torch, takes as long as they do where tokens are few.

Shapes: T tokens, D hidden width, H heads, Dh a head's width, and M, the results of the layers that
share their input, together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from attrs import frozen

from lorakit.kernel_protocol import Documents

if TYPE_CHECKING:
    from torch import Tensor


@frozen(eq=False)
class Adapted:
    """A layer with a low-rank update, W x + scale B A x, times a ratio.

    Attributes:
        weight: W `[out, in]`, fp32 or bf16, each row's numbers next to each other.
        down: A `[r, in]`, contiguous.
        up: B `[out, r]`, contiguous.
        scale: Of the update.
        ratio: `[out]`, contiguous; None for nothing (DoRA's m / ||W + s B A||).
    """

    weight: Tensor
    down: Tensor
    up: Tensor
    scale: float
    ratio: Tensor | None = None


@frozen(eq=False)
class Made:
    """Memory for what layers make, which the backward pass reads.

    Attributes:
        inner: T M numbers, of the inner layers, one after the other.
        outer: `[T, D]`, of the outer layer; None where that has no ratio.
    """

    inner: Tensor
    outer: Tensor | None = None


@frozen(eq=False)
class Work:
    """Memory for a call; apart, so that one tensor may take what another has left.

    Attributes:
        input: `[T, D]`, for what is normalized.
        outer: Like the outer layer's input: of a feed-forward layer in the forward pass only, of
            attention in the backward pass only.
        dmade: Like `Made.inner`, in the backward pass only.
        rotated: Of attention: T (H + Hkv) Dh numbers, for q and k.
        low: T r numbers, r the largest rank, in the backward pass only.
    """

    input: Tensor
    outer: Tensor | None = None
    dmade: Tensor | None = None
    rotated: Tensor | None = None
    low: Tensor | None = None


@frozen(eq=False)
class FactorGradients:
    """Of a layer.

    Attributes:
        down: The gradient of A.
        up: That of B.
        sums: `[out]`: over tokens, of the layer's results times their gradients; None where it has
            no ratio.
    """

    down: Tensor
    up: Tensor
    sums: Tensor | None = None


@frozen(eq=False)
class Sublayer:
    """Half of a block.

    Attributes:
        norm: RMSNorm's weight `[D]`, contiguous.
        eps: Keeps the norm's root from being zero.
        inner: Share the norm's results; up to three.
        outer: The layer behind.
    """

    norm: Tensor
    eps: float
    inner: tuple[Adapted, ...]
    outer: Adapted


@frozen(eq=False)
class Heads:
    """How the tokens of a micro-batch attend.

    Attributes:
        cos: `[T, 1, R]` of the angles by which q and k are rotated; as `Kernels.rotate` has it.
        sin: Like cos.
        heads: H of q.
        kv_heads: Of k and of v.
        head_dim: Dh.
        scale: Of the scores.
        documents: Within which tokens attend.
    """

    cos: Tensor
    sin: Tensor
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    documents: Documents


class SublayerKernels(Protocol):
    """Halves of blocks, computed as `Kernels` computes their parts.

    `x`, `dout`, `dx` and `out` are `[T, D]`, contiguous.
    """

    def feed_forward(
        self, x: Tensor, half: Sublayer, made: Made, out: Tensor, work: Work
    ) -> Tensor:
        """out = x + outer(silu(g) u), where the inner layers, or one for both, make g and u.

        Args:
            x: The input.
            half: With an outer layer of F inputs.
            made: Written to.
            out: The result.
            work: Memory for the call.

        Returns:
            What else the backward pass needs: some T (1 + r of each layer) numbers, which the
            estimate counts.
        """
        ...

    def feed_forward_backward(
        self,
        dout: Tensor,
        x: Tensor,
        half: Sublayer,
        made: Made,
        kept: Tensor,
        dx: Tensor | None,
        work: Work,
        *,
        again: bool,
    ) -> list[FactorGradients]:
        """Writes the gradient of x to dx, unless nobody needs that.

        Args:
            dout: The gradient of the result.
            x: As given to `feed_forward`, as are `half` and `made`.
            half: Likewise.
            made: Likewise.
            kept: What that returned.
            dx: None where nobody needs it.
            work: Memory for the call.
            again: What the inner layers make is to be made anew.

        Returns:
            Those of the inner layers and the outer.
        """
        ...

    def self_attention(
        self,
        x: Tensor,
        half: Sublayer,
        heads: Heads,
        made: Made,
        attended: Tensor,
        out: Tensor,
        workspace: Tensor,
        work: Work,
    ) -> Tensor:
        """out = x + outer(attention(q, k, v)), where the inner layers, or one for all, make q, k
        and v, and q and k are rotated.

        Args:
            x: The input.
            half: With an outer layer of H Dh inputs.
            heads: How they attend.
            made: Written to.
            attended: `[T, H Dh]`, the input of the outer layer, for the backward pass.
            out: The result.
            workspace: As for `Kernels.attend`.
            work: Memory for the call.

        Returns:
            What else the backward pass needs: as much, and a number for each head and each token
            of each document.
        """
        ...

    def self_attention_backward(
        self,
        dout: Tensor,
        x: Tensor,
        half: Sublayer,
        heads: Heads,
        made: Made,
        attended: Tensor,
        kept: Tensor,
        dx: Tensor | None,
        workspace: Tensor,
        work: Work,
        *,
        again: bool,
    ) -> list[FactorGradients]:
        """Like `feed_forward_backward`."""
        ...
