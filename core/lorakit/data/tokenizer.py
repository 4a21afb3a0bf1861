"""The base model's tokenizer: text to ids, conversations to text, and which ids to stop at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from attrs import define

from lorakit.data.chat_template import built_in_template, render
from lorakit.errors import UserError
from lorakit.protocols import Message

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


@define
class Tokenizer:
    """A tokenizer with its chat template.

    Attributes:
        backend: The `tokenizers` tokenizer.
        special_tokens: `bos_token`, `eos_token` ... as texts, those that exist.
        template: The jinja chat template, or None for a base model without one.
        stop_ids: Ids that end an answer.
        files: The files it came from, by name; written beside adapters and merged models.
    """

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    template: str | None
    stop_ids: frozenset[int]
    files: Mapping[str, bytes]

    @property
    def vocabulary_size(self) -> int:
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def token_id(self, which: str) -> int | None:
        """The id of `bos_token`, `eos_token` ..., or None."""
        text = self.special_tokens.get(which)
        return None if text is None else self.backend.token_to_id(text)

    def encode(self, text: str, *, special: bool) -> tokenizers.Encoding:
        """`special` lets the tokenizer add what it adds around a text (usually BOS); a rendered
        template already holds its own."""
        return self.backend.encode(text, add_special_tokens=special)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        return str(self.backend.decode(list(ids), skip_special_tokens=not special))

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as text.

        Raises:
            ValueError: There is no template, or it refuses these messages.
        """
        if self.template is None:
            raise ValueError("the tokenizer has no chat template; set data.chat_template")
        return render(
            self.template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
        )

    def with_template(self, name: str) -> Tokenizer:
        """The same tokenizer with a built-in template, or with its own for `auto`.

        The files change with it, so that whoever loads the result renders as training did.
        """
        if name == "auto":
            return self
        template = built_in_template(name)
        written = {k: v for k, v in self.files.items() if k != "chat_template.jinja"}
        config = _json(written, "tokenizer_config.json") | {"chat_template": template}
        written["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2).encode()
        return Tokenizer(self.backend, self.special_tokens, template, self.stop_ids, written)


def load_tokenizer(files: Mapping[str, bytes], where: str) -> Tokenizer:
    """Builds the tokenizer from a checkpoint's files.

    Args:
        files: tokenizer.json, tokenizer_config.json, chat_template.jinja,
            special_tokens_map.json and generation_config.json, as far as they exist.
        where: The checkpoint, for messages.

    Raises:
        UserError: There is no tokenizer.json, or a file is malformed.
    """
    if "tokenizer.json" not in files:
        raise UserError(f"{where}: no tokenizer.json", "lorakit reads Hugging Face's tokenizers.")
    try:
        backend = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode("utf-8"))
        # A saved tokenizer may carry the padding or truncation of its last use.
        backend.no_padding()
        backend.no_truncation()
        config = _json(files, "tokenizer_config.json")
        special = _json(files, "special_tokens_map.json") | config
        generation = _json(files, "generation_config.json")
    # tokenizers raises bare Exception for a file it cannot parse.
    except Exception as error:
        raise UserError(f"{where}: the tokenizer's files cannot be read: {error}") from None
    names = {key: _text(special[key]) for key in SPECIAL if special.get(key)}
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].decode("utf-8")
    return Tokenizer(backend, names, template, _stop_ids(backend, names, generation), dict(files))


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return dict(json.loads(files[name])) if name in files else {}


def _text(token: Any) -> str:
    return str(token["content"]) if isinstance(token, Mapping) else str(token)


def _stop_ids(
    backend: tokenizers.Tokenizer, names: Mapping[str, str], generation: Mapping[str, Any]
) -> frozenset[int]:
    """The end-of-text id, and those that generation_config.json adds (an end of turn)."""
    listed = generation.get("eos_token_id")
    ids = set(listed if isinstance(listed, list) else [listed])
    ids.add(backend.token_to_id(names.get("eos_token", "")))
    return frozenset(i for i in ids if i is not None)
