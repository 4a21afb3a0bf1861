"""bitsandbytes' optimizers: state in 8 bits, block by block, or in pages that leave the GPU
when it runs short.

References: Dettmers et al. 2022, arXiv 2110.02861 (8 bits); Chen et al. 2023, arXiv 2302.06675
(Lion); Dettmers et al. 2023, arXiv 2305.14314 (pages).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attrs import field, frozen
from attrs.validators import and_, ge, gt, lt

from lorakit.options import OptimizerOptions
from lorakit_bitsandbytes import library

if TYPE_CHECKING:
    import torch

SMALLEST_8BIT = 4096
"""A parameter of fewer numbers keeps its state in fp32."""
STATE_BLOCK = 256
"""Numbers of 8-bit state that share a scale."""
PAGING_DEVICES = ("cuda", "xpu")


@frozen(kw_only=True)
class AdamW8bitOptions(OptimizerOptions):
    """`[optimizer]` with `name = "adamw8bit"`, `"paged_adamw"` or `"paged_adamw8bit"`.

    Attributes:
        weight_decay: Decoupled, times lr.
        beta1: Decay of the mean of gradients.
        beta2: Decay of the mean of squared gradients.
        eps: Added to the root of the latter.
    """

    weight_decay: float = field(default=0.01, validator=ge(0.0))
    beta1: float = field(default=0.9, validator=and_(ge(0.0), lt(1.0)))
    beta2: float = field(default=0.999, validator=and_(ge(0.0), lt(1.0)))
    eps: float = field(default=1e-8, validator=gt(0.0))


@frozen(kw_only=True)
class Lion8bitOptions(OptimizerOptions):
    """`[optimizer]` with `name = "lion8bit"` or `"paged_lion8bit"`.

    Attributes:
        lr: Peak learning rate; Lion steps by its sign alone, and wants about a tenth of Adam's.
        weight_decay: Decoupled, times lr.
        beta1: Weight of the mean of gradients in the step's direction.
        beta2: Decay of that mean.
    """

    lr: float = field(default=3e-5, validator=gt(0.0))
    weight_decay: float = field(default=0.0, validator=ge(0.0))
    beta1: float = field(default=0.9, validator=and_(ge(0.0), lt(1.0)))
    beta2: float = field(default=0.99, validator=and_(ge(0.0), lt(1.0)))


Parameters = Sequence["torch.nn.Parameter"]


def build_adamw8bit(parameters: Parameters, options: AdamW8bitOptions) -> torch.optim.Optimizer:
    """AdamW with state in 8 bits."""
    return _adamw(parameters, options, "AdamW8bit")


def build_paged_adamw(parameters: Parameters, options: AdamW8bitOptions) -> torch.optim.Optimizer:
    """AdamW with state in fp32, in pages."""
    return _adamw(parameters, options, "PagedAdamW" if _pages(parameters) else "AdamW")


def build_paged_adamw8bit(
    parameters: Parameters, options: AdamW8bitOptions
) -> torch.optim.Optimizer:
    """AdamW with state in 8 bits, in pages."""
    return _adamw(parameters, options, "PagedAdamW8bit" if _pages(parameters) else "AdamW8bit")


def build_lion8bit(parameters: Parameters, options: Lion8bitOptions) -> torch.optim.Optimizer:
    """Lion with state in 8 bits."""
    return _lion(parameters, options, "Lion8bit")


def build_paged_lion8bit(parameters: Parameters, options: Lion8bitOptions) -> torch.optim.Optimizer:
    """Lion with state in 8 bits, in pages."""
    return _lion(parameters, options, "PagedLion8bit" if _pages(parameters) else "Lion8bit")


def paging_notice(device: torch.device, options: Any) -> str | None:
    """What a paged optimizer says where it cannot page."""
    if device.type in PAGING_DEVICES:
        return None
    return (
        f"optimizer: there are no pages on {device.type}; "
        "the paged optimizer keeps its state in memory like any other"
    )


def adamw_bytes(shape: tuple[int, ...], itemsize: int, options: Any) -> int:
    """Two means in fp32, whatever the parameter is in."""
    return 2 * 4 * math.prod(shape)


def adamw8bit_bytes(shape: tuple[int, ...], itemsize: int, options: Any) -> int:
    """Two means in 8 bits with their scales; in fp32 for a small parameter."""
    return 2 * _mean_bytes(shape)


def lion8bit_bytes(shape: tuple[int, ...], itemsize: int, options: Any) -> int:
    """One mean in 8 bits with its scales; in fp32 for a small parameter."""
    return _mean_bytes(shape)


def _mean_bytes(shape: tuple[int, ...]) -> int:
    count = math.prod(shape)
    return 4 * count if count < SMALLEST_8BIT else count + 4 * math.ceil(count / STATE_BLOCK)


def _pages(parameters: Parameters) -> bool:
    """Elsewhere the unpaged twin is the same optimizer, without bitsandbytes' own warning."""
    return parameters[0].device.type in PAGING_DEVICES


def _adamw(parameters: Parameters, options: AdamW8bitOptions, name: str) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = getattr(library.load().optim, name)(
        parameters,
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        weight_decay=options.weight_decay,
    )
    return optimizer


def _lion(parameters: Parameters, options: Lion8bitOptions, name: str) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = getattr(library.load().optim, name)(
        parameters,
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        weight_decay=options.weight_decay,
    )
    return optimizer
