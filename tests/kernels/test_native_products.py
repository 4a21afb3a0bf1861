"""Products by lorakit-x86: as near to the exact ones as torch's in fp32."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from lorakit.kernel_protocol import Kernels

SIZES = st.one_of(
    st.sampled_from([1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 257]), st.integers(1, 700)
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=SIZES,
    columns=SIZES,
    inner=SIZES,
    weights=st.sampled_from(
        ["fp32", "bf16", "bf16 numbers in fp32", "one number that is not bf16"]
    ),
    transposed=st.booleans(),
    add=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_as_exact_as_fp32(
    native: Kernels,
    rows: int,
    columns: int,
    inner: int,
    weights: str,
    transposed: bool,
    add: bool,
    strided: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    beside = 3 if strided else 0
    x = torch.randn(rows, inner + beside, generator=generator)[:, :inner]
    shape = (columns, inner + beside) if transposed else (inner, columns + beside)
    weight = torch.randn(shape, generator=generator)
    if weights != "fp32":
        weight = weight.bfloat16()
    if weights.endswith(("fp32", "not bf16")):
        weight = weight.float()
    if weights.endswith("not bf16"):
        weight[-1, 0] = math.pi
    weight = weight[:, : inner if transposed else columns]
    start = torch.randn(rows, columns + beside, generator=generator)
    outside = start[:, columns:].clone()
    out = start[:, :columns]
    before = out.double()

    native.multiply(out, x, weight, transposed=transposed, add=add)

    wide = (weight.t() if transposed else weight).double()
    exact = x.double() @ wide + (before if add else 0)
    # As much as some eight roundings of the whole, and those of a sum of K, which even out.
    largest = (x.double().abs() @ wide.abs()) + before.abs()
    assert ((out.double() - exact).abs() <= 2**-24 * (8 + math.sqrt(inner)) * largest).all()
    assert torch.equal(start[:, columns:], outside)


@pytest.mark.parametrize("exact", [True, False], ids=["bf16 numbers", "others"])
@pytest.mark.parametrize("inner", [576, 5000])
def test_errors_are_those_of_torch(native: Kernels, exact: bool, inner: int) -> None:
    """The mean over many, of long sums too."""
    x = torch.randn(300, inner)
    weight = torch.randn(200, inner)
    weight = weight.bfloat16().float() if exact else weight
    out = torch.empty(300, 200)
    native.multiply(out, x, weight, transposed=True, add=False)
    reference = x.double() @ weight.double().t()
    error = (out - reference).square().mean().sqrt()
    of_torch = (x @ weight.t() - reference).square().mean().sqrt()
    assert error < 1.5 * of_torch


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("rows", "columns"), [(700, 100), (100, 700), (33, 33)])
@pytest.mark.parametrize("transposed", [True, False])
def test_threads_change_nothing(native: Kernels, rows: int, columns: int, transposed: bool) -> None:
    x = torch.randn(rows, 300)
    weight = torch.randn((columns, 300) if transposed else (300, columns))
    results = []
    for threads in (2, 1, 2):
        torch.set_num_threads(threads)
        out = torch.empty(rows, columns)
        native.multiply(out, x, weight, transposed=transposed, add=False)
        results.append(out)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_what_is_not_a_number_stays_none(native: Kernels) -> None:
    x = torch.randn(40, 70)
    x[7, 5] = math.nan
    x[9, 6] = math.inf
    out = torch.empty(40, 80)
    native.multiply(out, x, torch.randn(80, 70), transposed=True, add=False)
    finite = out.isfinite().all(dim=1)
    assert not finite[7]
    assert not finite[9]
    assert int(finite.sum()) == 38
