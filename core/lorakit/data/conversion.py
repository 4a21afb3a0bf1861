"""tokenizer.json for checkpoints that come without one.

The result is written beside adapters and merged models, so that whoever loads those tokenizes as
training did.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from lorakit.data.sentencepiece_file import SentencePieceModel
from lorakit.data.tiktoken_file import TiktokenFile, is_tiktoken
from lorakit.errors import UserError

MODEL = "tokenizer.model"
JSON = "tokenizer.json"
CONFIG = "tokenizer_config.json"
ADDED = "added_tokens.json"


def with_tokenizer_json(files: Mapping[str, bytes], where: str) -> dict[str, bytes]:
    """The files with tokenizer.json, built from `tokenizer.model` or a tiktoken file, and with a
    tokenizer_config.json that says what the original cannot.

    Args:
        files: The checkpoint's, by name.
        where: The checkpoint, for messages.

    Raises:
        UserError: There is no tokenizer, or it is of a kind that cannot be rebuilt.
    """
    source = _source(files)
    if source is None:
        raise UserError(
            f"{where}: no tokenizer.json, no tokenizer.model and no tiktoken file",
            "Copy the tokenizer's files of the same model into the directory.",
        )
    place = f"{where}/{source}"
    if is_tiktoken(files[source]):
        tiktoken = TiktokenFile.read(files[source], place)
        tokenizer, roles = tiktoken.tokenizer(), tiktoken.convention.roles
        add_bos = tiktoken.convention.add_bos
    else:
        model = SentencePieceModel.read(files[source], place)
        tokenizer, roles = model.tokenizer(), model.special()
        add_bos = "bos_token" in roles
    written = json.loads(files.get(CONFIG, b"{}"))
    _add_tokens(tokenizer, _added_tokens(files, written), where)
    config: dict[str, Any] = {
        "clean_up_tokenization_spaces": False,
        "add_bos_token": add_bos,
        "add_eos_token": False,
        **roles,
        **{key: value for key, value in written.items() if value is not None},
        # transformers takes tokenizer.json as it is only for this class; others would put a
        # normalizer and a pre-tokenizer of their own into it.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if config["add_bos_token"]:
        add_bos_to_texts(tokenizer, text_of(config["bos_token"]))
    return {
        **files,
        JSON: tokenizer.to_str().encode(),
        CONFIG: json.dumps(config, indent=2, ensure_ascii=False).encode(),
    }


def add_bos_to_texts(tokenizer: Tokenizer, bos: str) -> None:
    """Has `tokenizer` start every text with the token `bos`, where special tokens are asked for."""
    tokenizer.post_processor = TemplateProcessing(
        single=f"{bos}:0 $A:0",
        pair=f"{bos}:0 $A:0 {bos}:1 $B:1",
        special_tokens=[(bos, tokenizer.token_to_id(bos))],
    )


def text_of(token: Any) -> str:
    """A special token's text: the files have it as a string or as an object with `content`."""
    return str(token["content"]) if isinstance(token, Mapping) else str(token)


def _source(files: Mapping[str, bytes]) -> str | None:
    """`tokenizer.model`, else one with a version behind it (`tokenizer.model.v3`) or a `.tiktoken`
    file."""
    names = sorted(files)
    models = [n for n in names if n == MODEL or n.startswith(f"{MODEL}.")]
    return next(iter([*models, *(n for n in names if n.endswith(".tiktoken"))]), None)


def _added_tokens(files: Mapping[str, bytes], config: Mapping[str, Any]) -> dict[int, AddedToken]:
    """What was added to the vocabulary after its training, by id.  added_tokens.json has ids
    alone; tokenizer_config.json also says how each is found."""
    listed = json.loads(files.get(ADDED, b"{}"))
    found = {i: AddedToken(t, special=True, normalized=False) for t, i in listed.items()}
    for number, entry in config.get("added_tokens_decoder", {}).items():
        found[int(number)] = AddedToken(**entry)
    return found


def _add_tokens(tokenizer: Tokenizer, tokens: Mapping[int, AddedToken], where: str) -> None:
    """Raises `UserError` if a token would get another id than its own."""
    for number, token in sorted(tokens.items()):
        if token.special:
            tokenizer.add_special_tokens([token])
        else:
            tokenizer.add_tokens([token])
        if (found := tokenizer.token_to_id(token.content)) != number:
            raise UserError(
                f"{where}: the added token {token.content!r} should have the id {number}, but the "
                f"vocabulary gives it {found}",
                f"Check {ADDED} and {CONFIG} against {MODEL}.",
            )
