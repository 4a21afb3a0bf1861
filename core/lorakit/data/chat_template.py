"""Chat templates: the model's own jinja text, rendered in jinja2's sandbox.

The environment is the one transformers documents for chat templates
(`utils/chat_template_utils.py`): trimmed and left-stripped blocks, loop controls,
`raise_exception`, `strftime_now`, a `tojson` that does not escape for HTML, and the block
`{% generation %}`, by which a template marks what the model is to generate.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from lorakit.protocols import Message

_A_TEMPLATE_MAY_RAISE = (TypeError, AttributeError, LookupError, ValueError, ArithmeticError)
_REASONING = ("reasoning_content", "thinking", "reasoning")


class _Tracker:
    """What a template has written so far, and the spans of it in `{% generation %}` blocks."""

    def __init__(self) -> None:
        self.written = ""
        self.spans: list[tuple[int, int]] = []

    def generated(self, text: str) -> str:
        self.spans.append((len(self.written), len(self.written) + len(text)))
        return text


@lru_cache(maxsize=8)
def _compile(template: str) -> tuple[Any, _Tracker]:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    tracker = _Tracker()

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

        def _note(self, caller: Any) -> str:
            return tracker.generated(caller())

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template), tracker


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    special_tokens: Mapping[str, str],
) -> tuple[str, list[tuple[int, int]]]:
    """The messages as the template writes them.

    Args:
        template: The jinja text.
        messages: The turns.
        add_generation_prompt: End with the header of the assistant's next turn.
        special_tokens: `bos_token`, `eos_token` ..., which templates may refer to.

    Returns:
        The text, and the spans of its characters that stand in `{% generation %}` blocks.

    Raises:
        ValueError: The template cannot be rendered, or refuses these messages.
    """
    import jinja2

    try:
        compiled, tracker = _compile(template)
        tracker.written, tracker.spans = "", []
        pieces = compiled.generate(
            messages=[_as_templates_see_it(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            tools=None,
            documents=None,
            **special_tokens,
        )
        for piece in pieces:
            tracker.written += piece
    except (jinja2.exceptions.TemplateError, *_A_TEMPLATE_MAY_RAISE) as error:
        raise ValueError(f"the chat template refuses it: {error}") from None
    return tracker.written, list(tracker.spans)


def _as_templates_see_it(message: Message) -> dict[str, Any]:
    """As a mapping without empty keys, and with its reasoning under the names templates read."""
    values = {"role": message.role, "content": message.content, **message.extra}
    values = {key: value for key, value in values.items() if value is not None}
    reasoning = next((values[k] for k in _REASONING if k in values), None)
    if reasoning is not None:
        values = {"thinking": reasoning, **values, "reasoning_content": reasoning}
    return values
