"""torch's own optimizers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs.validators import and_, ge, gt, lt

from lorakit.options import OptimizerOptions

if TYPE_CHECKING:
    import torch


@frozen(kw_only=True)
class AdamWOptions(OptimizerOptions):
    """`[optimizer]` with `name = "adamw"`.

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
class SGDOptions(OptimizerOptions):
    """`[optimizer]` with `name = "sgd"`.

    Attributes:
        momentum: 0 means none.
        weight_decay: Added to the gradient.
    """

    momentum: float = field(default=0.0, validator=ge(0.0))
    weight_decay: float = field(default=0.0, validator=ge(0.0))


def build_adamw(
    parameters: Sequence[torch.nn.Parameter], options: AdamWOptions
) -> torch.optim.Optimizer:
    """torch.optim.AdamW.  Reference: Loshchilov and Hutter 2017, arXiv 1711.05101."""
    import torch

    return torch.optim.AdamW(
        parameters,
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        weight_decay=options.weight_decay,
        # On a CPU a quarter of the time of one small operation after the other.
        fused=True,
    )


def build_sgd(
    parameters: Sequence[torch.nn.Parameter], options: SGDOptions
) -> torch.optim.Optimizer:
    """torch.optim.SGD."""
    import torch

    return torch.optim.SGD(
        parameters,
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
    )


def adamw_state_bytes(shape: tuple[int, ...], itemsize: int, options: AdamWOptions) -> int:
    """Two means in the parameter's dtype, and the step in fp32."""
    return 2 * math.prod(shape) * itemsize + 4


def sgd_state_bytes(shape: tuple[int, ...], itemsize: int, options: SGDOptions) -> int:
    """The momentum, if there is any."""
    return math.prod(shape) * itemsize if options.momentum else 0
