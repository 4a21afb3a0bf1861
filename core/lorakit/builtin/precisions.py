"""fp32 and bf16."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define

from lorakit.options import NoOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@define
class PlainPrecision:
    """A `lorakit.protocols.Precision` whose gradients need no scaling."""

    storage: torch.dtype
    compute: torch.dtype
    adapter: torch.dtype
    notice: str | None = None

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, optimizer: torch.optim.Optimizer, max_norm: float) -> float:
        import torch

        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        limit = max_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        optimizer.step()
        return norm

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass


def resolve_fp32(device: torch.device, options: NoOptions) -> PlainPrecision:
    """Everything in fp32."""
    import torch

    return PlainPrecision(torch.float32, torch.float32, torch.float32)


def resolve_bf16(device: torch.device, options: NoOptions) -> PlainPrecision:
    """Base weights and activations in bf16, the adapter and its optimizer state in fp32.

    Where the device computes bf16 slowly or not at all, everything is fp32, and the notice
    says so.
    """
    import torch

    reason = _no_fast_bf16(device)
    if reason:
        notice = f"precision: {reason}; using fp32"
        return PlainPrecision(torch.float32, torch.float32, torch.float32, notice)
    return PlainPrecision(torch.bfloat16, torch.bfloat16, torch.float32)


def _no_fast_bf16(device: torch.device) -> str:
    """Why bf16 is not for this device; empty if it is."""
    import torch

    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return f"{torch.cuda.get_device_name(device)} has no bf16"
    if device.type == "cpu" and not cpu_has_bf16():
        return "this CPU has no bf16 units, and bf16 is 5 to 10 times slower than fp32 without"
    return ""


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bf16 in hardware, as far as the system tells."""
    try:
        flags = set(cpuinfo.read_text(encoding="ascii", errors="replace").split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
