"""Products with a frozen weight, by whichever library is the fastest on this CPU.

torch computes fp32 products with Intel's MKL, which on AMD processors does not use AVX-512: there
oneDNN, which torch carries as well, is more than twice as fast (on a Zen 5 core 250 GFLOP/s
where MKL reaches 110).  `lorakit.runtime` decides once, by the processor, so that a run is
repeated bit for bit on the same machine.  A plugin may bring kernels of its own
(`lorakit.kernels`), which are asked first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lorakit.arena import empty

if TYPE_CHECKING:
    from lorakit.kernel_protocol import Kernels

_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_convolution: Any = getattr(torch.ops.mkldnn, "_convolution_pointwise_", None)
_ROWS = 32
_PART = 2**20
_LARGE = 2**20
"""Numbers that a thin product is added to, from which on oneDNN is the faster at it."""
_chosen = {"onednn": False}
_kernels: list[Kernels] = []
"""Those that a plugin brings, if any are in use; they come before oneDNN."""


def use_kernels(kernels: Kernels | None) -> None:
    """Has fp32 products on the CPU computed by these where they are the faster; None: by torch."""
    _kernels[:] = [kernels] if kernels is not None else []


def kernels_in_use() -> Kernels | None:
    """Those that are asked for products of tensors they know."""
    return _kernels[0] if _kernels else None


def kernels_for(x: Tensor) -> Kernels | None:
    """Those in use, if they know such tensors as x `[T, ...]`; a compiler knows none of theirs."""
    if not _kernels or torch.compiler.is_compiling():
        return None
    if x.dtype != torch.float32 or not _is_there(x):
        return None
    return _kernels[0]


def kernels_for_such(x: Tensor) -> Kernels | None:
    """The same; of a fake x, those for what it stands for."""
    pretended = isinstance(x, FakeTensor) and x.dtype == torch.float32 and x.device.type == "cpu"
    return kernels_in_use() if pretended else kernels_for(x)


def multiplies_as_stored(x: Tensor, weight: Tensor) -> bool:
    """Whether products of x with a weight of another dtype are computed from it as it is; of fake
    tensors, whether they would be."""
    return _multiplying(x, weight) is not None


def _multiplying(x: Tensor, weight: Tensor) -> Kernels | None:
    kernels = kernels_for_such(x)
    if kernels is None or weight.device.type != "cpu" or weight.stride(-1) != 1:
        return None
    return kernels if kernels.multiplies(len(x), weight) else None


def _is_there(tensor: Tensor) -> bool:
    """Not a fake or meta tensor, nor on another device."""
    return type(tensor) is Tensor and tensor.device.type == "cpu"


def use_onednn(on: bool) -> bool:
    """Has fp32 products on the CPU computed by oneDNN, where torch has it; returns whether."""
    _chosen["onednn"] = on and _linear is not None and torch.backends.mkldnn.is_available()
    return _chosen["onednn"]


def onednn_is_on() -> bool:
    """Whether `use_onednn` has turned it on."""
    return _chosen["onednn"]


def row_multiple() -> int:
    """Of how many rows products are to be a multiple.

    oneDNN keeps what it has compiled for a shape, some 400 KB each: micro-batches of rounded
    lengths are of few shapes.
    """
    return _ROWS if onednn_is_on() else 1


def times_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T `[T, out]`, of x `[T, in]` and W `[out, in]`."""
    if kernels := _multiplying(x, weight):
        y = empty((len(x), len(weight)), x)
        _multiply(kernels, y, x, weight, transposed=True, add=False)
        return y
    if by_onednn(x, weight):
        made: Tensor = _linear(x.contiguous(), weight, None, "none", [], "")
        return made
    if _makes_its_result(x):
        return x @ weight.t()
    return torch.mm(x, weight.t(), out=empty((len(x), len(weight)), x))


