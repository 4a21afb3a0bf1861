"""Chat templates: the model's own jinja text, rendered in jinja2's sandbox.

The environment is the one Hugging Face tokenizers document for chat templates: trimmed and
left-stripped blocks, loop controls, `raise_exception`, `strftime_now`, and a `tojson` that
does not escape for HTML.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from lorakit.errors import UserError, did_you_mean, listing
from lorakit.protocols import Message

BUILT_IN = {
    "chatml": (
        "{% for message in messages %}"
        "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "alpaca": (
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
        "{% elif message['role'] == 'assistant' %}"
        "### Response:\n{{ message['content'] }}{{ eos_token }}\n\n"
        "{% else %}### Instruction:\n{{ message['content'] }}\n\n{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
}
"""Formats for base models that have no template of their own, by `data.chat_template`.  The
alpaca format is that of the Stanford Alpaca project, without its fixed preamble."""


def built_in_template(name: str) -> str:
    """The text of a built-in template.

    Raises:
        UserError: There is none of that name.
    """
    if name not in BUILT_IN:
        known = listing(["auto", *BUILT_IN])
        hint = did_you_mean(name, ["auto", *BUILT_IN])
        raise UserError(f"data.chat_template: no built-in template {name!r}{hint} (known: {known})")
    return BUILT_IN[name]


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
) -> str:
    """The messages as the template writes them.

    Args:
        template: The jinja text.
        messages: The turns.
        add_generation_prompt: End with the header of the assistant's next turn.
        special_tokens: `bos_token`, `eos_token` ..., which templates may refer to.

    Raises:
        ValueError: The template cannot be rendered, or refuses these messages.
    """
    import jinja2

    try:
        return str(
            _compile(template).render(
                messages=[{"role": m.role, "content": m.content} for m in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **special_tokens,
            )
        )
    except (jinja2.exceptions.TemplateError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"the chat template refuses it: {error}") from None
