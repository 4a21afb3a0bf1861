"""A chat with a model: turns that the chat template renders as one conversation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from attrs import define, field, frozen

from lorakit.context import prompt_notice
from lorakit.data.tokenizer import Tokenizer
from lorakit.errors import UserError
from lorakit.generation import Sampling, answer_text, generate_ids, prompt_ids
from lorakit.modules.cache import KeyValueCache
from lorakit.protocols import Message

END_OF_TURN = "end of turn"
LENGTH = "length"


@frozen
class Answer:
    """What a model said.

    Attributes:
        text: The whole of it.
        tokens: How many were made, without the one that ended it.
        stopped: END_OF_TURN, or LENGTH where it reached the most tokens allowed.
        seconds: From the prompt's first token to the answer's last.
    """

    text: str
    tokens: int
    stopped: str
    seconds: float


@define
class Chat:
    """Turns with a model.  Without a chat template there are none: each prompt stands alone.

    What earlier turns left in the key-value cache is used where the ids of the whole chat start
    with the cached ones.  They need not: a template may drop the reasoning of earlier turns, and
    text can be tokenized in another way than it was generated.  Then the chat is encoded anew.

    Attributes:
        model: A `CausalLM` in evaluation mode.
        tokenizer: Has the template.
        sampling: How tokens are picked.
        seed: Of the draws of all turns.
        max_new_tokens: Longest answer.
        context: Tokens that the model was made for, or None.
        system: The message before all turns, or None.

    Raises:
        UserError: There is a system message, and the model takes none.
    """

    model: Any
    tokenizer: Tokenizer
    sampling: Sampling
    seed: int = 0
    max_new_tokens: int = 256
    context: int | None = None
    system: str | None = None
    turns: list[Message] = field(init=False, factory=list)
    _generator: torch.Generator = field(init=False)
    _cache: KeyValueCache = field(init=False, factory=KeyValueCache)

    def __attrs_post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed)
        if self.system is not None:
            _check_system(self.tokenizer, self.system)

    def ask(self, prompt: str, show: Callable[[str], None], warn: Callable[[str], None]) -> Answer:
        """Answers a prompt, and keeps both for the next.

        Args:
            prompt: The user's message.
            show: Takes the answer piece by piece, as it is made.
            warn: Takes what to read before the answer: that the chat is beyond the context.

        Raises:
            UserError: The chat template refuses the prompt, or there is nothing to continue, or
                it is no text.
            KeyboardInterrupt: Passed on; what was shown until then is kept.
        """
        ids = self._ids(prompt)
        notice = prompt_notice(len(ids), self.context, "the chat" if self.turns else "the prompt")
        if notice:
            warn(notice)
        self._keep_cache_of(ids)
        started = time.perf_counter()
        generated: list[int] = []
        said = ""
        tokens = generate_ids(
            self.model,
            ids,
            max_new_tokens=self.max_new_tokens,
            stop_ids=self.tokenizer.stop_ids,
            sampling=self.sampling,
            generator=self._generator,
            cache=self._cache,
        )
        try:
            for piece in answer_text(_noted(tokens, generated), self.tokenizer):
                said += piece
                show(piece)
        except BaseException:
            # Some layers may have cached a token that others have not.
            self._cache.clear()
            if said:
                self._remember(prompt, said)
            raise
        self._remember(prompt, said)
        seconds = time.perf_counter() - started
        stopped = LENGTH if len(generated) == self.max_new_tokens else END_OF_TURN
        return Answer(said, len(generated), stopped, seconds)

    def reset(self) -> None:
        """Forgets all turns; the system message stays."""
        self.turns.clear()
        self._cache.clear()

    def _ids(self, prompt: str) -> list[int]:
        system = [] if self.system is None else [Message("system", self.system)]
        try:
            # A terminal may give what is not UTF-8, as lone surrogates.
            prompt.encode()
            ids = prompt_ids(self.tokenizer, prompt, [*system, *self.turns])
        except UnicodeEncodeError:
            raise UserError("the prompt is not UTF-8") from None
        except ValueError as error:
            raise UserError(str(error)) from None
        if not ids:
            raise UserError("the prompt is empty, and the model starts no text by itself")
        return ids

    def _remember(self, prompt: str, answer: str) -> None:
        if self.tokenizer.template is not None:
            self.turns += [Message("user", prompt), Message("assistant", answer)]

    def _keep_cache_of(self, ids: list[int]) -> None:
        cached = self._cache.tokens.tolist()
        if len(cached) >= len(ids) or cached != ids[: len(cached)]:
            self._cache.clear()


def _noted(tokens: Iterator[int], generated: list[int]) -> Iterator[int]:
    for token in tokens:
        generated.append(token)
        yield token


def _check_system(tokenizer: Tokenizer, system: str) -> None:
    fix = "Leave it out, or write it at the start of the prompt."
    if tokenizer.template is None:
        raise UserError("--system: the model has no chat template to put a message in", fix)
    user = Message("user", "?")
    try:
        without = tokenizer.render([user], add_generation_prompt=True)
    except ValueError as error:
        raise UserError(str(error)) from None
    try:
        text = tokenizer.render([Message("system", system), user], add_generation_prompt=True)
    except ValueError as error:
        raise UserError(f"--system: {error}", fix) from None
    # Equal, but with the message in it: that was the template's default.
    if text == without and system.strip() not in text:
        raise UserError("--system: the chat template leaves system messages out", fix)
