"""Llama checkpoints as Meta publishes them: params.json and consolidated.*.pth.

Source: `ModelArgs`, `Transformer` and `apply_scaling` in https://github.com/meta-llama/llama-models
(models/llama3/args.py, model.py) and https://github.com/meta-llama/llama (llama/model.py).
Several files are the parts of a model split for tensor parallelism, in fairscale's way: parallel
layers are cut along one axis each, everything else is in every file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from lorakit.builtin.hf_directory import SINGLE, claims_torch, read_json
from lorakit.builtin.hf_directory import claims as claims_safetensors
from lorakit.errors import UserError, listing
from lorakit.protocols import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

_PATTERN = "consolidated*.pth"
_SIDE_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


@frozen
class Part:
    """A tensor's place.

    Attributes:
        name: Hugging Face's; `{}` stands for the layer.
        axis: The one it is split along; None where every file has all of it.
        heads: The config's key for how many heads the rows are permuted in, or None.
    """

    name: str
    axis: int | None
    heads: str | None = None


_TOP = {
    "tok_embeddings.weight": Part("model.embed_tokens.weight", 0),
    "norm.weight": Part("model.norm.weight", None),
    "output.weight": Part("lm_head.weight", 0),
}
_LAYER = {
    "attention.wq.weight": Part("self_attn.q_proj.weight", 0, "num_attention_heads"),
    "attention.wk.weight": Part("self_attn.k_proj.weight", 0, "num_key_value_heads"),
    "attention.wv.weight": Part("self_attn.v_proj.weight", 0),
    "attention.wo.weight": Part("self_attn.o_proj.weight", 1),
    "feed_forward.w1.weight": Part("mlp.gate_proj.weight", 0),
    "feed_forward.w2.weight": Part("mlp.down_proj.weight", 1),
    "feed_forward.w3.weight": Part("mlp.up_proj.weight", 0),
    "attention_norm.weight": Part("input_layernorm.weight", None),
    "ffn_norm.weight": Part("post_attention_layernorm.weight", None),
}
_READ = frozenset(
    [
        *("dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "max_seq_len"),
        *("rope_theta", "use_scaled_rope", "rope_scaling_factor", "rope_high_freq_factor"),
    ]
)
# What the tensors' own shapes say, and settings of a run.
_IDLE = frozenset(["multiple_of", "ffn_dim_multiplier", "vocab_size", "max_batch_size"])
_LARGEST_LLAMA_32 = 3072


def claims(path: Path) -> bool:
    """A directory with params.json and consolidated*.pth, and no Hugging Face weights."""
    if not (path / "params.json").is_file() or not any(path.glob(_PATTERN)):
        return False
    return not claims_safetensors(path) and not claims_torch(path)


class MetaDirectory:
    """A `lorakit.protocols.BaseCheckpoint` over such a directory, under Hugging Face's names and
    in its row order.

    config.json is made from params.json and the tensors' shapes.  Two things are in neither: the
    longest context, taken from the generation (Llama 2: 4096; Code Llama: 16384; Llama 3: 8192;
    3.1 on: 131072), and whether scaled RoPE divides by 8 (3.1) or 32 (3.2), told by the width.

    Raises:
        UserError: params.json has settings that are not Llama's, the tensors are not Llama's, or
            a file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        from lorakit.weights.torch_file import open_tensors

        self.path = path
        self._files = [open_tensors(file) for file in sorted(path.glob(_PATTERN))]
        self._places = self._find_places()
        self._params = _read_params(path / "params.json")
        self.config: Mapping[str, Any] = self._make_config()

    def files(self) -> Mapping[str, bytes]:
        """The tokenizer's; Llama 2's download has tokenizer.model one directory up."""
        found = {n: self.path / n for n in _SIDE_FILES if (self.path / n).is_file()}
        above = self.path.parent / "tokenizer.model"
        if not any(name.startswith("tokenizer.") for name in found) and above.is_file():
            found["tokenizer.model"] = above
        return {name: file.read_bytes() for name, file in found.items()}

    def shards(self) -> Mapping[str, Mapping[str, TensorSpec]]:
        from lorakit.weights.dtypes import dtype_name

        return {
            SINGLE: {
                hf: TensorSpec(self._shape(meta), dtype_name(self._files[0][meta].dtype))
                for hf, (meta, _) in self._places.items()
            }
        }

    def tensors(self, shard: str | None = None) -> Iterator[tuple[str, Tensor]]:
        return self.named_tensors(self._places)

    def named_tensors(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        import torch

        from lorakit.weights.torch_file import release

        for name, (meta, part) in self._places.items():
            if name not in names:
                continue
            pieces = [file[meta] for file in self._files]
            axis = self._axis(meta)
            tensor = pieces[0] if axis is None else torch.cat(pieces, axis)
            yield name, unpermuted(tensor, self.config[part.heads]) if part.heads else tensor
            for piece in pieces:
                release(piece)

    def _find_places(self) -> dict[str, tuple[str, Part]]:
        """Hugging Face's name -> Meta's, and the part."""
        names = [set(file) for file in self._files]
        if any(other != names[0] for other in names):
            raise UserError(
                f"{self.path}: the {len(names)} consolidated files do not hold the same tensors",
                "They may be of several models, or a download was cut off.",
            )
        places, unknown = {}, []
        for meta in self._files[0]:
            part, layer = _part(meta)
            if part is not None:
                places[part.name if layer is None else f"model.layers.{layer}.{part.name}"] = (
                    meta,
                    part,
                )
            # RoPE's frequencies follow from the settings.
            elif meta != "rope.freqs":
                unknown.append(meta)
        wanted = {"tok_embeddings.weight", "norm.weight", "layers.0.attention.wq.weight"}
        wanted |= {"layers.0.attention.wk.weight", "layers.0.feed_forward.w1.weight"}
        missing = sorted(wanted - names[0])
        if unknown or missing:
            what = f"has {listing(unknown[:3])}" if unknown else f"lacks {listing(missing)}"
            raise UserError(
                f"{self.path}: not a Llama text model: {what}",
                "Take the model in Hugging Face's format (config.json and safetensors).",
            )
        return places

    def _axis(self, meta: str) -> int | None:
        """The axis a tensor is to be joined along."""
        part, _ = _part(meta)
        if part is None or part.axis is None or len(self._files) == 1:
            return None
        # Llama 2 cuts the embedding's columns, Llama 3 its rows.
        if meta == "tok_embeddings.weight":
            width = self._files[0]["norm.weight"].shape[0]
            return 0 if self._files[0][meta].shape[1] == width else 1
        return part.axis

    def _shape(self, meta: str) -> tuple[int, ...]:
        shape = list(self._files[0][meta].shape)
        axis = self._axis(meta)
        if axis is not None:
            shape[axis] = sum(file[meta].shape[axis] for file in self._files)
        return tuple(shape)

    def _is_tied(self) -> bool:
        head, embedding = (
            self._files[0].get(n) for n in ("output.weight", "tok_embeddings.weight")
        )
        return head is None or (embedding is not None and head.data_ptr() == embedding.data_ptr())

    def _make_config(self) -> dict[str, Any]:
        params = self._params
        heads = params["n_heads"]
        theta = float(params.get("rope_theta", 10_000.0))
        scaled = params.get("use_scaled_rope", False)
        vocabulary = self._shape("tok_embeddings.weight")[0]
        newer = theta == 500_000.0
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": params["dim"],
            "intermediate_size": self._shape("layers.0.feed_forward.w1.weight")[0],
            "num_hidden_layers": params["n_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": params.get("n_kv_heads") or heads,
            "head_dim": params["dim"] // heads,
            "hidden_act": "silu",
            "vocab_size": vocabulary,
            "rms_norm_eps": float(params["norm_eps"]),
            "max_position_embeddings": _context(params, theta, scaled),
            "rope_theta": theta,
            "rope_scaling": _scaling(params) if scaled else None,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": self._is_tied(),
            "bos_token_id": 128_000 if newer else 1,
            "eos_token_id": 128_001 if newer else 2,
            "torch_dtype": str(self._files[0]["norm.weight"].dtype).removeprefix("torch."),
        }


def _part(meta: str) -> tuple[Part | None, str | None]:
    """A tensor's part and layer by Meta's name; None, None for an unknown one."""
    layer = re.fullmatch(r"layers\.(0|[1-9][0-9]*)\.(.+)", meta)
    if layer:
        return _LAYER.get(layer[2]), layer[1]
    return _TOP.get(meta), None


def _read_params(path: Path) -> dict[str, Any]:
    params = read_json(path)
    unknown = {k: v for k, v in params.items() if k not in _READ | _IDLE and v not in (None, False)}
    if unknown:
        shown = listing([f"{key} = {str(value)[:40]}" for key, value in unknown.items()])
        raise UserError(
            f"{path}: not settings of a Llama text model: {shown}",
            "Take the model in Hugging Face's format (config.json and safetensors).",
        )
    for key in ("dim", "n_layers", "n_heads", "norm_eps"):
        value = params.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise UserError(f"{path}: {key} should be a number above 0, but is {value!r}")
    if params["dim"] % params["n_heads"]:
        raise UserError(f"{path}: dim {params['dim']} is no multiple of n_heads")
    return params


def _context(params: Mapping[str, Any], theta: float, scaled: bool) -> int:
    if isinstance(params.get("max_seq_len"), int):
        return int(params["max_seq_len"])
    if scaled:
        return 131_072
    return {500_000.0: 8192, 1_000_000.0: 16_384}.get(theta, 4096)


def _scaling(params: Mapping[str, Any]) -> dict[str, Any]:
    usual = 32.0 if params["dim"] <= _LARGEST_LLAMA_32 else 8.0
    return {
        "rope_type": "llama3",
        "factor": float(params.get("rope_scaling_factor") or usual),
        "low_freq_factor": 1.0,
        "high_freq_factor": float(params.get("rope_high_freq_factor") or 4.0),
        "original_max_position_embeddings": 8192,
    }


def unpermuted(rows: Tensor, heads: int) -> Tensor:
    """Query or key rows `[heads * D, in]` from Meta's order to Hugging Face's.

    Meta's RoPE turns neighbouring rows (2j, 2j + 1) of a head, Hugging Face's (j, j + D/2): row
    2j + h becomes row h * D/2 + j.
    """
    width = rows.shape[1]
    return rows.view(heads, -1, 2, width).transpose(1, 2).reshape(rows.shape)
