"""Memory kept between uses: how large, how laid out, and when it is not kept."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lorakit import scratch as scratch_module
from lorakit.scratch import in_slot, scratch

LIKE = torch.empty(0)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(scratch_module, "_kept", {})


def kept():
    return {use: len(memory) for (use, _, _), memory in scratch_module._kept.items()}


def test_tensors_of_one_use_are_apart_and_aligned():
    wanted = [((3, 5), torch.float32), ((7,), torch.bfloat16), ((0, 4), torch.float64)]
    made = scratch("test", LIKE, *wanted)
    assert [(tuple(t.shape), t.dtype) for t in made] == wanted
    for i, tensor in enumerate(made):
        tensor.fill_(i + 1)
        assert tensor.data_ptr() % 64 == 0
        assert tensor.is_contiguous()
    assert [set(t.flatten().tolist()) for t in made] == [{1.0}, {2.0}, set()]


def test_the_next_call_of_the_same_use_takes_the_same_memory():
    (first,) = scratch("one", LIKE, ((100,), torch.float32))
    (second,) = scratch("one", LIKE, ((50,), torch.float32))
    (other,) = scratch("two", LIKE, ((50,), torch.float32))
    assert first.data_ptr() == second.data_ptr() != other.data_ptr()
    assert kept() == {"one": 448, "two": 256}


def test_slots_share_no_memory():
    (first,) = scratch("one", LIKE, ((100,), torch.float32))
    with in_slot(1):
        (second,) = scratch("one", LIKE, ((100,), torch.float32))
        with in_slot(0):
            (third,) = scratch("one", LIKE, ((100,), torch.float32))
        (fourth,) = scratch("one", LIKE, ((100,), torch.float32))
    assert first.data_ptr() == third.data_ptr() != second.data_ptr() == fourth.data_ptr()


def test_it_grows_to_what_was_asked_for():
    for size in (10, 1000, 100):
        scratch("one", LIKE, ((size,), torch.float32))
    assert kept() == {"one": 4032}


def test_memory_made_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        scratch("one", LIKE, ((4,), torch.float32))
    (again,) = scratch("one", LIKE, ((4,), torch.float32))
    assert not again.is_inference()


def test_tensors_without_memory_keep_none():
    (meta,) = scratch("one", torch.empty(0, device="meta"), ((4,), torch.float32))
    with FakeTensorMode():
        (fake,) = scratch("one", torch.empty(0), ((4,), torch.float32))
    assert meta.is_meta
    assert fake.shape == (4,)
    assert kept() == {}
