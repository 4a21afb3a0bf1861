"""`lorakit train` with one of its techniques left out; for those that no recipe key turns off.

    python -m tests.bench.without TECHNIQUE RECIPE --output DIR

The product has no switch for them: what is replaced here is looked up by name and has to exist.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lorakit
from lorakit import assemble, loss, runtime
from lorakit.data.batches import IGNORED
from lorakit.modules import attention, flash, matmul, sublayers
from lorakit.protocols import CausalLM


def whole_logits(
    model: CausalLM,
    hidden: Tensor,
    labels: Tensor,
    places: Tensor | None = None,
    together: int = 1,
) -> Tensor:
    """Cross-entropy over the logits of all trained tokens at once, by plain autograd."""
    kept = (labels != IGNORED).nonzero().squeeze(1)
    logits = model.logits(hidden.index_select(0, kept if places is None else places[kept]))
    return F.cross_entropy(logits.float(), labels.index_select(0, kept), reduction="sum")


def every_token(
    model: CausalLM,
    hidden: Tensor,
    labels: Tensor,
    places: Tensor | None = None,
    together: int = 1,
) -> Tensor:
    """The product's own loss, with untrained tokens projected too.

    Their hidden states are replaced by zeros, which cost as much, have a loss of log V each, and
    need no gradient.
    """
    kept = labels != IGNORED
    hidden = hidden if places is None else hidden.index_select(0, places)
    zeroed = torch.where(kept.unsqueeze(1), hidden, 0)
    total = _own_loss(model, zeroed, labels.clamp_min(0), together=together)
    return total - int((~kept).sum()) * math.log(model.lm_head.out_features)


def no_kernel() -> bool:
    """For attention's `fused_now`: scaled_dot_product_attention for each document instead."""
    return False


def in_no_call(*_: Any) -> bool:
    """For `attends_in_one_call` and `feeds_in_one_call`: halves of blocks go part by part."""
    return False


def no_blocks(q: Tensor, k: Tensor) -> bool:
    """For `beats_kernel`: torch's kernel for long documents too."""
    return False


def no_onednn(on: bool) -> bool:
    """For `use_onednn`: torch's default library for products."""
    return False


def no_arena(on: bool) -> bool:
    """For `use_arena`: malloc for large tensors too."""
    return False


def no_threads(*_: Any) -> int:
    """For `document_threads`: each operation is shared out over torch's threads instead."""
    return 1


_own_loss = loss.cross_entropy_sum
REPLACED: dict[str, list[tuple[Any, str, Callable[..., Any]]]] = {
    "chunked-loss": [(loss, "cross_entropy_sum", whole_logits)],
    "trained-only": [(loss, "cross_entropy_sum", every_token)],
    "document-threads": [(assemble, "document_threads", no_threads)],
    "arena": [(runtime, "use_arena", no_arena)],
    "onednn": [(matmul, "use_onednn", no_onednn)],
    "blockwise": [(flash, "beats_kernel", no_blocks)],
    "flash-kernel": [
        (attention, "fused_now", no_kernel),
        (sublayers, "attends_in_one_call", in_no_call),
    ],
    "sublayers": [
        (sublayers, "attends_in_one_call", in_no_call),
        (sublayers, "feeds_in_one_call", in_no_call),
    ],
}


@contextmanager
def without(technique: str) -> Iterator[None]:
    """Within it, lorakit does not use that technique."""
    own = [(module, name, getattr(module, name)) for module, name, _ in REPLACED[technique]]
    for module, name, replacement in REPLACED[technique]:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for module, name, function in own:
            setattr(module, name, function)


def main() -> None:
    technique, recipe, _, output = sys.argv[1:]
    with without(technique):
        lorakit.train(recipe, output=output)


if __name__ == "__main__":
    main()
