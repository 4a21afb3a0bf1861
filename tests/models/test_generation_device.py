"""Where the tokens of an answer are made: beside the head, whatever has taken its place."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit.builtin.lora_linear import LoRALinear
from lorakit.generation import generate_ids


class Seen(Exception):
    """Ends the pass that was waited for."""


class Model(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.lm_head = head

    def hidden(self, tokens, layout, cache):
        assert tokens.device.type == layout.positions.device.type == "meta"
        raise Seen


@pytest.mark.parametrize("adapted", [False, True])
def test_tokens_are_made_on_the_heads_device(adapted):
    head = nn.Linear(4, 5, bias=False, device="meta")
    if adapted:
        head = LoRALinear(head, rank=2, scale=1.0, dropout=0.0, dora=False)
    ids = generate_ids(Model(head), [1, 2], max_new_tokens=1, stop_ids=frozenset())
    with torch.no_grad(), pytest.raises(Seen):
        next(ids)
