"""The products that are timed are those of a training step, no more and no fewer."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.assemble import assemble
from lorakit.loss import batch_loss
from lorakit.progress import TerminalProgress
from lorakit.recipes import resolve_recipe
from tests.bench.matmul_limit import Scratch, step_products


class Products(TorchDispatchMode):
    """Counts operations of matrix products; in place or not, which torch's own counter does not."""

    def __init__(self) -> None:
        super().__init__()
        self.found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("mm", "addmm", "bmm"):
            left, right = args[-2:]
            self.found += 2 * left.numel() * right.shape[-1]
        return func(*args, **(kwargs or {}))


def counted(work):
    with Products() as products:
        work()
    return products.found


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_operations_are_those_of_the_step(make_recipe, targets):
    recipe = make_recipe(
        adapter={"name": "lora", "rank": 4, "targets": targets},
        data={"packed": True, "max_seq_len": 128},
    )
    run = assemble(resolve_recipe(recipe), TerminalProgress())
    ((batch, *_),) = [window for _, window in zip(range(1), run.plan.windows(0, 0), strict=False)]
    step = counted(lambda: batch_loss(run.base.causal_lm, batch).backward())
    with torch.no_grad():
        products = counted(lambda: step_products(run, batch, Scratch()))
    heads, head_dim = 4, 8
    squares = sum(length**2 for length in batch.layout.lengths)
    # In the step, a kernel makes them.
    attention = 2 * 6 * 2 * squares * heads * head_dim
    assert step > 0
    assert products == step + attention
