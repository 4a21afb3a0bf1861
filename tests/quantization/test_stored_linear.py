"""A frozen linear that materializes its weight for each product: numbers, memory, devices."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from lorakit.modules import StoredLinear, frozen


class Bf16Linear(StoredLinear):
    """The simplest kind: stored in bf16."""

    def __init__(self, linear: nn.Linear, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(linear, compute_dtype)
        self.register_buffer("stored", linear.weight.detach().bfloat16())

    def dequantize(self, out: Tensor | None = None) -> Tensor:
        if out is None:
            return self.stored.to(self.compute_dtype)
        return out.copy_(self.stored)


@pytest.fixture(autouse=True)
def no_buffers():
    frozen.release_buffers()
    yield
    frozen.release_buffers()


def layer_of(inputs: int = 24, outputs: int = 40, *, bias: bool = True, seed: int = 0):
    torch.manual_seed(seed)
    return Bf16Linear(nn.Linear(inputs, outputs, bias=bias))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 24), (2, 3, 24), (24,)])
def test_output_and_input_gradient_are_those_of_the_dequantized_weight(bias, shape):
    layer = layer_of(bias=bias)
    x = torch.randn(shape, requires_grad=True)
    twin = x.detach().double().requires_grad_()
    towards = torch.randn(*shape[:-1], 40)
    layer(x).backward(towards)
    weight = layer.stored.double()
    expected = F.linear(twin, weight, layer.bias.double() if bias else None)
    expected.backward(towards.double())
    assert torch.allclose(layer(x).double(), expected, atol=1e-5)
    assert torch.allclose(x.grad.double(), twin.grad, atol=1e-5)
    assert not any(p.requires_grad for p in layer.parameters())


def test_layers_of_many_sizes_share_one_buffer_of_the_largest():
    layers = [layer_of(24, 8, seed=1), layer_of(8, 96, seed=2), layer_of(96, 24, seed=3)]
    x = torch.randn(5, 24, requires_grad=True)
    y, plain = x, x.detach().requires_grad_()
    z = plain
    for layer in layers:
        y = torch.tanh(layer(y))
        z = torch.tanh(F.linear(z, layer.dequantize(), layer.bias))
    y.sum().backward()
    z.sum().backward()
    assert torch.allclose(x.grad, plain.grad, atol=1e-6)
    sizes = [buffer.numel() for buffer in frozen._buffers.values()]
    assert sizes == [96 * 24]


def test_nothing_is_kept_for_the_backward_pass():
    kept: list[Tensor] = []
    layer = layer_of()
    x = torch.randn(5, 24, requires_grad=True)

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert kept == []
    y.sum().backward()
    assert x.grad is not None


def test_recomputation_gives_the_same_gradients():
    layers = [layer_of(24, 24, seed=n) for n in range(3)]

    def block(x: Tensor) -> Tensor:
        for layer in layers:
            x = torch.tanh(layer(x))
        return x

    x = torch.randn(5, 24, requires_grad=True)
    block(x).sum().backward()
    plain, x.grad = x.grad, None
    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert torch.equal(x.grad, plain)


def test_a_buffer_made_in_inference_mode_serves_training():
    layer = layer_of()
    with torch.inference_mode():
        layer(torch.randn(2, 24))
    x = torch.randn(2, 24, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.dequantize().sum(dim=0).expand(2, 24), atol=1e-6)


def test_the_meta_device_needs_no_memory():
    layer = Bf16Linear(nn.Linear(24, 40, device="meta"))
    x = torch.empty(5, 24, device="meta", requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (5, 24)
    assert frozen._buffers == {}


@torch.no_grad()
def test_shapes_go_through_on_a_fake_cuda_device():
    """Without gradients: torch's autograd wants the real device's libraries."""
    with FakeTensorMode():
        layer = Bf16Linear(nn.Linear(24, 40, bias=False, device="meta"))
        layer.stored = torch.empty(40, 24, device="cuda", dtype=torch.bfloat16)
        y = layer(torch.empty(2, 5, 24, device="cuda"))
    assert (y.shape, y.device.type) == ((2, 5, 40), "cuda")
    assert frozen._buffers == {}


def test_fake_tensors_leave_no_buffer_behind():
    with FakeTensorMode():
        layer = layer_of()
        x = torch.empty(5, 24, requires_grad=True)
        layer(x).sum().backward()
    assert x.grad.shape == (5, 24)
    assert frozen._buffers == {}