def times(
    dy: Tensor, weight: Tensor, plus: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """dy W, plus a `[T, in]` that may be written over: of dy `[T, out]`, its columns times a scale
    `[out]` first if there is one, and W `[out, in]`."""
    if kernels := _multiplying(dy, weight):
        add = plus is not None
        into = empty((len(dy), weight.shape[1]), dy) if plus is None else plus
        _multiply(kernels, into, dy, weight, transposed=False, add=add, scale=scale)
        return into
    if scale is not None:
        dy = dy * scale
    if by_onednn(dy, weight):
        # Of a strided view, oneDNN takes a hundred times as long.
        dy = dy.contiguous()
        dx: Tensor
        if plus is None:
            dx = _linear(dy, weight.t(), None, "none", [], "")
        else:
            dx = _linear.binary(dy, plus, weight.t(), None, "add")
        return dx
    if plus is not None:
        return plus.addmm_(dy, weight)
    if _makes_its_result(dy):
        return dy @ weight
    return torch.mm(dy, weight, out=empty((len(dy), weight.shape[1]), dy))


def _makes_its_result(x: Tensor) -> bool:
    """Whether a product of a fake x stands for one of oneDNN's, which takes no memory for it."""
    return _chosen["onednn"] and isinstance(x, FakeTensor) and x.dtype == torch.float32


def times_transposed_into(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """out = x W^T."""
    if kernels := _multiplying(x, weight):
        _multiply(kernels, out, x, weight, transposed=True, add=False)
    elif by_onednn(x, weight):
        # oneDNN's product cannot be written into a given tensor, and copying it costs little.  In
        # parts: whole logits, large and soon freed, would leave holes in the heap.
        count = max(1, _PART // len(x))
        for start in range(0, len(weight), count):
            part = slice(start, start + count)
            out[:, part].copy_(times_transposed(x, weight[part]))
    else:
        torch.mm(x, weight.t(), out=out)


def times_into(out: Tensor, dy: Tensor, weight: Tensor, *, add: bool) -> None:
    """out = dy W, or out += dy W."""
    if kernels := _multiplying(dy, weight):
        _multiply(kernels, out, dy, weight, transposed=False, add=add)
    elif by_onednn(dy, weight):
        out.copy_(times(dy, weight, plus=out if add else None))
    else:
        out.addmm_(dy, weight, beta=1 if add else 0)


def _multiply(
    kernels: Kernels,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    transposed: bool,
    add: bool,
    scale: Tensor | None = None,
) -> None:
    # Of fake tensors only the results count, which are there.
    if not isinstance(x, FakeTensor):
        kernels.multiply(out, in_rows(x), weight, transposed=transposed, add=add, scale=scale)


def in_rows(x: Tensor) -> Tensor:
    """x, the numbers of each row next to each other, as kernels take it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def transposed_times(low: Tensor, z: Tensor) -> Tensor:
    """low^T z `[r, D]`, of low `[T, r]`, r small, and z `[T, D]`."""
    if by_onednn(z, low):
        # As [r, T] @ [T, D]: with z first, such thin products take ten times as long.
        y: Tensor = _linear(low.t().contiguous(), z.contiguous().t(), None, "none", [], "")
        return y
    return low.t() @ z


def add_times(y: Tensor, low: Tensor, factor: Tensor) -> None:
    """y += low F, of y `[T, D]`, low `[T, r]` and F `[r, D]`, r small."""
    if y.numel() >= _LARGE and by_onednn(y, factor) and _convolution and y.is_contiguous():
        _convolve(y, low.contiguous(), factor.t())
    else:
        y.addmm_(low, factor)


def _convolve(out: Tensor, x: Tensor, weight: Tensor) -> None:
    """out += x W^T, as the convolution of one image with a row of pixels, whose channels lie next
    to each other, with 1 x 1 kernels: of oneDNN's operations in torch the only one that adds to a
    tensor given."""
    (rows, wide), outputs = x.shape, len(weight)
    image = x.as_strided((1, wide, rows, 1), (rows * wide, 1, wide, wide))
    sums = out.as_strided((1, outputs, rows, 1), (rows * outputs, 1, outputs, outputs))
    kernels = weight.unsqueeze(-1).unsqueeze(-1)
    ones = [1, 1]
    _convolution.binary(
        sums, image, kernels, None, [0, 0], ones, ones, 1, "add", 1.0, None, [], None
    )


def by_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes the product of x `[T, in]` and W, which then is a new tensor."""
    return (
        _chosen["onednn"]
        and x.dtype == weight.dtype == torch.float32
        and _is_there(x)
        and weight.device.type == "cpu"
        # One row is no matrix product.
        and len(x) > 1
    )
