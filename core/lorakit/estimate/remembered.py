"""What operations on fake tensors give, remembered by the shapes they were given.

A model's blocks do the same operations on the same shapes over and over.  `FakeTensorMode` works
each out anew, or finds it by a key that takes as long to make: most of a rehearsal's time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from attrs import frozen
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._mode_utils import no_dispatch

_NEVER = frozenset(
    {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.inplace_view}
)
_PLAIN = frozenset(
    {
        *(bool, int, float, str, type(None)),
        *(torch.dtype, torch.device, torch.layout, torch.memory_format),
    }
)


@frozen
class _Made:
    """A tensor with memory of its own, or (`of` is not None) a view of that argument."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    of: int | None


class _NotRemembered(Exception):
    """Something that shapes, dtypes and plain values do not tell the whole of."""


class RememberedResults:
    """Does an operation as `FakeTensorMode` would, which it asks the first time.

    Only what shapes, strides and dtypes decide is remembered: no operation whose result depends
    on values, none that changes the shape of what it is given, none with tensors that are not
    fakes, have known values, or are complex (their conjugation is no part of the key).

    Args:
        mode: Which the tensors belong to, and which is active at each call.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._found: dict[Any, Any] = {}
        self._may: dict[Any, bool] = {}

    def of(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The result of `func(*args, **kwargs)`."""
        may = self._may.get(func)
        if may is None:
            may = self._may[func] = _depends_on_shapes(func)
        if not may:
            return func(*args, **kwargs)
        tensors: list[FakeTensor] = []
        try:
            key = _key(func, args, kwargs, tensors)
        except _NotRemembered:
            return func(*args, **kwargs)
        found = self._found.get(key)
        if found is not None:
            return self._made_again(found, tensors)
        result = func(*args, **kwargs)
        try:
            # In place, an operation may have changed what the key says of its arguments.
            if _key(func, args, kwargs, []) == key:
                self._found[key] = _how_made(func, result, tensors)
        except _NotRemembered:
            pass
        return result

    def _made_again(self, found: Any, tensors: Sequence[FakeTensor]) -> Any:
        if type(found) is int:
            return tensors[found]
        if type(found) is not _Made:
            return type(found)(self._made_again(part, tensors) for part in found)
        if found.of is None:
            empty = _meta(found)
        else:
            storage = tensors[found.of].untyped_storage()
            with no_dispatch():
                empty = torch.empty(0, dtype=found.dtype, device="meta")
                empty.set_(storage, found.offset, found.shape, found.stride)
        return FakeTensor(self._mode, empty, found.device)


def _depends_on_shapes(func: Any) -> bool:
    if not isinstance(func, OpOverload) or func.namespace != "aten":
        return False
    return _NEVER.isdisjoint(func.tags)


def _key(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: list[FakeTensor]
) -> tuple[Any, ...]:
    """All that the result's shape can depend on; the tensors among the arguments are appended
    to `tensors`."""
    key = [func, torch.get_default_dtype(), torch.is_inference_mode_enabled()]
    for arg in args:
        _append(key, arg, tensors)
    for name, value in kwargs.items():
        key.append(name)
        _append(key, value, tensors)
    return tuple(key)


def _append(key: list[Any], arg: Any, tensors: list[FakeTensor]) -> None:
    kind = type(arg)
    if isinstance(arg, FakeTensor):
        if arg.constant is not None or arg.layout is not torch.strided or arg.dtype.is_complex:
            raise _NotRemembered
        tensors.append(arg)
        # Which arguments are one tensor.
        key.append(next(i for i, tensor in enumerate(tensors) if tensor is arg))
        key += (arg.shape, arg.stride(), arg.storage_offset(), arg.dtype, arg.fake_device)
    elif kind in _PLAIN:
        # 1, 1.0 and True are equal as keys.
        key += (kind, arg)
    elif kind in (list, tuple):
        key += (kind, len(arg))
        for item in arg:
            _append(key, item, tensors)
    else:
        raise _NotRemembered


def _how_made(func: Any, result: Any, tensors: Sequence[FakeTensor]) -> Any:
    """A result as `_made_again` takes it: the place of an argument that it is, a `_Made`, or a
    tuple or list of these."""
    if type(result) in (tuple, list):
        parts = [_how_made(func, part, tensors) for part in result]
        own = [p.untyped_storage()._cdata for p in result]
        shared = any(isinstance(p, _Made) and p.of is None for p in parts)
        if shared and len(set(own)) < len(own):
            raise _NotRemembered
        return type(result)(parts)
    if not isinstance(result, FakeTensor):
        raise _NotRemembered
    for place, tensor in enumerate(tensors):
        if result is tensor:
            return place
    if result.constant is not None or result.requires_grad or result.dtype.is_complex:
        raise _NotRemembered
    storage = result.untyped_storage()
    viewed = [i for i, t in enumerate(tensors) if t.untyped_storage()._cdata == storage._cdata]
    if viewed and not func.is_view:
        raise _NotRemembered
    made = _Made(
        tuple(result.shape),
        result.stride(),
        int(result.storage_offset()),
        result.dtype,
        result.fake_device,
        viewed[0] if viewed else None,
    )
    if not viewed:
        again = _meta(made)
        if made.offset or again.untyped_storage().nbytes() != storage.nbytes():
            raise _NotRemembered
    return made


def _meta(made: _Made) -> Tensor:
    with no_dispatch():
        return torch.empty_strided(made.shape, made.stride, dtype=made.dtype, device="meta")
