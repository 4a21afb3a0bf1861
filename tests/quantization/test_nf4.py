"""NF4 storage against bitsandbytes' own: codes, scales and values, bit for bit."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import bitsandbytes
import pytest
import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lorakit.errors import UserError
from lorakit_bitsandbytes import native, nf4
from lorakit_bitsandbytes.quantizations import BLOCK_SIZES, NF4Options, nf4_bytes

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def weight_of(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Of the size trained weights have, with a block of zeros and a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator) / shape[-1] ** 0.5
    flat = weight.view(-1)
    flat[::97] *= 8
    flat[:64] = 0
    return weight.to(dtype)


def theirs(weight: Tensor, block_size: int, double_quant: bool):
    return quantize_4bit(
        weight, blocksize=block_size, compress_statistics=double_quant, quant_type="nf4"
    )


def assert_same_storage(layer, weight: Tensor) -> None:
    packed, state = theirs(weight, layer.block_size, layer.double_quant)
    assert torch.equal(layer.packed, packed)
    assert torch.equal(layer.absmax, state.absmax)
    assert layer.absmax.dtype == state.absmax.dtype
    if layer.double_quant:
        assert torch.equal(layer.absmax_offset, state.offset)
        assert torch.equal(layer.absmax_scale, state.state2.absmax)
        assert torch.equal(layer.absmax_code, state.state2.code)


# More than one piece, pieces cut within a block and not, rests, odd sizes.
SHAPES = [(96, 64), (129, 1024), (7, 5), (3, 3), (1, 2), (333, 77), (48, 2048)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_codes_and_scales_are_bitsandbytes(block_size, double_quant, dtype, make_layer):
    for shape in SHAPES:
        weight = weight_of(*shape, dtype=dtype)
        layer = make_layer("nf4", weight, block_size=block_size, double_quant=double_quant)
        assert_same_storage(layer, weight)


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=300),
    st.sampled_from([32, 64]),
)
@example([0.0] * 64, 32)
@example([1e-45, -1e-45, 1e-38, 3e38], 32)
def test_any_numbers_have_bitsandbytes_codes(numbers, block_size):
    weight = torch.tensor([numbers])
    packed, absmax = nf4.quantize_blocks(weight, block_size)
    expected, state = theirs(weight, block_size, False)
    assert torch.equal(packed, expected)
    assert torch.equal(absmax, state.absmax)


def test_ties_and_their_neighbours_fall_where_bitsandbytes_has_them():
    levels = get_4bit_type("nf4", device="cpu")
    ties = (levels[:-1] + levels[1:]) / 2
    up, down = (torch.nextafter(ties, torch.full_like(ties, end)) for end in (2.0, -2.0))
    values = torch.cat([ties, up, down, levels, torch.ones(3)])
    weight = torch.stack([values, -values, values * 0.37, values * 1e-30])
    assert weight.shape == (4, 64)
    packed, absmax = nf4.quantize_blocks(weight, 64)
    expected, state = theirs(weight, 64, False)
    assert torch.equal(packed, expected)
    assert torch.equal(absmax, state.absmax)


@pytest.fixture(params=["kernel", "operator"])
def dequantizing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the native kernel where this version of bitsandbytes has it, and by the operator."""
    if request.param == "operator":
        monkeypatch.setattr(nf4, "dequantizer", lambda dtype: None)


@pytest.mark.usefixtures("eager", "dequantizing")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_dequantized_values_are_bitsandbytes(block_size, double_quant, dtype, make_layer):
    # Whole blocks in each row: see the test below for the others.
    for shape in [(96, 4096), (300, 4096), (64, block_size)]:
        weight = weight_of(*shape)
        layer = make_layer("nf4", weight, dtype, block_size=block_size, double_quant=double_quant)
        packed, state = theirs(weight, block_size, double_quant)
        state.dtype = dtype
        expected = dequantize_4bit(packed, state)
        assert torch.equal(layer.dequantize(), expected)
        out = torch.full(shape, torch.nan, dtype=dtype)
        assert layer.dequantize(out) is out
        assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_native_kernel_is_used_where_its_call_is_known(dtype, monkeypatch):
    dequantizer = native.dequantizer.__wrapped__
    known = bitsandbytes.__version__.startswith(native.KNOWN_VERSIONS)
    assert (dequantizer(dtype) is not None) == known
    monkeypatch.setattr(bitsandbytes, "__version__", "0.99.0")
    assert dequantizer(dtype) is None


def wrong_values(packed, scales, out, *sizes):
    pass


def not_there(packed, scales, out, *sizes):
    raise RuntimeError("not available in this version of bitsandbytes")


@pytest.mark.parametrize("function", [wrong_values, not_there])
def test_a_kernel_that_does_not_do_what_the_operator_does_is_left_alone(function, monkeypatch):
    library = SimpleNamespace(cdequantize_blockwise_cpu_nf4_fp32=function)
    monkeypatch.setattr(bitsandbytes.cextension, "lib", library)
    monkeypatch.setattr(bitsandbytes, "__version__", native.KNOWN_VERSIONS[-1] + "9")
    assert native.dequantizer.__wrapped__(torch.float32) is None


