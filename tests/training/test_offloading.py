"""Activations that wait for the backward pass in host memory, in place of which stands here a
list of copies."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from safetensors.torch import load_file

import lorakit
from lorakit import assemble
from lorakit.blocks import checkpoint_blocks
from lorakit.errors import RecipeError
from lorakit.offloading import ActivationOffload


class FakeCopies:
    """Copies on the CPU; remembers their order, and whether what was copied has been let go."""

    def __init__(self):
        self.events = []
        self.device = []
        self.hosts = []

    def out(self, tensor):
        host = [len(self.hosts), tensor.detach().clone()]
        self.events.append(("out", host[0]))
        self.device.append(weakref.ref(tensor.untyped_storage()))
        self.hosts.append(weakref.ref(host[1]))
        return host

    def start_back(self, host):
        self.events.append(("start", host[0]))
        return [host[0], host[1].clone()]

    def finish_back(self, under_way):
        self.events.append(("finish", under_way[0]))
        return under_way[1]


class Blocks(torch.nn.Module):
    """Blocks with dropout, as a model that checkpointing can be put on."""

    def __init__(self, count):
        super().__init__()
        torch.manual_seed(0)
        layers = [
            torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.3), torch.nn.Tanh())
            for _ in range(count)
        ]
        self.blocks = torch.nn.ModuleList(layers)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def gradients(model, x):
    torch.manual_seed(1)
    model(x).sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


def test_gradients_are_those_without_and_copies_are_ahead_of_their_use():
    x = torch.randn(5, 8, requires_grad=True)
    expected = gradients(Blocks(4), x)
    model, copies = Blocks(4), FakeCopies()
    checkpoint_blocks(model, offload=ActivationOffload(copies))
    for found, wanted in zip(gradients(model, x), expected, strict=True):
        assert torch.equal(found, wanted)
    # The last block's input stays; each other is on its way back while the next is in use.
    assert copies.events == [
        *[("out", 0), ("out", 1), ("out", 2)],
        *[("start", 2), ("finish", 2), ("start", 1)],
        *[("finish", 1), ("start", 0)],
        ("finish", 0),
    ]


def test_memory_is_let_go_on_the_device_at_once_and_on_the_host_after_the_backward_pass():
    model, copies = Blocks(4), FakeCopies()
    checkpoint_blocks(model, offload=ActivationOffload(copies))
    for step in range(2):
        # Not a leaf, which autograd would keep.
        x = torch.randn(5, 8, requires_grad=True) * 2
        loss = model(x).sum()
        del x
        gc.collect()
        device, hosts = copies.device[3 * step :], copies.hosts[3 * step :]
        assert [storage() is None for storage in device] == [True] * 3
        assert [host() is None for host in hosts] == [False] * 3
        loss.backward()
        del loss
        gc.collect()
        assert [host() is None for host in hosts] == [True] * 3


def test_a_graph_that_is_kept_can_be_run_backward_twice():
    model = Blocks(3)
    checkpoint_blocks(model, offload=ActivationOffload(FakeCopies()))
    x = torch.randn(5, 8, requires_grad=True)
    loss = model(x).sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_run_with_offloading_gives_the_same_adapter(
    dropout, train_run, make_rows, make_checkpoint, monkeypatch
):
    base = make_checkpoint(num_hidden_layers=4)
    settings = {
        "model": base,
        "adapter": {"dropout": dropout},
        "training": {"batch_size": 2, "gradient_accumulation_steps": 2},
        "optimizer": {"name": "sgd", "lr": 0.5},
    }
    plain = train_run(make_rows(8), **settings)
    copies = FakeCopies()
    monkeypatch.setattr(assemble, "offload_to_host", lambda device: ActivationOffload(copies))
    settings["training"] |= {"activation_checkpointing": True, "activation_offloading": True}
    offloaded = train_run(make_rows(8), **settings)
    adapters = [
        load_file(run / "adapter" / "adapter_model.safetensors") for run in (offloaded, plain)
    ]
    for key, expected in adapters[1].items():
        torch.testing.assert_close(adapters[0][key], expected, atol=1e-6, rtol=0, msg=key)
    # 4 micro-batches, of whose 4 blocks 3 are offloaded: a tensor each.
    assert [kind for kind, _ in copies.events].count("out") == 4 * 3


def test_offloading_on_a_cpu_says_that_it_changes_nothing(make_recipe, capsys):
    training = {"activation_checkpointing": True, "activation_offloading": True, "max_steps": 1}
    lorakit.train(make_recipe(training=training, loggers=[{"name": "terminal"}]))
    assert "activation_offloading: changes nothing" in capsys.readouterr().out


def test_offloading_without_checkpointing_is_an_error(make_recipe):
    with pytest.raises(RecipeError, match="activation_offloading needs activation_checkpointing"):
        lorakit.train(make_recipe(training={"activation_offloading": True}))
