"""bf16 where the device is fast at it, fp32 with a notice where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorakit.builtin import precisions
from lorakit.options import NoOptions

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu sse2 avx2 fma", False),
        ("fpu avx2 avx512f avx512_bf16", True),
        ("fpu avx512f amx_bf16", True),
        ("fp asimd bf16 i8mm", True),
    ],
)
def test_what_the_system_says_of_the_cpu(flags: str, expected: bool, tmp_path: Path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    assert precisions.cpu_has_bf16(cpuinfo) is expected


def test_a_system_that_does_not_say(tmp_path: Path):
    assert precisions.cpu_has_bf16(tmp_path / "nowhere") is False


def test_bf16_on_a_cpu_with_units(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precisions, "cpu_has_bf16", lambda: True)
    found = precisions.resolve_bf16(CPU, NoOptions())
    assert (found.storage, found.compute) == (torch.bfloat16, torch.bfloat16)
    assert found.adapter == torch.float32
    assert found.notice is None


def test_bf16_on_a_cpu_without_units_is_fp32_and_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(precisions, "cpu_has_bf16", lambda: False)
    found = precisions.resolve_bf16(CPU, NoOptions())
    assert {found.storage, found.compute, found.adapter} == {torch.float32}
    assert found.notice is not None
    assert "no bf16 units" in found.notice


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_on_cuda_asks_the_device(supported: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    found = precisions.resolve_bf16(CUDA, NoOptions())
    assert found.compute == (torch.bfloat16 if supported else torch.float32)
    assert (found.notice is None) is supported


def test_a_run_in_bf16_keeps_its_adapter_in_fp32(train_run, monkeypatch: pytest.MonkeyPatch):
    from safetensors.torch import load_file

    monkeypatch.setattr(precisions, "cpu_has_bf16", lambda: True)
    run = train_run(precision={"name": "bf16"})
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
