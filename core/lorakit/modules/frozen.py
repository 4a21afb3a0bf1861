"""A frozen linear layer whose weight is stored in another form than it is computed with."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from lorakit.scratch import slot


class Stored(Protocol):
    """What materializing a weight takes: a `StoredLinear`, or any module like it."""

    in_features: int
    out_features: int

    def dequantize(self, out: Tensor | None = None) -> Tensor: ...


class StoredLinear(nn.Module):
    """y = x W^T + b, with W and b frozen and W materialized anew for each product.

    W may be kept in 4 bits, in 8, or in a narrower float than the products are computed in: a
    subclass says how, by `dequantize`.  The backward pass materializes W once more for
    dx = dy W, so nothing is kept for it: not W in the compute dtype, and, as W gets no
    gradient, not x either.

    Args:
        linear: Gives the sizes and the bias; its weight is not looked at.
        compute_dtype: What `dequantize` gives where nothing else is asked for.
    """

    def __init__(self, linear: nn.Linear, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.compute_dtype = compute_dtype
        self.bias = linear.bias
        if self.bias is not None:
            self.bias.requires_grad_(False)

    def dequantize(self, out: Tensor | None = None) -> Tensor:
        """W `[out, in]`.

        Args:
            out: Written to and returned; its dtype is the one to give W in.  Without it a new
                tensor in the compute dtype.
        """
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in]` -> `[..., out]`, in x's dtype."""
        y: Tensor = _FrozenProduct.apply(x, self)
        return y

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: StoredLinear) -> Tensor:
        ctx.layer = layer
        bias = layer.bias
        return F.linear(x, materialized(layer, x), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ materialized(ctx.layer, dy), None


_buffers: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}
"""By device, dtype and slot (see `lorakit.scratch`)."""


def materialized(layer: Stored, like: Tensor) -> Tensor:
    """W `[out, in]` in the dtype and on the device of `like`, for use in the next product only.

    All layers share one buffer for each device, dtype and slot, as large as the largest of
    them: the next call writes over what this one returned.  That is safe as long as one product
    follows the other, which forward, backward and the recomputation of activation checkpointing
    keep to; it is not for two CUDA streams.  A caller that needs W for longer takes
    `layer.dequantize()`.
    """
    if not has_memory(like):
        return layer.dequantize().to(like.dtype)
    key = (like.device, like.dtype, slot())
    size = layer.out_features * layer.in_features
    buffer = _buffers.get(key)
    if buffer is None or buffer.numel() < size:
        # Dropped first, so that old and new are never held at once.
        del buffer
        _buffers.pop(key, None)
        with torch.inference_mode(False):
            _buffers[key] = buffer = torch.empty(size, device=like.device, dtype=like.dtype)
    return layer.dequantize(buffer[:size].view(layer.out_features, layer.in_features))


def has_memory(tensor: Tensor) -> bool:
    """Whether the tensor's values are there to be worked on piece by piece: not on the meta
    device, not fake, and not under a compiler, which plans memory itself."""
    return not (torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor))


def release_buffers() -> None:
    """Gives back the memory of the shared buffers; the next product takes it again."""
    _buffers.clear()
