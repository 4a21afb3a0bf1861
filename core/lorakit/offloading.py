"""Activations kept in host memory between the forward and the backward pass."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

import torch
from attrs import define
from torch import Tensor


class HostCopies(Protocol):
    """Copies between a device and host memory, under way while the device computes."""

    def out(self, tensor: Tensor) -> Any:
        """Starts copying a tensor to the host; the tensor may be dropped at once."""
        ...

    def start_back(self, host: Any) -> Any:
        """Starts copying what `out` returned to the device."""
        ...

    def finish_back(self, under_way: Any) -> Tensor:
        """The tensor that `start_back` began, to be used by what is computed from here on."""
        ...


class PinnedCopies:
    """Copies through page-locked memory on a CUDA stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def out(self, tensor: Tensor) -> Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host.copy_(tensor, non_blocking=True)
        # Its memory is not given to others before the copy is done.
        tensor.record_stream(self.stream)
        return host

    def start_back(self, host: Tensor) -> Tensor:
        with torch.cuda.stream(self.stream):
            return host.to(self.device, non_blocking=True)

    def finish_back(self, under_way: Tensor) -> Tensor:
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        under_way.record_stream(current)
        return under_way


@define(eq=False)
class _Kept:
    """A saved tensor: on the host, on its way back, or both.  `before` is the one saved just
    before it, which the backward pass will need next; weak, or no host memory were ever freed."""

    host: Any
    before: weakref.ref[_Kept] | None
    under_way: Any = None


class ActivationOffload:
    """Hooks for what autograd saves: out to the host when it is saved, and back by the time it
    is needed, each on its way while the one saved after it is in use.

    Args:
        copies: Do the copying.
    """

    def __init__(self, copies: HostCopies) -> None:
        self.copies = copies
        self._last: weakref.ref[_Kept] | None = None

    def hooks(self) -> Any:
        """A context in which saved tensors are offloaded."""
        return torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, tensor: Tensor) -> _Kept | Tensor:
        if not tensor.numel():
            # torch's checkpointing saves one for each block, in 2.6.
            return tensor.detach()
        kept = _Kept(self.copies.out(tensor), self._last)
        self._last = weakref.ref(kept)
        return kept

    def unpack(self, kept: _Kept | Tensor) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        self._start(kept)
        tensor = self.copies.finish_back(kept.under_way)
        kept.under_way = None
        before = kept.before() if kept.before else None
        if before is not None:
            self._start(before)
        return tensor

    def _start(self, kept: _Kept) -> None:
        if kept.under_way is None:
            kept.under_way = self.copies.start_back(kept.host)


def offload_to_host(device: torch.device) -> ActivationOffload | None:
    """Offloading from `device`; None where its memory is the host's."""
    return ActivationOffload(PinnedCopies(device)) if device.type == "cuda" else None
