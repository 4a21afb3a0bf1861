"""The base model's tokenizer: text to ids, conversations to text, and which ids to stop at."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers
from attrs import define, evolve, field

from lorakit.data.chat_format import AUTO, fitting, format_for
from lorakit.data.chat_template import render
from lorakit.data.conversion import JSON, add_bos_to_texts, text_of, with_tokenizer_json
from lorakit.data.special_tokens import padding_token, turn_end
from lorakit.errors import UserError, listing
from lorakit.protocols import Message

CONFIG = "tokenizer_config.json"
MAP = "special_tokens_map.json"
GENERATION = "generation_config.json"
JINJA = "chat_template.jinja"
SPECIAL = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


@define(slots=False)
class Tokenizer:
    """A tokenizer with its chat template.

    Attributes:
        backend: The `tokenizers` tokenizer.
        special_tokens: `bos_token`, `eos_token` ... as texts, those that exist.
        template: The jinja chat template, or None for a base model without one.
        stop_ids: Ids that end an answer.
        files: Its files by name, written beside adapters and merged models.  They say what the
            attributes above say, however little the checkpoint's own did.
    """

    backend: tokenizers.Tokenizer
    special_tokens: dict[str, str]
    template: str | None
    stop_ids: frozenset[int]
    files: Mapping[str, bytes] = field(repr=False)

    @property
    def vocabulary_size(self) -> int:
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    def token_id(self, which: str) -> int | None:
        """The id of `bos_token`, `eos_token` ..., or None."""
        text = self.special_tokens.get(which)
        return None if text is None else self.backend.token_to_id(text)

    def is_special(self, token: int) -> bool:
        """Whether it is markup, or ends an answer."""
        added = self._added.get(token)
        return token in self.stop_ids or (added is not None and added.special)

    @cached_property
    def _added(self) -> dict[int, tokenizers.AddedToken]:
        return dict(self.backend.get_added_tokens_decoder())

    @cached_property
    def prefix(self) -> tuple[int, ...]:
        """What the tokenizer puts in front of every text: BOS, or nothing."""
        plain = self.backend.encode("a", add_special_tokens=False).ids
        whole = self.backend.encode("a", add_special_tokens=True).ids
        starts = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        return tuple(whole[: next(starts, 0)])

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text outside of any chat, BOS in front where the tokenizer puts it there and
        the text does not have it yet; never EOS behind."""
        ids = list(self.backend.encode(text, add_special_tokens=False).ids)
        there = tuple(ids[: len(self.prefix)]) == self.prefix
        return ids if there else [*self.prefix, *ids]

    def encode_rendered(self, text: str) -> tokenizers.Encoding:
        """Ids and offsets of what a chat template wrote.  BOS is the template's to write, in
        training and in generation alike."""
        return self.backend.encode(text, add_special_tokens=False)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        return str(self.backend.decode(list(ids), skip_special_tokens=not special))

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as text.

        Raises:
            UserError: There is no template.
            ValueError: The template refuses these messages.
        """
        return self.render_with_spans(messages, add_generation_prompt=add_generation_prompt)[0]

    def render_with_spans(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """As `render`, with the spans of characters that the template marks as generated."""
        if self.template is None:
            known = listing(fitting(self.backend))
            raise UserError(
                "data.chat_template: the model's tokenizer has no chat template of its own",
                f"Set it to one of {known} (docs/how-to/chat-templates.md).",
            )
        return render(
            self.template,
            messages,
            add_generation_prompt=add_generation_prompt,
            special_tokens=self.special_tokens,
        )

    def with_template(self, name: str) -> Tokenizer:
        """The same tokenizer with a built-in format, or with its own template for `auto`.

        The files change with it, so that whoever loads the result renders as training did, and
        stops where training stopped.

        Raises:
            UserError: There is no such format, or the tokenizer lacks a token of it.
        """
        if name == AUTO:
            return self
        text = format_for(
            name, self.backend, self.special_tokens, starts_with_bos=bool(self.prefix)
        )
        files = {k: v for k, v in self.files.items() if k != JINJA}
        files[CONFIG] = _edited(files, CONFIG, {"chat_template": text})
        return _complete(evolve(self, template=text, files=files))


def load_tokenizer(files: Mapping[str, bytes], where: str) -> Tokenizer:
    """Builds the tokenizer from a checkpoint's files.

    Args:
        files: tokenizer.json, or else tokenizer.model or a tiktoken file; tokenizer_config.json,
            chat_template.jinja, special_tokens_map.json, added_tokens.json and
            generation_config.json, as far as they exist.
        where: The checkpoint, for messages.

    Raises:
        UserError: There is no tokenizer, or a file is malformed.
    """
    try:
        if JSON not in files:
            files = with_tokenizer_json(files, where)
        backend = tokenizers.Tokenizer.from_str(files[JSON].decode("utf-8"))
        # A saved tokenizer may carry the padding or truncation of its last use.
        backend.no_padding()
        backend.no_truncation()
        config = _json(files, CONFIG)
        generation = _json(files, GENERATION)
        names = _special_tokens(config, _json(files, MAP), generation, backend)
        template = _template(files, config)
    except UserError:
        raise
    # tokenizers raises bare Exception for a file it cannot parse.
    except Exception as error:
        raise UserError(f"{where}: the tokenizer's files cannot be read: {error}") from None
    ends = {backend.token_to_id(names.get("eos_token", "")), *_ids(generation.get("eos_token_id"))}
    stop_ids = frozenset(i for i in ends if i is not None)
    tokenizer = Tokenizer(backend, names, template, stop_ids, dict(files))
    if config.get("add_bos_token") and "bos_token" in names and not tokenizer.prefix:
        add_bos_to_texts(backend, names["bos_token"])
        tokenizer = evolve(tokenizer, files={**files, JSON: backend.to_str().encode()})
    return _complete(tokenizer)


def _complete(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with the end of the template's turns among its stops, a padding token that
    is none of them, and files that say both."""
    stops = set(tokenizer.stop_ids)
    if (end := turn_end(tokenizer)) is not None:
        stops.add(end)
    changed = evolve(tokenizer, stop_ids=frozenset(stops))
    files = dict(changed.files)
    if stops - set(_ids(_json(files, GENERATION).get("eos_token_id"))):
        files[GENERATION] = _edited(files, GENERATION, {"eos_token_id": sorted(stops)})
    special = dict(changed.special_tokens)
    if (padding := padding_token(changed)) not in (None, special.get("pad_token")):
        special["pad_token"] = str(padding)
        for name in (CONFIG, MAP):
            if name in files or name == CONFIG:
                files[name] = _edited(files, name, {"pad_token": padding})
    return evolve(changed, special_tokens=special, files=files)


def _special_tokens(
    config: Mapping[str, Any],
    listed: Mapping[str, Any],
    generation: Mapping[str, Any],
    backend: tokenizers.Tokenizer,
) -> dict[str, str]:
    """Where no file names BOS or EOS, generation_config.json's ids do."""
    names = {}
    for role in SPECIAL:
        token = config.get(role) or listed.get(role)
        numbers = _ids(generation.get(f"{role}_id")) if role in ("bos_token", "eos_token") else []
        if token:
            names[role] = text_of(token)
        elif numbers and (text := backend.id_to_token(numbers[0])) is not None:
            names[role] = text
    return names


def _template(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    if JINJA in files:
        return files[JINJA].decode("utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: str(entry["template"]) for entry in template}
        return named.get("default")
    return template


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int)]


def _json(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    return dict(json.loads(files[name])) if name in files else {}


def _edited(files: Mapping[str, bytes], name: str, changes: Mapping[str, Any]) -> bytes:
    return json.dumps(_json(files, name) | dict(changes), ensure_ascii=False, indent=2).encode()
