"""Meta's own checkpoints, made from a random transformers model by permuting it forth."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.catalog import load_catalog
from lorakit.errors import UserError
from lorakit.testing import check_weight_format
from lorakit.weights.base import open_base

NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
LLAMA2 = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5}
LLAMA3 = {**LLAMA2, "rope_theta": 500000.0, "vocab_size": 96, "ffn_dim_multiplier": 1.3}


def reference(params: dict[str, Any], **more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=params["dim"],
        intermediate_size=48,
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params["n_kv_heads"],
        rms_norm_eps=params["norm_eps"],
        rope_theta=params.get("rope_theta", 10000.0),
        **more,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def meta_state(model: Any) -> dict[str, torch.Tensor]:
    """Meta's names, and rows so that its RoPE, over neighbouring pairs, gives the same heads."""
    heads = {
        "q_proj": model.config.num_attention_heads,
        "k_proj": model.config.num_key_value_heads,
    }
    state = {}
    for name, tensor in model.state_dict().items():
        for module, count in heads.items():
            if module in name:
                # Row j of half h of a head goes to 2j + h.
                halves = tensor.reshape(count, 2, -1, tensor.shape[1])
                tensor = torch.stack([halves[:, 0], halves[:, 1]], 2).reshape(tensor.shape)  # noqa: PLW2901
        new = name.removeprefix("model.").replace("embed_tokens", "tok_embeddings")
        new = new.replace("lm_head", "output")
        for theirs, metas in NAMES.items():
            new = new.replace(theirs, metas)
        state[new] = tensor.clone()
    state["rope.freqs"] = torch.rand(4)
    return state


def split(state: dict[str, torch.Tensor], parts: int, embedding_axis: int) -> list[dict[str, Any]]:
    """As fairscale's ColumnParallelLinear and RowParallelLinear cut them."""
    axes = {"wo": 1, "w2": 1, "tok_embeddings": embedding_axis, "output": 0}
    axes |= dict.fromkeys(("wq", "wk", "wv", "w1", "w3"), 0)
    files: list[dict[str, Any]] = [{} for _ in range(parts)]
    for name, tensor in state.items():
        axis = axes.get(name.split(".")[-2])
        pieces = [tensor] * parts if axis is None else tensor.chunk(parts, axis)
        for file, piece in zip(files, pieces, strict=True):
            file[name] = piece.clone()
    return files


def write(directory: Path, params: dict[str, Any], *files: dict[str, Any]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "params.json").write_text(json.dumps(params))
    for number, state in enumerate(files):
        torch.save(state, directory / f"consolidated.{number:02d}.pth")
    return directory


def opened(directory: Path) -> Any:
    return open_base(directory, load_catalog())


