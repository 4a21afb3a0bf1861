"""fp32, bf16, bf16_pure and fp16."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, field, frozen
from attrs.validators import in_

from lorakit.errors import UserError
from lorakit.options import NoOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lorakit.recipes import Recipe


@define
class PlainPrecision:
    """A `lorakit.protocols.Precision` whose gradients need no scaling."""

    storage: torch.dtype | None
    compute: torch.dtype
    adapter: torch.dtype
    notice: str | None = None

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, optimizer: torch.optim.Optimizer, max_norm: float) -> float:
        import torch

        limit = max_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(_parameters(optimizer), limit))
        optimizer.step()
        return norm

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        pass


@define
class ScaledPrecision:
    """A `lorakit.protocols.Precision` for a dtype whose range gradients would fall out of below.

    The loss is multiplied by a scale before the backward pass, and the gradients divided by it
    after.  A step whose gradients overflow is skipped and the scale halved; after
    `growth_interval` steps without, it is doubled.

    Reference: Micikevicius et al. 2017, arXiv 1710.03740.
    """

    storage: torch.dtype
    compute: torch.dtype
    adapter: torch.dtype
    notice: str | None = None
    scale: float = 2.0**16
    growth_interval: int = 2000
    steps_since_change: int = 0
    skipped: int = 0

    def backward(self, loss: Tensor) -> None:
        (loss * self.scale).backward()

    def step(self, optimizer: torch.optim.Optimizer, max_norm: float) -> float | None:
        import torch

        parameters = _parameters(optimizer)
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) / self.scale
        if not math.isfinite(norm):
            return self._overflowed(norm)
        # Unscaled and clipped at once.
        clipped = min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0
        torch._foreach_mul_(gradients, clipped / self.scale)
        optimizer.step()
        self.steps_since_change += 1
        if self.steps_since_change == self.growth_interval:
            self.scale, self.steps_since_change = self.scale * 2, 0
        return norm

    def _overflowed(self, norm: float) -> float | None:
        if self.scale <= 1.0:
            # It is not the scale that makes them overflow.
            return norm
        self.scale, self.steps_since_change = self.scale / 2, 0
        self.skipped += 1
        self.notice = (
            f"precision: the scaled gradients overflowed; the loss scale is now {self.scale:g}, "
            f"and {self.skipped} step{'s' if self.skipped > 1 else ''} skipped so far"
        )
        return None

    def state(self) -> dict[str, Any]:
        return {
            "scale": self.scale,
            "steps_since_change": self.steps_since_change,
            "skipped": self.skipped,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.scale = state["scale"]
        self.steps_since_change = state["steps_since_change"]
        self.skipped = state["skipped"]


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@frozen(kw_only=True)
class FP32Options:
    """`[precision]` with `name = "fp32"`.

    Attributes:
        storage: What the frozen base weights are kept in: `fp32`, or with `checkpoint` what the
            checkpoint has each in, which takes half the memory for bf16.  Those are widened where
            they are used, so that the numbers are the same.
    """

    storage: str = field(default="fp32", validator=in_(("fp32", "checkpoint")))


def resolve_fp32(device: torch.device, options: FP32Options) -> PlainPrecision:
    """Everything in fp32, but for base weights that are kept as they are stored."""
    import torch

    storage = None if options.storage == "checkpoint" else torch.float32
    return PlainPrecision(storage, torch.float32, torch.float32)


def resolve_bf16(device: torch.device, options: NoOptions) -> PlainPrecision:
    """Base weights and activations in bf16, the adapter and its optimizer state in fp32."""
    import torch

    return _bf16(device, adapter=torch.float32)


def resolve_bf16_pure(device: torch.device, options: NoOptions) -> PlainPrecision:
    """Adapter, gradients and optimizer state in bf16 too.

    bf16 has 8 bits: an update below 1/256 of a parameter is lost, which small learning rates
    make of many.
    """
    import torch

    return _bf16(device, adapter=torch.bfloat16)


def _bf16(device: torch.device, *, adapter: torch.dtype) -> PlainPrecision:
    """bf16 as far as the device goes; the notice says where it does not.

    A GPU that has no bf16 gets fp32 throughout.  A CPU without bf16 units keeps weights in bf16
    and widens them as it uses them: half the memory, and the products in fp32.
    """
    import torch

    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        notice = f"precision: {name} has no bf16; using fp32"
        return PlainPrecision(torch.float32, torch.float32, torch.float32, notice)
    if device.type == "cpu" and not cpu_has_bf16():
        notice = (
            "precision: this CPU has no bf16 units, and bf16 is 5 to 10 times slower than fp32 "
            "without; weights are stored in bf16 and computed with in fp32"
        )
        return PlainPrecision(torch.bfloat16, torch.float32, adapter, notice)
    return PlainPrecision(torch.bfloat16, torch.bfloat16, adapter)


def resolve_fp16(device: torch.device, options: NoOptions) -> ScaledPrecision:
    """Base weights and activations in fp16, the adapter in fp32, gradients scaled.

    Raises:
        UserError: The device is not CUDA.
    """
    import torch

    if device.type != "cuda":
        raise UserError(f"precision.name: {FP16_ON_CUDA}, and this run is on {device.type}", FIX)
    return ScaledPrecision(torch.float16, torch.float16, torch.float32)


FP16_ON_CUDA = "fp16 is for CUDA devices"
FIX = 'Set precision.name = "bf16" or "fp32".'


def fp16_problems(recipe: Recipe) -> list[str]:
    """What is wrong with fp16 on the device that the recipe names, before torch is imported."""
    kind = recipe.run.device.partition(":")[0]
    if recipe.precision.name != "fp16" or kind in ("auto", "cuda"):
        return []
    return [f"precision.name: {FP16_ON_CUDA}, and device is {kind}. {FIX}"]


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the CPU multiplies bf16 in hardware, as far as the system tells."""
    try:
        flags = set(cpuinfo.read_text(encoding="ascii", errors="replace").split())
    except OSError:
        return False
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
