"""Watching what a computation allocates, where nothing is allocated.

Under torch's `FakeTensorMode` every operation gives tensors of the right shape, dtype and device
without memory.  Their storages come and go as the real ones would: what a block saves for its
backward pass, what a kernel's result replaces, which gradient is kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from attrs import frozen
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorakit.estimate.remembered import RememberedResults

T = TypeVar("T")


@frozen
class Event:
    """A storage that was made (`size` bytes) or freed (`-size`).

    Attributes:
        storage: Its number.
        size: In bytes; negative if it was freed.
    """

    storage: int
    size: int


class StorageWatch(TorchDispatchMode):
    """Records each storage that operations make while it is active, and when it is freed.

    Args:
        trained: Tokens with a label: the one number that shapes do not give, and that the loss
            asks for.
        device: Storages elsewhere are not recorded.
        results: Does the operations on fake tensors; None where they are done as they come.

    Attributes:
        events: In order.
        labels: By storage: what was under way when it was made.
        label: What is under way.
        in_arena: The numbers of storages that are told to be in an arena.

    Entered inside `FakeTensorMode`, so that it comes before it.
    """

    def __init__(
        self, trained: int, device: torch.device, results: RememberedResults | None = None
    ) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.labels: list[str] = []
        self.label = ""
        self.in_arena: set[int] = set()
        self._trained = trained
        self._device = device
        self._results = results
        self._known: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}

    @contextmanager
    def labelled(self, label: str) -> Iterator[None]:
        """Storages made in this context carry the label, or one it is changed to within."""
        before, self.label = self.label, label
        try:
            yield
        finally:
            self.label = before

    def labelling(self, function: Callable[..., T], label: str) -> Callable[..., T]:
        """The function, with `labelled` around each call."""

        def wrapped(*args: Any, **kwargs: Any) -> T:
            with self.labelled(label):
                return function(*args, **kwargs)

        return wrapped

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Tensors that were there before, so that a view of one is nothing new."""
        for tensor in tensors:
            self._record(tensor)
        self.events.clear()

    def note_in_arena(self, tensor: Tensor) -> None:
        """Of a tensor that has just been made."""
        known = self._known.get(tensor.untyped_storage()._cdata)
        if known is not None:
            self.in_arena.add(known[0])

    def relabel(self, tensors: Iterable[Tensor], label: str) -> None:
        """Gives the storages of tensors another label, now that it is known what they are."""
        for tensor in tensors:
            number, _ = self._known[tensor.untyped_storage()._cdata]
            self.labels[number] = label

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.nonzero.default:
            # Zeros, which are indices where tensors are real.
            found = args[0].new_zeros(self._trained, args[0].dim(), dtype=torch.int64)
            self._record(found)
            return found
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            # Each `tensor.device` comes here: half of all calls.
            return args[0].fake_device
        if self._results is None:
            result = func(*args, **(kwargs or {}))
        else:
            result = self._results.of(func, args, kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._record(leaf)
        return result

    def _record(self, tensor: Tensor) -> None:
        device = tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device
        if device.type != self._device.type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        number, size = len(self.labels), storage.nbytes()
        self.labels.append(self.label)
        self.events.append(Event(number, size))

        def freed(_: Any) -> None:
            del self._known[key]
            self.events.append(Event(number, -size))

        self._known[key] = (number, weakref.ref(storage, freed))