@pytest.mark.parametrize(("parts", "embedding_axis"), [(1, 0), (2, 1), (2, 0)])
def test_the_model_transformers_has(parts: int, embedding_axis: int, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = reference(LLAMA2)
    directory = write(tmp_path / "m", LLAMA2, *split(meta_state(model), parts, embedding_axis))
    form = next(f for f in load_catalog().all("weight format") if f.name == "meta")
    check_weight_format(form, directory)
    checkpoint = opened(directory)
    found = {name: tensor.clone() for name, tensor in checkpoint.tensors()}
    assert found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor), name
    again = LlamaForCausalLM(LlamaConfig(**checkpoint.config)).eval()
    again.load_state_dict(found)
    tokens = torch.arange(3, 40)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def rotated(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Meta's apply_rotary_emb: neighbouring numbers of x `[T, H, D]` as one complex number."""
    length, _, width = x.shape
    frequencies = theta ** (-torch.arange(0, width, 2).double() / width)
    angles = torch.outer(torch.arange(length).double(), frequencies)
    turned = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    turned = turned * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(turned).flatten(-2)


def test_metas_rope_and_transformers_give_the_same_scores() -> None:
    """That the order put back is the right one, from Meta's own formula."""
    from lorakit.builtin.meta_directory import unpermuted

    torch.manual_seed(0)
    heads, width, length = 3, 8, 5
    query, key, x = torch.randn(24, 16), torch.randn(24, 16), torch.randn(length, 16)
    shape = (length, heads, width)
    metas = torch.einsum(
        "qhd,khd->hqk",
        rotated((x @ query.T).view(shape), 1e4),
        rotated((x @ key.T).view(shape), 1e4),
    )

    def half_turned(weight: torch.Tensor) -> torch.Tensor:
        states = (x @ unpermuted(weight, heads).T).view(shape).double()
        angles = torch.outer(
            torch.arange(length).double(), 1e4 ** (-torch.arange(0, width, 2).double() / width)
        )
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a, b = states.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    ours = torch.einsum("qhd,khd->hqk", half_turned(query), half_turned(key))
    assert (ours - metas).abs().max() < 1e-5 * math.sqrt(width)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (LLAMA2, {"max_position_embeddings": 4096, "rope_theta": 10000.0, "bos_token_id": 1}),
        ({**LLAMA2, "rope_theta": 1e6}, {"max_position_embeddings": 16384}),
        (LLAMA3, {"max_position_embeddings": 8192, "rope_scaling": None, "bos_token_id": 128000}),
    ],
)
def test_settings(params: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    config = opened(write(tmp_path / "m", params, meta_state(reference(params)))).config
    assert {key: config[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("width", "more", "factor"),
    [(32, {}, 32.0), (32, {"rope_scaling_factor": 16.0}, 16.0), (4096, {}, 8.0)],
)
def test_scaled_rope(width: int, more: dict[str, Any], factor: float, tmp_path: Path) -> None:
    params = {**LLAMA3, "use_scaled_rope": True, "n_layers": 1, "dim": width, **more}
    state = {
        name: torch.zeros(2, width) if "attention.w" in name else tensor
        for name, tensor in meta_state(reference({**LLAMA3, "n_layers": 1})).items()
    }
    config = opened(write(tmp_path / "m", params, state)).config
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert config["max_position_embeddings"] == 131072


def test_tied_heads(tmp_path: Path) -> None:
    state = meta_state(reference(LLAMA3))
    assert not opened(write(tmp_path / "m", LLAMA3, state)).config["tie_word_embeddings"]
    state["output.weight"] = state["tok_embeddings.weight"]
    assert opened(write(tmp_path / "m", LLAMA3, state)).config["tie_word_embeddings"]
    del state["output.weight"]
    assert opened(write(tmp_path / "m", LLAMA3, state)).config["tie_word_embeddings"]


def test_the_tokenizer_beside_it_or_above(tmp_path: Path) -> None:
    directory = write(tmp_path / "m", LLAMA2, meta_state(reference(LLAMA2)))
    assert opened(directory).files() == {}
    (tmp_path / "tokenizer.model").write_bytes(b"above")
    assert opened(directory).files() == {"tokenizer.model": b"above"}
    (directory / "tokenizer.model").write_bytes(b"beside")
    assert opened(directory).files() == {"tokenizer.model": b"beside"}


def test_it_trains(train_run: Any, tokenizer_dir: Path, tmp_path: Path) -> None:
    params = {**LLAMA2, "dim": 64}
    from transformers import AutoModelForCausalLM

    model = reference(params)
    model.resize_token_embeddings(384)
    directory = write(tmp_path / "m", params, meta_state(model))
    for file in tokenizer_dir.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    run = train_run(
        model=directory,
        training={"max_steps": 1},
        checkpointer={"name": "safetensors", "save_merged": True},
    )
    merged = AutoModelForCausalLM.from_pretrained(run / "merged").state_dict()
    before = model.state_dict()
    assert torch.equal(merged["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged[name], before[name])
    assert (merged[name] - before[name]).abs().max() < 0.05


@pytest.mark.parametrize(
    ("params", "change", "message"),
    [
        ({"moe_args": {"num_experts": 8}}, {}, "not settings of a Llama text model: moe_args"),
        ({"vision_chunk_size": 560}, {}, "vision_chunk_size = 560"),
        ({"n_layers": "two"}, {}, "n_layers should be a number above 0, but is 'two'"),
        ({"dim": 33}, {}, "dim 33 is no multiple"),
        ({}, {"vision.weight": torch.zeros(1)}, "not a Llama text model: has vision.weight"),
        ({}, {"norm.weight": None}, "not a Llama text model: lacks norm.weight"),
    ],
)
def test_what_is_not_llama(
    params: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    state = {**meta_state(reference(LLAMA2)), **change}
    state = {name: tensor for name, tensor in state.items() if tensor is not None}
    directory = write(tmp_path / "m", {**LLAMA2, **params}, state)
    with pytest.raises(UserError, match=message):
        opened(directory)


def test_parts_of_different_models(tmp_path: Path) -> None:
    first, second = split(meta_state(reference(LLAMA2)), 2, 0)
    del second["norm.weight"]
    with pytest.raises(UserError, match="do not hold the same tensors"):
        opened(write(tmp_path / "m", LLAMA2, first, second))
