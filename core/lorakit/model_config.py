"""Reading config.json strictly: a field a family cannot honour is an error, never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakit.errors import UserError

_MISSING: Any = object()


class ModelConfig:
    """Typed access to a config.json.

    Args:
        values: Its contents, or those of a table in it.
        family: For messages.
        where: The table's key with a dot behind it; empty at the top.
    """

    def __init__(self, values: Mapping[str, Any], family: str, where: str = "") -> None:
        self.values = values
        self.family = family
        self.where = where

    def integer(self, key: str, default: Any = _MISSING) -> int:
        """A positive whole number; null counts as absent."""
        value = self._value(key, default, (int,), "a whole number")
        if value <= 0:
            raise self._error(key, value, "a whole number above 0")
        return int(value)

    def number(self, key: str, default: Any = _MISSING) -> float:
        return float(self._value(key, default, (int, float), "a number"))

    def text(self, key: str, default: Any = _MISSING) -> str:
        return str(self._value(key, default, (str,), "a string"))

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._error(key, value, "true or false")
        return value

    def table(self, key: str) -> ModelConfig:
        """A table within; empty, and then false, if it is absent or null."""
        value = self.values.get(key) or {}
        if not isinstance(value, Mapping):
            raise self._error(key, value, "a table")
        return ModelConfig(value, self.family, f"{self.where}{key}.")

    def __bool__(self) -> bool:
        return bool(self.values)

    def require(self, key: str, expected: Any, default: Any = _MISSING) -> None:
        """The field must have this value: the family does nothing else."""
        value = self.values.get(key, default)
        if value is _MISSING or value != expected:
            raise self.refuse(key, value, repr(expected))

    def ignore(self, key: str) -> None:
        """Says, where a family is read, that this field is known and has no effect."""

    def refuse(self, key: str, value: Any, known: str) -> UserError:
        """The error for a value the family cannot honour."""
        return UserError(
            f"config.json: {self.where}{key} = {value!r}: the {self.family} family "
            f"supports {known} only",
            "Training on an approximation would be wrong in silence, so lorakit does not.",
        )

    def _value(self, key: str, default: Any, kinds: tuple[type, ...], expected: str) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is _MISSING:
                raise UserError(
                    f"config.json: {self.where}{key} is missing (the {self.family} family needs it)"
                )
            return default
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise self._error(key, value, expected)
        return value

    def _error(self, key: str, value: Any, expected: str) -> UserError:
        return UserError(f"config.json: {self.where}{key}: expected {expected}, got {value!r}")
