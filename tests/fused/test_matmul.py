"""Products by oneDNN and by MKL: the same numbers, and chosen by the processor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lorakit.modules import matmul
from lorakit.modules.matmul import (
    add_times,
    times,
    times_into,
    times_transposed,
    times_transposed_into,
    transposed_times,
    use_onednn,
)
from lorakit.runtime import prefers_onednn

AMD = "vendor_id\t: AuthenticAMD\nflags\t: avx2 avx512f\n"
INTEL = "vendor_id\t: GenuineIntel\nflags\t: avx2 avx512f\n"


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"])
def library(request: pytest.FixtureRequest) -> Iterator[bool]:
    if use_onednn(request.param) != request.param:
        pytest.skip("this build of torch has no oneDNN")
    yield request.param
    use_onednn(False)


@pytest.mark.parametrize("rows", [1, 2, 37])
@pytest.mark.parametrize(("outputs", "inputs"), [(48, 32), (7, 129), (1, 5)])
def test_products_equal_float64(library: bool, rows: int, outputs: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(rows + outputs)
    x = torch.randn(rows, inputs, generator=generator)
    dy = torch.randn(rows, outputs + 3, generator=generator)[:, 1 : 1 + outputs]
    weight = torch.randn(outputs, inputs, generator=generator)
    plus = torch.randn(rows, inputs, generator=generator)
    forth = x.double() @ weight.double().t()
    back = dy.double() @ weight.double()
    out_forth, out_back = torch.full((rows, outputs), 9.0), torch.full((rows, inputs), 9.0)
    times_transposed_into(out_forth, x, weight)
    times_into(out_back, dy, weight, add=False)
    added = plus.clone()
    times_into(added, dy, weight, add=True)
    for result, expected in (
        (times_transposed(x, weight), forth),
        (out_forth, forth),
        (times(dy, weight), back),
        (out_back, back),
        (added, back + plus),
        (times(dy, weight, plus=plus.clone()), back + plus),
    ):
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("large", [1, 2**40], ids=["convolved", "added"])
@pytest.mark.parametrize(("rows", "wide", "rank"), [(37, 48, 8), (2, 5, 1), (64, 129, 3)])
def test_thin_products_equal_float64(
    library: bool, large: int, rows: int, wide: int, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "_LARGE", large)
    generator = torch.Generator().manual_seed(rows)
    low, z = (torch.randn(rows, n, generator=generator) for n in (rank, wide))
    factor = torch.randn(rank, wide, generator=generator)
    inner = low.double().t() @ z.double()
    torch.testing.assert_close(transposed_times(low, z).double(), inner, rtol=1e-5, atol=1e-5)
    # As the step has it too: the transpose of a factor stored the other way round.
    for given in (factor, factor.t().contiguous().t()):
        y = z.clone()
        add_times(y, low, given)
        expected = z.double() + low.double() @ factor.double()
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_other_dtypes_and_meta_tensors_take_the_usual_way(library: bool) -> None:
    weight = torch.randn(4, 3, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(times_transposed(x, weight), x @ weight.t())
    assert times_transposed(torch.empty(5, 3, device="meta"), torch.empty(4, 3)).is_meta


@pytest.mark.parametrize(
    ("text", "capability", "expected"),
    [(AMD, "AVX512", True), (INTEL, "AVX512", False), (AMD, "AVX2", False), ("", "AVX512", False)],
)
def test_onednn_is_preferred_where_mkl_does_not_use_avx512(
    text: str, capability: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(text, encoding="ascii")
    assert prefers_onednn(cpuinfo) is expected


def test_an_unreadable_cpuinfo_prefers_nothing(tmp_path: Path) -> None:
    assert not prefers_onednn(tmp_path / "absent")
