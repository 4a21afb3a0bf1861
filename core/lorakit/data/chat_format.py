"""The built-in chat formats, for models that come without a template: lorakit/chat_templates."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from lorakit.errors import UserError, did_you_mean, listing

if TYPE_CHECKING:
    from tokenizers import Tokenizer

AUTO = "auto"
# Not `<SYS>` within `<<SYS>>`, which is text.
_MARKER = re.compile(r"(?<!<)<\|?\w+\|?>(?!>)")


@cache
def built_in_names() -> tuple[str, ...]:
    """The values of `data.chat_template` beside `auto`."""
    files = resources.files("lorakit").joinpath("chat_templates").iterdir()
    return tuple(sorted(f.name.removesuffix(".jinja") for f in files if f.name.endswith(".jinja")))


def built_in(name: str) -> str:
    """The jinja text of a built-in format.

    Raises:
        UserError: There is none of that name.
    """
    known = [AUTO, *built_in_names()]
    if name == AUTO or name not in known:
        raise UserError(
            f"data.chat_template: no built-in format {name!r}{did_you_mean(name, known)} "
            f"(known: {listing(known)})"
        )
    file = resources.files("lorakit").joinpath("chat_templates") / f"{name}.jinja"
    return file.read_text(encoding="utf-8")


def format_for(
    name: str, backend: Tokenizer, special_tokens: Mapping[str, str], *, starts_with_bos: bool
) -> str:
    """A built-in format as the tokenizer needs it: it stands for itself, wherever it is rendered.

    Raises:
        UserError: There is none of that name, or its markers are no tokens of the vocabulary.
            Cut into pieces, the marker that ends a turn could not stop generation.
    """
    text = built_in(name)
    if missing := _missing_markers(text, backend):
        raise UserError(
            f"data.chat_template: the format {name!r} is built on {listing(missing)}, which the "
            "model's tokenizer does not have as tokens",
            f"These formats fit it: {listing(fitting(backend))}.",
        )
    settings: dict[str, str | bool] = {
        "space": " " if _drops_space(backend, special_tokens) else "",
        "inst_is_token": backend.token_to_id("[INST]") is not None,
    }
    used = {key: value for key, value in settings.items() if re.search(rf"\b{key}\b", text)}
    if not starts_with_bos:
        # Texts of this tokenizer do not start with BOS, so chats do not either.
        used["bos_token"] = ""
    return "".join(f"{{%- set {k} = {json.dumps(v)} -%}}\n" for k, v in used.items()) + text


def fitting(backend: Tokenizer) -> list[str]:
    """The built-in formats all of whose markers are tokens of the vocabulary."""
    return [n for n in built_in_names() if not _missing_markers(built_in(n), backend)]


def _missing_markers(template: str, backend: Tokenizer) -> list[str]:
    without_comments = re.sub(r"{#.*?#}", "", template, flags=re.DOTALL)
    markers = dict.fromkeys(_MARKER.findall(without_comments))
    return [m for m in markers if backend.token_to_id(m) is None]


def _drops_space(backend: Tokenizer, special_tokens: Mapping[str, str]) -> bool:
    """Whether the tokenizer puts a space in front of a text, but of none behind EOS."""
    eos = special_tokens.get("eos_token", "")
    alone = backend.encode("a", add_special_tokens=False).tokens
    behind = backend.encode(f"{eos}a", add_special_tokens=False).tokens
    return alone[0].startswith("▁") and not behind[-len(alone)].startswith("▁")
