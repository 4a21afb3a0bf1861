"""The kernels of lorakit-amx, where this machine has what they need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lorakit.protocols import Kernels


@pytest.fixture
def amx() -> Kernels:
    module = pytest.importorskip("lorakit_amx")
    reason = module.unusable()
    if reason is not None:
        pytest.skip(reason)
    return module.load()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
