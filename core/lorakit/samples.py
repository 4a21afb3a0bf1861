"""The same prompts answered before and after training, to see what it changed."""

from __future__ import annotations

import json
from pathlib import Path

from attrs import define, field
from torch import nn

from lorakit.atomic import write_file
from lorakit.data.tokenizer import Tokenizer
from lorakit.generation import answer
from lorakit.logs import LoggerGroup
from lorakit.options import SampleOptions

FILE = "samples.json"


@define
class Samples:
    """Answers, kept in samples.json so that a resumed run still has those from before."""

    options: SampleOptions
    output: Path
    model: nn.Module
    tokenizer: Tokenizer
    _before: list[str] = field(factory=list)

    def before(self, log: LoggerGroup, *, resumed: bool) -> None:
        """Answers with the adapter at its start, which is the base model."""
        if not self.options.prompts:
            return
        known = self._known() if resumed else None
        if known is None and resumed:
            # The base model is there no more.
            known = [""] * len(self.options.prompts)
        elif known is None:
            log.notice(f"answering {len(self.options.prompts)} questions before training")
            known = self._answers()
            self._write(known, [])
        self._before = known

    def after(self, log: LoggerGroup) -> None:
        """Answers once more, and shows both."""
        if not self.options.prompts:
            return
        after = self._answers()
        self._write(self._before, after)
        for prompt, old, new in zip(self.options.prompts, self._before, after, strict=True):
            before = f"before  {_indented(old)}\n" if old else ""
            log.notice(f"\nQ       {prompt}\n{before}after   {_indented(new)}")
        log.notice("")

    def _answers(self) -> list[str]:
        return [
            answer(
                self.model,
                self.tokenizer,
                prompt,
                max_new_tokens=self.options.max_new_tokens,
                temperature=self.options.temperature,
            )
            for prompt in self.options.prompts
        ]

    def _known(self) -> list[str] | None:
        """The answers from before, if this run gave them already to these prompts."""
        file = self.output / FILE
        if not file.is_file():
            return None
        rows = json.loads(file.read_text(encoding="utf-8"))
        if [row["prompt"] for row in rows] != list(self.options.prompts):
            return None
        return [row["before"] for row in rows]

    def _write(self, before: list[str], after: list[str]) -> None:
        rows = [
            {"prompt": prompt, "before": old, "after": after[i] if after else None}
            for i, (prompt, old) in enumerate(zip(self.options.prompts, before, strict=True))
        ]
        text = json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
        write_file(self.output / FILE, text.encode())


def _indented(text: str) -> str:
    return text.replace("\n", "\n        ") or "(nothing)"
