"""Peak memory of `lorakit merge`, on a model as large as asked for.

    python -m tests.bench.merge_memory --gigabytes 1.2 --shard-gigabytes 0.6
    python -m tests.bench.merge_memory --base DIR --quantized

Makes a random bf16 Llama (or takes DIR), puts a random adapter of rank 16 on every linear layer,
runs the command in a process of its own and prints that process's largest resident size as the
kernel counts it (ru_maxrss, mapped files included), beside that of an interpreter that has only
imported what the command imports.  With --quantized the adapter is one of a run over a base in
nf4, so that the command also compares both merged models with the trained one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from lorakit.adapters import adapter_config, write_adapter
from lorakit.base_model import build_on_meta
from lorakit.catalog import load_catalog
from lorakit.protocols import TensorSpec
from lorakit.testing.checkpoints import write_tokenizer
from lorakit.weights.base import family_of
from lorakit.weights.shard_writer import ShardWriter, stored_bytes
from lorakit.weights.stream import linear_names
from tests.bench.processes import run

CATALOG = load_catalog()
INTERPRETER = "import torch, lorakit.mergeable; from safetensors import safe_open"
QUANTIZED = "import lorakit.merge_divergence, bitsandbytes, numpy, tokenizers, jinja2"


def llama_config(gigabytes: float) -> dict[str, object]:
    """A Llama of 1024 wide layers, with as many as make up the size."""
    layer = 4 * 1024**2 + 3 * 1024 * 4096
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * 8192 * 1024) / layer))
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 8192,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }


def shapes_of(config: dict[str, object]) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Parameter names and shapes, and which of them are linear layers."""
    family = family_of(config, CATALOG, Path("config.json"))
    model = build_on_meta(family, config, family.options(path="-"))
    return {n: tuple(p.shape) for n, p in model.named_parameters()}, linear_names(model)[:-1]


def make_base(directory: Path, config: dict[str, object], largest: float) -> None:
    """Writes the model, tensor by tensor, in shards of at most `largest` bytes."""
    directory.mkdir(parents=True)
    shards: list[dict[str, TensorSpec]] = [{}]
    for name, shape in shapes_of(config)[0].items():
        spec = TensorSpec(shape, "BF16")
        if sum(map(stored_bytes, [*shards[-1].values(), spec])) > largest:
            shards.append({})
        shards[-1][name] = spec
    weight_map = {}
    for number, specs in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with ShardWriter(directory / file, specs, {"format": "pt"}) as writer:
            for name, spec in specs.items():
                writer.write(name, torch.randn(spec.shape).mul_(0.02))
        weight_map |= dict.fromkeys(specs, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config))
    write_tokenizer(directory)


def make_adapter(directory: Path, base: Path, *, quantized: bool = False, rank: int = 16) -> None:
    """A random LoRA on every linear layer but the head; quantized, with a run's data."""
    shapes, linears = shapes_of(json.loads((base / "config.json").read_text()))
    method = CATALOG.defaults("adapter")[0]
    tensors = {}
    for name in linears:
        outputs, inputs = shapes[f"{name}.weight"]
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, inputs) / inputs**0.5
        tensors[f"{key}.lora_B.weight"] = torch.randn(outputs, rank) * 0.01
    config = adapter_config(method, method.options(rank=rank), linears, str(base))
    origin = {"quantization": {"name": "nf4"}} if quantized else {}
    write_adapter(directory, tensors, config, files={}, origin=origin)
    if quantized:
        data = directory.parent / "data.jsonl"
        turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So." * 20}]
        data.write_text((json.dumps({"messages": turns}) + "\n") * 8)
        section = f'data = {{name = "messages", path = "{data}"}}'
        (directory.parent / "recipe.toml").write_text(f"[random]\n{section}\n")


def measure(base: Path, folder: Path, *, quantized: bool = False) -> dict[str, float]:
    """Merges a random adapter into `base`; sizes in bytes."""
    make_adapter(folder / "adapter", base, quantized=quantized)
    imports = f"{INTERPRETER}; {QUANTIZED}" if quantized else INTERPRETER
    interpreter = run([sys.executable, "-c", imports])
    merge = [sys.executable, "-m", "lorakit", "merge", str(folder / "adapter")]
    merged = run([*merge, "--output", str(folder / "merged")])
    sizes = [file.stat().st_size for file in base.glob("*.safetensors")]
    return {
        "model": sum(sizes),
        "largest shard": max(sizes),
        "interpreter": interpreter.peak_bytes,
        "peak": merged.peak_bytes,
        "seconds": merged.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.2)
    parser.add_argument("--shard-gigabytes", type=float, default=0.6)
    parser.add_argument("--base", type=Path, help="a model directory, in place of a new one")
    parser.add_argument("--folder", type=Path, help="where to write; its disk needs twice the size")
    parser.add_argument("--quantized", action="store_true", help="and compare the two merges")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        base = given.base or folder / "base"
        if not given.base:
            make_base(base, llama_config(given.gigabytes), given.shard_gigabytes * 1e9)
        found = measure(base, folder, quantized=given.quantized)
    for key, value in found.items():
        print(f"{key:14} {value:10.1f} s" if key == "seconds" else f"{key:14} {value / 1e9:.3f} GB")
    beyond = found["peak"] - found["interpreter"]
    print(f"{'beyond it':14} {beyond / found['largest shard']:.3f} x the largest shard")


if __name__ == "__main__":
    main()
