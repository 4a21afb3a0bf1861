"""A GGUF file as lorakit sees a base checkpoint: under Hugging Face names, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define

from lorakit.protocols import TensorSpec
from lorakit_gguf.architectures import architecture_of
from lorakit_gguf.architectures.table import Architecture
from lorakit_gguf.file import GGUFFile
from lorakit_gguf.vocabulary import Vocabulary

if TYPE_CHECKING:
    from torch import Tensor

_ONLY_SHARD = "model.safetensors"


@define
class GGUFCheckpoint:
    """An opened GGUF file; see `lorakit.protocols.BaseCheckpoint`.

    Attributes:
        path: The file.
        config: What its config.json would say.
    """

    path: Path
    config: Mapping[str, Any]
    _file: GGUFFile
    _architecture: Architecture
    _vocabulary: Vocabulary | None

    @classmethod
    def open(cls, path: Path) -> GGUFCheckpoint:
        """Reads the header only.

        Raises:
            UserError: The file is damaged, of an unsupported architecture or tensor type, or has
                settings or tensors that the architecture's Hugging Face model has no place for.
        """
        file = GGUFFile(path)
        architecture = architecture_of(file)
        vocabulary = Vocabulary.read(file)
        config = architecture.config(file)
        tokens = len(vocabulary.tokens) if vocabulary else None
        config["vocab_size"] = file.get(f"{architecture.name}.vocab_size", int, tokens)
        if config["vocab_size"] is None:
            config["vocab_size"] = file.get(f"{architecture.name}.vocab_size", int)
        if vocabulary:
            vocabulary.check_size(config["vocab_size"])
        ids = vocabulary.ids if vocabulary else {}
        config |= {f"{role}_token_id": ids.get(role) for role in ("bos", "eos", "pad")}
        config["torch_dtype"] = str(file.main_dtype()).removeprefix("torch.")
        architecture.check(file, config)
        return cls(path, config, file, architecture, vocabulary)

    def files(self) -> dict[str, bytes]:
        """The tokenizer's files, where the GGUF has a vocabulary, and generation_config.json.

        Raises:
            UserError: The tokenizer is of a kind that cannot be rebuilt.
        """
        from lorakit_gguf.tokenizer import tokenizer_files

        files: dict[str, bytes] = {}
        if self._vocabulary:
            files |= tokenizer_files(self._vocabulary, self.config["max_position_embeddings"])
            generation = self._vocabulary.generation_config()
            files["generation_config.json"] = json.dumps(generation, indent=2).encode()
        return files

    def shards(self) -> dict[str, dict[str, TensorSpec]]:
        """One shard, `model.safetensors`; dtypes are llama.cpp's (`F32`, `Q4_1`, `Q6_K`)."""
        specs: dict[str, TensorSpec] = {}
        for name, stored in self._file.tensors.items():
            if found := self._architecture.slot(name):
                specs[found[1]] = TensorSpec(stored.shape, self._file.type_name(name))
        return {_ONLY_SHARD: specs}

    def tensors(self, shard: str | None = None) -> Iterator[tuple[str, Tensor]]:
        """Each tensor in the file's order: F16 and BF16 as they are, all others in float32.

        Its pages leave resident memory when the next one is asked for.
        """
        if shard not in (None, _ONLY_SHARD):
            raise KeyError(shard)
        return self.named_tensors(self.shards()[_ONLY_SHARD])

    def named_tensors(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Those of the names; the others are not converted."""
        for name in self._file.tensors:
            found = self._architecture.slot(name)
            if found and found[1] in names:
                slot, hugging_face = found
                tensor = self._file.tensor(name)
                yield hugging_face, slot.fix(tensor, self.config) if slot.fix else tensor
                self._file.release(name)
