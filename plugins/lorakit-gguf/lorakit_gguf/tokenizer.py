"""From a GGUF vocabulary to the tokenizer files of a Hugging Face directory."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from lorakit.errors import UserError
from lorakit_gguf.byte_level import byte_level_tokenizer
from lorakit_gguf.sentence_piece import sentence_piece_tokenizer
from lorakit_gguf.vocabulary import Kind, Vocabulary

_BUILDERS = {"gpt2": byte_level_tokenizer, "llama": sentence_piece_tokenizer}
_ROLES = ("bos", "eos", "unk", "pad")


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer that the vocabulary describes, special tokens and post-processor included.

    Raises:
        UserError: It is of a kind, or cuts text in a way, that is not known here.
    """
    if vocabulary.model not in _BUILDERS:
        raise UserError(
            f"{vocabulary.path}: its tokenizer is of model {vocabulary.model!r}; supported: "
            f"{', '.join(_BUILDERS)}"
        )
    tokenizer = _BUILDERS[vocabulary.model](vocabulary)
    if vocabulary.model != "llama":
        _add_special_tokens(tokenizer, vocabulary)
    _add_bos_and_eos(tokenizer, vocabulary)
    return tokenizer


def tokenizer_files(vocabulary: Vocabulary, context: int) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Args:
        vocabulary: The GGUF's.
        context: The longest text the model takes, in tokens.

    Raises:
        UserError: As `build_tokenizer`.
    """
    special = {f"{r}_token": token for r in _ROLES if (token := vocabulary.token(r)) is not None}
    config: dict[str, Any] = {
        # transformers takes tokenizer.json as it is only for this class; LlamaTokenizer and
        # GPT2Tokenizer would put their own normalizer and pre-tokenizer into it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": vocabulary.add_bos,
        "add_eos_token": vocabulary.add_eos,
        **special,
    }
    if vocabulary.chat_template is not None:
        config["chat_template"] = vocabulary.chat_template
    return {
        "tokenizer.json": build_tokenizer(vocabulary).to_str().encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
        "special_tokens_map.json": json.dumps(special, indent=2, ensure_ascii=False).encode(),
    }


def _add_special_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Control tokens are special; user-defined ones are found whole in a text, but are text."""
    special = vocabulary.of_kind(Kind.UNKNOWN, Kind.CONTROL)
    plain = vocabulary.of_kind(Kind.USER_DEFINED)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])


def _add_bos_and_eos(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    bos = vocabulary.token("bos") if vocabulary.add_bos else None
    eos = vocabulary.token("eos") if vocabulary.add_eos else None
    if bos is None and eos is None:
        return
    one, other = ["$A:0"], ["$B:1"]
    if bos is not None:
        one, other = [f"{bos}:0", *one], [f"{bos}:1", *other]
    if eos is not None:
        one, other = [*one, f"{eos}:0"], [*other, f"{eos}:1"]
    used = {token for token in (bos, eos) if token is not None}
    tokenizer.post_processor = TemplateProcessing(
        single=one,
        pair=one + other,
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in sorted(used)],
    )
