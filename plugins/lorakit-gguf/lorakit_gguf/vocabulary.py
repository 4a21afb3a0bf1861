"""The tokenizer's raw material in a GGUF file: tokens, their kinds, scores, merges, special ids.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, section "Tokenizer"; what holds
where a key is missing: `llama_vocab::impl::load` in llama.cpp's src/llama-vocab.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any

from attrs import frozen

from lorakit.errors import UserError
from lorakit_gguf.file import GGUFFile

_ROLES = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "pad": "padding_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
}
_SENTENCEPIECE_IDS = {"unk": 0, "bos": 1, "eos": 2}
_ADDS_BOS = frozenset(["llama3", "llama-v3", "llama-bpe", "tekken"])


class Kind(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@frozen(kw_only=True)
class Vocabulary:
    """A tokenizer as a GGUF file describes it.

    Attributes:
        path: The file, for messages.
        model: `gpt2` (byte-level BPE) or `llama` (SentencePiece).
        pre: How text is cut before BPE, by llama.cpp's name; empty if the file does not say.
        tokens: By id.
        kinds: By id.
        scores: By id; empty if the file has none.
        merges: Best first; empty if the file has none.
        ids: The special tokens there are, by role: bos, eos, unk, pad, eot, eom.
        add_bos: Put bos before every text.
        add_eos: Put eos behind every text.
        add_space_prefix: Put a space before every text.
        chat_template: In Jinja.
    """

    path: Path
    model: str
    pre: str
    tokens: Sequence[str]
    kinds: Sequence[int]
    scores: Sequence[float]
    merges: Sequence[str]
    ids: Mapping[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    chat_template: str | None

    @classmethod
    def read(cls, file: GGUFFile) -> Vocabulary | None:
        """What the file says; None if it has no vocabulary.

        Raises:
            UserError: Its lists are of different lengths, or two tokens are the same.
        """
        model = file.get("tokenizer.ggml.model", str, "none")
        if model in ("none", "no_vocab"):
            return None
        tokens = [
            token or f"[EMPTY_{index}]"  # llama.cpp's name for it
            for index, token in enumerate(_strings(file, "tokenizer.ggml.tokens"))
        ]
        if len(set(tokens)) < len(tokens):
            raise UserError(f"{file.path}: its vocabulary has the same token twice")
        kinds = file.get("tokenizer.ggml.token_type", list, [int(Kind.NORMAL)] * len(tokens))
        scores = file.get("tokenizer.ggml.scores", list, [])
        if len(kinds) != len(tokens) or len(scores) not in (0, len(tokens)):
            raise UserError(
                f"{file.path}: {len(tokens)} tokens, but {len(kinds)} token types and "
                f"{len(scores)} scores"
            )
        pre = file.get("tokenizer.ggml.pre", str, "")
        sentencepiece = model == "llama"
        ids = dict(_SENTENCEPIECE_IDS if sentencepiece else {})
        for role, key in _ROLES.items():
            ids[role] = file.get(f"tokenizer.ggml.{key}", int, ids.get(role, -1))
        return cls(
            path=file.path,
            model=model,
            pre=pre,
            tokens=tokens,
            kinds=kinds,
            scores=scores,
            merges=_strings(file, "tokenizer.ggml.merges", []),
            # Some converters write -1, as an unsigned number, for a token that there is not.
            ids={role: index for role, index in ids.items() if 0 <= index < len(tokens)},
            add_bos=file.get(
                "tokenizer.ggml.add_bos_token", bool, sentencepiece or pre in _ADDS_BOS
            ),
            add_eos=file.get("tokenizer.ggml.add_eos_token", bool, False),
            add_space_prefix=file.get("tokenizer.ggml.add_space_prefix", bool, sentencepiece),
            chat_template=file.get("tokenizer.chat_template", str, None),
        )

    def check_size(self, rows: int) -> None:
        """Raises `UserError` if there are more tokens than the embedding has rows."""
        if len(self.tokens) > rows:
            raise UserError(
                f"{self.path}: {len(self.tokens)} tokens for an embedding of {rows} rows"
            )

    def token(self, role: str) -> str | None:
        """The special token of that role."""
        return self.tokens[self.ids[role]] if role in self.ids else None

    def of_kind(self, *kinds: Kind) -> list[str]:
        """The tokens of these kinds, by ascending id."""
        return [t for t, kind in zip(self.tokens, self.kinds, strict=True) if kind in kinds]

    def generation_config(self) -> dict[str, Any]:
        """generation_config.json: an answer ends at eos, or at the end of a turn or message."""
        ends = sorted({self.ids[role] for role in ("eos", "eot", "eom") if role in self.ids})
        values = {
            "bos_token_id": self.ids.get("bos"),
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
            "pad_token_id": self.ids.get("pad"),
        }
        return {key: value for key, value in values.items() if value is not None}


def _strings(file: GGUFFile, key: str, default: Any = None) -> list[str]:
    values = file.get(key, list) if default is None else file.get(key, list, default)
    if any(type(value) is not str for value in values):
        raise UserError(f"{file.path}: the metadata field {key} should be a list of strings")
    return values
