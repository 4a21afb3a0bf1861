"""Operations on fake tensors are remembered only where shapes tell all there is to tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lorakit.estimate.remembered import RememberedResults
from lorakit.estimate.storages import StorageWatch

CPU = torch.device("cpu")


def described(result: Any) -> Any:
    if not isinstance(result, Tensor):
        return result if not isinstance(result, (tuple, list)) else [described(r) for r in result]
    storage = result.untyped_storage()
    return (result.shape, result.stride(), result.storage_offset(), result.dtype, result.device,
            storage.nbytes(), result.requires_grad)  # fmt: skip


OPERATIONS: list[Callable[[Tensor, Tensor], Any]] = [
    lambda x, y: x @ y,
    lambda x, y: (x + 1, x + 1.0, x.to(torch.int64) + 1, x.to(torch.int64) + 1.0),
    lambda x, y: x.t()[1:],
    lambda x, y: x.split([1, 5], dim=1),
    lambda x, y: torch.stack([x, y.t()], dim=1),
    lambda x, y: x[None].expand(3, -1, -1).reshape(3, -1),
    lambda x, y: x.max(dim=1),
    lambda x, y: x.detach().mul_(2),
    lambda x, y: x.clone().resize_(2, 2),
    lambda x, y: x.clone().unsqueeze_(0),
    lambda x, y: torch.view_as_complex(x.view(4, 3, 2)).conj().resolve_conj().real,
    lambda x, y: x.new_empty(7, 3, dtype=torch.bfloat16).fill_(1.0),
    lambda x, y: torch.tensor(3.0) * x,
    lambda x, y: torch.nn.functional.scaled_dot_product_attention(
        x.view(1, 1, 4, 6), x.view(1, 1, 4, 6), x.view(1, 1, 4, 6)
    ),
]


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_remembered_result_is_the_same(
    operation: Callable[[Tensor, Tensor], Any], inference: bool
):
    mode = FakeTensorMode()
    results = RememberedResults(mode)
    with mode, torch.inference_mode(inference):
        x, y = torch.empty(4, 6), torch.empty(6, 4)
        plain = operation(x, y)
        for _ in range(3):
            watch = StorageWatch(0, CPU, results)
            with watch:
                found = operation(x, y)
            assert described(found) == described(plain)


def test_views_share_their_memory_and_new_tensors_do_not():
    mode = FakeTensorMode()
    results = RememberedResults(mode)
    with mode:
        x = torch.empty(4, 6)
        for _ in range(2):
            with StorageWatch(0, CPU, results):
                view, new, same = x[1:], x + 1, x.mul_(2)
            assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
            assert new.untyped_storage()._cdata != x.untyped_storage()._cdata
            assert same is x


def test_what_fails_fails_each_time():
    mode = FakeTensorMode()
    results = RememberedResults(mode)
    with mode:
        x = torch.empty(4, 6)
        for _ in range(2):
            with pytest.raises(RuntimeError), StorageWatch(0, CPU, results):
                x @ x


def test_results_are_remembered():
    mode = FakeTensorMode()
    results = RememberedResults(mode)
    with mode, StorageWatch(0, CPU, results):
        x = torch.empty(4, 6)
        x + 1
        known = len(results._found)
        x + 1
        assert len(results._found) == known
        x + 1.0
        assert len(results._found) == known + 1
