"""Activation checkpointing: less is kept, and nothing changes."""

from __future__ import annotations

import gc
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorakit import arena
from lorakit.arena import use_arena
from lorakit.blocks import checkpoint_blocks
from lorakit.errors import RecipeError, UserError
from lorakit.modules import RMSNorm
from lorakit.modules.flash import has_flash
from lorakit.modules.low_rank import plain_path
from lorakit.options import CHECKPOINTING_MODES, faster_mode
from lorakit.recipes import resolve_recipe

MODES = [mode for mode in CHECKPOINTING_MODES if mode != "none"]


attention_keeps_what_it_is_given = pytest.mark.skipif(
    not has_flash(torch.empty(1, 2, 8), torch.empty(1, 1, 8)),
    reason="this torch's attention repeats what query heads share, and keeps it",
)


class LiveStorages(TorchDispatchMode):
    """Knows what was made while it was on and is still held, whoever holds it."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def bytes_beside(self, model: nn.Module) -> int:
        own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        gc.collect()
        return sum(
            size for at, (ref, size) in self._made.items() if at not in own and not ref.expired()
        )


def kept_bytes(model, batch) -> tuple[int, int]:
    """What is held after a forward pass, and once the backward pass is over too."""
    with LiveStorages() as live:
        total = model.hidden(batch.tokens, batch.layout).sum()
        forward = live.bytes_beside(model)
        total.backward()
        model.zero_grad()
        del total
    return forward, live.bytes_beside(model)


def assert_same(found, expected) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-6 * scale, msg=name)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("adapter", ["lora", "dropout", "dora", "dora_dropout"])
def test_gradients_are_those_without(
    mode, model_type, adapter, fused, make_model, loss_and_gradients
):
    model = make_model(model_type, adapter)
    if fused:
        expected = loss_and_gradients(model)
        checkpoint_blocks(model, mode)
        assert_same(loss_and_gradients(model), expected)
    else:
        with plain_path():
            expected = loss_and_gradients(model)
            checkpoint_blocks(model, mode)
            assert_same(loss_and_gradients(model), expected)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3", "qwen3"])
def test_each_mode_keeps_less_than_the_one_before(model_type, make_model, make_batch):
    kept = {"no mode": kept_bytes(make_model(model_type), make_batch())[0]}
    for mode in ("none", "selective", "block"):
        model = make_model(model_type)
        checkpoint_blocks(model, mode)
        kept[mode], after = kept_bytes(model, make_batch())
        # Nothing but the layout's and the rotary tables, which belong to the batch.
        assert after < 0.2 * kept["none"]
    assert kept["selective"] < kept["none"] < kept["no mode"]
    assert kept["selective"] < 0.75 * kept["no mode"]
    assert kept["block"] < 0.5 * kept["selective"]


@pytest.mark.parametrize("mode", ["selective", "block"])
def test_blocks_that_are_left_out_keep_more(mode, make_model, make_batch, loss_and_gradients):
    """The first `count` are in the mode, the others in the next faster one."""
    kept = []
    for count in (1, 2, 3, 0):
        model = make_model("llama", num_hidden_layers=4)
        expected = loss_and_gradients(model)
        checkpoint_blocks(model, mode, count=count)
        assert_same(loss_and_gradients(model), expected)
        kept.append(kept_bytes(model, make_batch())[0])
    saved = [before - after for before, after in pairwise(kept)]
    assert min(saved) > 0
    faster = make_model("llama", num_hidden_layers=4)
    checkpoint_blocks(faster, faster_mode(mode))
    assert kept_bytes(faster, make_batch())[0] - kept[0] == pytest.approx(saved[0], rel=0.05)


@pytest.mark.parametrize("mode", CHECKPOINTING_MODES)
@pytest.mark.parametrize("adapter", ["lora", "dora_dropout"])
def test_an_arena_changes_nothing(
    mode, adapter, model_type, make_model, loss_and_gradients, monkeypatch
):
    model = make_model(model_type, adapter)
    checkpoint_blocks(model, mode)
    expected = loss_and_gradients(model)
    monkeypatch.setattr(arena, "SMALLEST", 1)
    use_arena(False)
    if not use_arena(True):
        pytest.skip("no arena on this system")
    try:
        found = loss_and_gradients(model)
        assert torch.equal(found[0], expected[0])
        assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])
        assert arena._arenas[0].most > 0
    finally:
        use_arena(False)


def test_a_model_of_fewer_blocks_is_told(make_model):
    with pytest.raises(UserError, match=r"training\.checkpointed_blocks: 9, where the model has"):
        checkpoint_blocks(make_model("llama"), "selective", count=9)


@attention_keeps_what_it_is_given
def test_selective_drops_inputs_once(make_model, make_batch):
    """With dropout, q, k and v are kept: made again, they would drop other inputs."""
    kept = {}
    for adapter in ("lora", "dropout"):
        model = make_model("llama", adapter)
        checkpoint_blocks(model, "selective")
        kept[adapter], _ = kept_bytes(model, make_batch())
    heads = 32 + 16 + 16
    batch = make_batch()
    assert kept["dropout"] - kept["lora"] > len(model.blocks) * heads * len(batch.tokens) * 4


@attention_keeps_what_it_is_given
def test_selective_keeps_neither_what_norms_give_nor_what_is_made_of_it(make_model, make_batch):
    model = make_model("llama", num_hidden_layers=6, attention_bias=False, mlp_bias=False)
    batch = make_batch()
    before, _ = kept_bytes(model, batch)
    checkpoint_blocks(model, "selective")
    after, _ = kept_bytes(model, batch)
    dim, heads, inner, rank, layers = 32, 32 + 16 + 16, 48, 3, 6
    # With the thin products of gate and up, [T, r] each.  The first norm, whose input comes from
    # a frozen embedding and needs no gradient, keeps its input for this alone.
    a_token = layers * (heads + 2 * inner + 2 * rank + 2 * dim) - dim
    assert before - after == a_token * len(batch.tokens) * 4


@pytest.mark.parametrize("mode", ["none", "selective", "block"])
def test_a_forward_pass_that_no_backward_pass_follows_is_forgotten(mode, make_model, make_batch):
    model = make_model("llama")
    checkpoint_blocks(model, mode)

    def left_behind() -> int:
        batch = make_batch()
        model.hidden(batch.tokens, batch.layout)
        del batch
        gc.collect()
        return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())

    assert left_behind() == left_behind()


class ThirdParty(nn.Module):
    """A model of other modules than lorakit's."""

    class Block(nn.Module):
        def __init__(self, mlp_name: str) -> None:
            super().__init__()
            self.norm = RMSNorm(16, 1e-6)
            self.mixer = nn.Linear(16, 16)
            inner = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.3), nn.Tanh(), nn.Linear(64, 16))
            setattr(self, mlp_name, inner)
            self.inner = [inner]

        def forward(self, x):
            x = x + self.mixer(self.norm(x))
            return x + self.inner[0](self.norm(x))

    def __init__(self, mlp_name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(self.Block(mlp_name) for _ in range(3))
        for block in self.blocks:
            nn.init.normal_(block.norm.weight, 1.0, 0.2)

    def hidden(self, x, layout=None):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("mlp_name", ["mlp", "feed_forward"])
def test_other_blocks_are_recomputed_in_part_or_whole(mlp_name):
    x = torch.randn(9, 16)

    def run(model):
        torch.manual_seed(1)
        with LiveStorages() as live:
            y = model.hidden(x).square().sum()
            kept = live.bytes_beside(model)
        y.backward()
        return kept, [p.grad for p in model.parameters()]

    kept, expected = run(ThirdParty(mlp_name))
    model = ThirdParty(mlp_name)
    checkpoint_blocks(model, "selective")
    less, found = run(model)
    assert less < 0.6 * kept
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_a_result_that_is_changed_in_place_is_kept_as_it_is():
    """Made again, it would be as it was before."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mixer = RMSNorm(16, 1e-6), nn.Linear(16, 16)
            nn.init.normal_(self.norm.weight, 1.0, 0.2)

        def forward(self, x):
            return self.mixer(self.norm(x).mul_(2))

    x = torch.randn(9, 16)
    block = Block()
    block(x).square().sum().backward()
    expected, block.mixer.weight.grad = block.mixer.weight.grad, None
    model = ThirdParty("mlp")
    model.blocks = nn.ModuleList([block])
    checkpoint_blocks(model, "none")
    model.hidden(x).square().sum().backward()
    torch.testing.assert_close(block.mixer.weight.grad, expected)


@pytest.mark.parametrize("mode", MODES)
def test_evaluation_is_left_alone(mode, make_model, make_batch):
    batch = make_batch()
    model = make_model("llama").eval()
    with torch.no_grad():
        expected = model.hidden(batch.tokens, batch.layout)
        checkpoint_blocks(model, mode)
        assert torch.equal(model.hidden(batch.tokens, batch.layout), expected)


@pytest.mark.parametrize(
    ("written", "means"),
    [("true", "block"), ("false", "none"), ("auto", "auto"), *((m, m) for m in MODES)],
)
def test_what_a_recipe_may_say(written, means, make_recipe):
    value = {"true": True, "false": False}.get(written, written)
    overrides = {"training.activation_checkpointing": value}
    recipe = resolve_recipe(make_recipe(), overrides=overrides)
    assert recipe.training.activation_checkpointing == means


def test_another_word_is_refused_with_the_nearest(make_recipe):
    with pytest.raises(
        RecipeError, match=r"training\.activation_checkpointing.*selective"
    ) as error:
        resolve_recipe(make_recipe(), overrides={"training.activation_checkpointing": "selectiv"})
    assert "did you mean 'selective'" in str(error.value)
    with pytest.raises(RecipeError, match="true or false or a string"):
        resolve_recipe(make_recipe(), overrides={"training.activation_checkpointing": 3})
