"""Estimated against measured peak memory, on the CPU.

    python -m tests.bench.estimate_accuracy [--shape NAME]... [--json FILE]

Makes random checkpoints of real widths with few layers, trains each with LoRA and with QLoRA, with
and without activation checkpointing, in a process of its own, and prints each one's largest
resident size beside what `lorakit estimate` had said.  Both processes are told the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tomli_w

from tests.bench.processes import run

COMMON = {"model_type": "llama", "rms_norm_eps": 1e-5}
SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2 135M": {
        **COMMON,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "Llama 3.2 1B, 4 layers": {
        **COMMON,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "TinyLlama 1.1B, 6 layers": {
        **COMMON,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 6,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "Llama 2 7B, 2 layers": {
        **COMMON,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
}
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "QLoRA": {"quantization": {"name": "nf4"}, "precision": {"name": "bf16"}},
}
TOKENS = 256
ROWS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", action="append", choices=list(SHAPES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = []
    print("| model | method | checkpointing | estimated MiB | measured MiB | difference |")
    print("|---|---|---|---|---|---|")
    for name in arguments.shape or SHAPES:
        with tempfile.TemporaryDirectory() as folder:
            found += compare_shape(name, Path(folder))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=2), encoding="utf-8")
    worst = max(abs(row["difference"]) for row in found)
    print(f"\nlargest difference: {worst:.1%}")


def compare_shape(name: str, folder: Path) -> list[dict[str, Any]]:
    """All variants of one shape."""
    # Elsewhere: a process' largest resident size counts that of the one which started it.
    script = "import sys, json; from lorakit.testing import write_checkpoint as write; "
    script += "write('llama', json.loads(sys.argv[1]), sys.argv[2])"
    shape = json.dumps(SHAPES[name])
    subprocess.run([sys.executable, "-c", script, shape, str(folder / "model")], check=True)
    rows = [
        json.dumps({"text": "".join(chr(97 + (i * j) % 26) for j in range(TOKENS + 9))})
        for i in range(1, 1 + 2 * ROWS)
    ]
    (folder / "data.jsonl").write_text("\n".join(rows), encoding="utf-8")
    found = []
    for kind, sections in KINDS.items():
        for on in (False, True):
            recipe = write_recipe(folder, sections, on)
            estimated = json.loads(lorakit("estimate", recipe, "--json")[0])["total"]
            measured = lorakit("train", recipe, "--output", str(folder / f"run-{kind}-{on}"))[1]
            row = {
                "model": name,
                "method": kind,
                "checkpointing": on,
                "estimated": estimated,
                "measured": measured,
                "difference": estimated / measured - 1,
            }
            found.append(row)
            print(
                f"| {name} | {kind} | {'on' if on else 'off'} | {estimated / 2**20:,.0f} "
                f"| {measured / 2**20:,.0f} | {row['difference']:+.1%} |",
                flush=True,
            )
    return found


def write_recipe(folder: Path, sections: dict[str, Any], checkpointing: bool) -> str:
    table = {
        "output": str(folder / "run"),
        "device": "cpu",
        "model": {"name": "llama", "path": str(folder / "model")},
        "adapter": {"name": "lora", "rank": 16},
        "data": {"name": "text", "path": str(folder / "data.jsonl"), "max_seq_len": TOKENS},
        "training": {"batch_size": ROWS, "activation_checkpointing": checkpointing},
        "checkpointer": {"name": "safetensors", "save_merged": False},
        "loggers": [{"name": "disk"}],
        **sections,
    }
    file = folder / "recipes.toml"
    file.write_text(tomli_w.dumps({"bench": table}), encoding="utf-8")
    return f"{file}:bench"


def lorakit(*arguments: str) -> tuple[str, int]:
    """What it printed, and the most bytes that were resident."""
    done = run([sys.executable, "-m", "lorakit", *arguments])
    return done.stdout, done.peak_bytes


if __name__ == "__main__":
    main()