@pytest.mark.usefixtures("dequantizing")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("block_size", [32, 256, 4096])
def test_rows_that_end_within_a_block_are_level_times_scale(block_size, dtype, make_layer):
    """bitsandbytes 0.50's AVX-512 kernel gives other weights' values here, so the truth is the
    definition, on the codes that bitsandbytes gave."""
    for shape in [(48, 48), (333, 77), (257, 4100), (1, 2), (7, 5)]:
        weight = weight_of(*shape)
        layer = make_layer("nf4", weight, block_size=block_size)
        packed = layer.packed.view(-1)
        codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[: weight.numel()]
        scales = layer.scales().repeat_interleave(block_size)[: weight.numel()]
        expected = get_4bit_type("nf4", device="cpu")[codes.long()] * scales
        found = layer.dequantize(torch.empty(shape, dtype=dtype))
        assert torch.equal(found, expected.view(shape).to(dtype))


@pytest.mark.parametrize("bias", [False, True])
def test_products_are_those_of_the_dequantized_weight(bias, make_layer):
    weight = weight_of(160, 192)
    offset = torch.randn(160) if bias else None
    layer = make_layer("nf4", weight, bias=offset)
    packed, state = theirs(weight, 64, True)
    state.dtype = torch.float32
    dense = dequantize_4bit(packed, state)
    x = torch.randn(2, 11, 192, requires_grad=True)
    twin = x.detach().requires_grad_()
    towards = torch.randn(2, 11, 160)
    y, expected = layer(x), F.linear(twin, dense, offset)
    y.backward(towards)
    expected.backward(towards)
    assert torch.allclose(y, expected, atol=1e-5)
    assert torch.allclose(x.grad, twin.grad, atol=1e-5)
    assert not any(p.requires_grad for p in layer.parameters())


def test_products_in_bf16_round_the_weight_once(make_layer):
    weight = weight_of(64, 128)
    layer = make_layer("nf4", weight, torch.bfloat16)
    x = torch.randn(5, 128).bfloat16()
    assert torch.equal(layer(x), F.linear(x, layer.dequantize(torch.empty(64, 128)).bfloat16()))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(64, 256), (96, 4096), (7, 5)])
def test_the_bytes_it_says_are_the_bytes_it_keeps(shape, double_quant, make_layer):
    options = NF4Options(double_quant=double_quant, block_size=128)
    layer = make_layer("nf4", weight_of(*shape), double_quant=double_quant, block_size=128)
    kept = sum(b.numel() * b.element_size() for b in layer.buffers())
    assert kept == nf4_bytes(shape, options)


def test_moving_the_layer_moves_all_of_it(make_layer):
    layer = make_layer("nf4", weight_of(64, 128))
    moved = copy.deepcopy(layer).to("meta")
    assert moved(torch.empty(3, 128, device="meta")).device.type == "meta"
    assert {b.device.type for b in moved.buffers()} == {"meta"}


def test_quantizing_on_the_meta_device_gives_the_same_shapes(make_layer):
    for double_quant in (True, False):
        weight = torch.empty(160, 192, dtype=torch.bfloat16, device="meta")
        layer = make_layer("nf4", weight, double_quant=double_quant)
        real = make_layer("nf4", weight_of(160, 192), double_quant=double_quant)
        shapes = {n: (b.shape, b.dtype) for n, b in real.named_buffers()}
        assert {n: (b.shape, b.dtype) for n, b in layer.named_buffers()} == shapes
        x = torch.empty(3, 192, device="meta", requires_grad=True)
        layer(x).sum().backward()
        assert x.grad.shape == (3, 192)


@torch.no_grad()
def test_a_fake_cuda_device_takes_no_path_of_the_cpu(make_layer, monkeypatch):
    def never(*args: object) -> None:
        raise AssertionError("a path for CPUs only")

    monkeypatch.setattr(nf4, "_quantize_pieces", never)
    monkeypatch.setattr(nf4, "_dequantize_pieces", never)
    with FakeTensorMode():
        weight = torch.empty(160, 192, dtype=torch.bfloat16, device="cuda")
        layer = make_layer("nf4", weight, torch.bfloat16)
        y = layer(torch.empty(3, 192, dtype=torch.bfloat16, device="cuda"))
    assert (y.shape, y.dtype, y.device.type) == ((3, 160), torch.bfloat16, "cuda")
    # Nothing fake is left behind for real tensors.
    monkeypatch.undo()
    assert_same_storage(make_layer("nf4", weight_of(32, 64)), weight_of(32, 64))


def test_a_compiled_layer_computes_the_same(make_layer):
    layer = make_layer("nf4", weight_of(64, 128))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 128, requires_grad=True)
    twin = x.detach().requires_grad_()
    y, expected = compiled(x), layer(twin)
    assert torch.allclose(y, expected, atol=1e-6)
    y.sum().backward()
    expected.sum().backward()
    assert torch.allclose(x.grad, twin.grad, atol=1e-6)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_weight_that_is_not_finite_is_refused(value, make_layer):
    weight = weight_of(64, 128)
    weight[3, 70] = value
    with pytest.raises(UserError, match="not finite, which nf4 cannot hold"):
        make_layer("nf4", weight)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_dtypes_it_cannot_hold_or_compute_in_are_refused(scheme, make_layer):
    with pytest.raises(UserError, match=rf"{scheme} takes weights stored in .*not in float64"):
        make_layer(scheme, torch.zeros(8, 8, dtype=torch.float64))
    with pytest.raises(UserError, match=rf"{scheme} takes weights stored in .*not in int32"):
        make_layer(scheme, torch.zeros(8, 8, dtype=torch.int32))
    with pytest.raises(UserError, match=rf"{scheme} takes products in .*not in float64"):
        make_layer(scheme, torch.zeros(8, 8), torch.float64)
