"""From a TOML table to an attrs class, strictly, with every problem found at once.

cattrs structures the values; the walk over the fields is ours, because a message must carry
the full key and one bad value must not hide the next.  cattrs' default converter would turn
8.7 into 8, "16" into 16 and "q_proj" into a tuple of letters: its primitive hooks are replaced.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, Union, get_args, get_origin

import attrs
import cattrs

from lorakit.errors import did_you_mean, listing
from lorakit.foreign_names import ours

T = TypeVar("T")

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    dict: "a table",
    type(None): "nothing",
}


def describe_type(kind: Any) -> str:
    """A type in a user's words: `a list of strings`."""
    if kind in _WORDS:
        return _WORDS[kind]
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(k) for k in get_args(kind) if k is not type(None))
    if origin in (tuple, list):
        inner = describe_type(get_args(kind)[0]).removeprefix("a ").removeprefix("whole ")
        return f"a list of {inner}s"
    if origin is dict:
        return f"a table of {describe_type(get_args(kind)[1]).split(' ', 1)[1]}s"
    if attrs.has(kind):
        return "a table"
    return str(getattr(kind, "__name__", kind))


def describe_value(value: Any) -> str:
    """A value as TOML would show it, shortened."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A line break would tear the message apart; TOML escapes it as JSON does.
        short = value if len(value) <= 60 else f"{value[:57]}..."
        return json.dumps(short, ensure_ascii=False)
    if isinstance(value, dict):
        return "a table"
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _WrongType(TypeError):
    pass


def _strict(kind: type, accepted: tuple[type, ...]) -> Any:
    def hook(value: Any, _: Any) -> Any:
        # bool is an int to Python, but `rank = true` is a mistake.
        if isinstance(value, bool) and kind is not bool:
            raise _WrongType
        if not isinstance(value, accepted):
            raise _WrongType
        # TOML has inf and nan, and reads 1e400 as inf; no option means anything by them.
        if isinstance(value, float) and not math.isfinite(value):
            raise _WrongType
        return kind(value)

    return hook


def _strict_union(kind: Any) -> Any:
    members = get_args(kind)

    def hook(value: Any, _: Any) -> Any:
        for member in members:
            if member is type(None):
                if value is None:
                    return None
                continue
            try:
                return _converter.structure(value, member)
            except (_WrongType, cattrs.BaseValidationError):
                continue
        raise _WrongType

    return hook


def _strict_sequence(kind: Any) -> Any:
    member = get_args(kind)[0]

    def hook(value: Any, _: Any) -> Any:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise _WrongType
        return get_origin(kind)(_converter.structure(v, member) for v in value)

    return hook


def _make_converter() -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=True)
    for kind, accepted in {bool: (bool,), int: (int,), float: (int, float), str: (str,)}.items():
        converter.register_structure_hook(kind, _strict(kind, accepted))
    converter.register_structure_hook_factory(
        lambda kind: get_origin(kind) in (tuple, list), _strict_sequence
    )
    converter.register_structure_hook_factory(
        lambda kind: get_origin(kind) in (Union, types.UnionType), _strict_union
    )
    return converter


_converter = _make_converter()


def structure(cls: type[T], table: Mapping[str, Any], where: str) -> tuple[T | None, list[str]]:
    """Structures `table` into `cls`.

    Args:
        cls: An attrs class.
        table: The keys and values, as TOML gave them.
        where: The table's own key, put before each field's: `adapter`.

    Returns:
        The instance and no problems, or None and one line for each problem.
    """
    known_class: Any = cls
    attrs.resolve_types(known_class)
    fields = {f.name: f for f in attrs.fields(known_class) if f.init}
    prefix = f"{where}." if where else ""
    problems: list[str] = []
    values: dict[str, Any] = {}

    for key in table:
        if key not in fields:
            known = listing(fields, none="no key here")
            hint = ours(key, where, fields) or did_you_mean(key, fields)
            problems.append(f"{prefix}{key}: unknown key{hint or f' (known: {known})'}")

    for name, field in fields.items():
        if name not in table:
            if field.default is attrs.NOTHING:
                problems.append(f"{prefix}{name}: missing, expected {describe_type(field.type)}")
            continue
        value, found = _structure_value(field, table[name], f"{prefix}{name}")
        problems += found
        values[name] = value

    if problems:
        return None, problems
    try:
        return cls(**values), []
    except (ValueError, TypeError) as error:
        return None, [f"{where or cls.__name__}: {error}"]


def _structure_value(field: attrs.Attribute[Any], raw: Any, key: str) -> tuple[Any, Sequence[str]]:
    kind: Any = field.type
    if attrs.has(kind):
        if not isinstance(raw, Mapping):
            return None, [f"{key}: expected a table, got {describe_value(raw)}"]
        return structure(kind, raw, key)
    if get_origin(kind) is dict:
        problems = _entry_problems(kind, raw, key)
        if problems:
            return None, problems
    try:
        value = _converter.structure(raw, kind)
    except (_WrongType, cattrs.BaseValidationError, TypeError, ValueError, OverflowError):
        return None, [f"{key}: {_expected(kind, raw)}"]
    if field.validator is not None:
        try:
            field.validator(None, field, value)
        except (ValueError, TypeError) as error:
            return None, [f"{key}: {_validator_message(field, value, error)}"]
        except AttributeError:
            # The validator looks at the instance, which does not exist yet: it runs when the
            # class is built.
            pass
    return value, []


def _expected(kind: Any, value: Any) -> str:
    expected = describe_type(kind)
    if expected == "a number" and isinstance(value, float):
        expected = "a finite number"
    return f"expected {expected}, got {describe_value(value)}"


def _entry_problems(kind: Any, raw: Any, key: str) -> list[str]:
    """One line for each value of a table that is of another type than all must be."""
    if not isinstance(raw, Mapping):
        return [f"{key}: expected {describe_type(kind)}, got {describe_value(raw)}"]
    problems = []
    member = get_args(kind)[1]
    for name, value in raw.items():
        try:
            _converter.structure(value, member)
        except (_WrongType, cattrs.BaseValidationError, TypeError, ValueError, OverflowError):
            problems.append(f"{key}.{name}: {_expected(member, value)}")
    return problems


def _validator_message(field: attrs.Attribute[Any], value: Any, error: Exception) -> str:
    """attrs' own message without the field's name and its repr of the attribute."""
    options = getattr(field.validator, "options", None)
    if options is not None:
        choices = [str(o) for o in options]
        hint = did_you_mean(str(value), choices)
        numbers = [o for o in options if isinstance(o, (int, float))]
        if numbers and isinstance(value, (int, float)):
            # By value, for 2048 is near to 48 only as letters.
            hint = f" (did you mean {min(numbers, key=lambda o: abs(o - value))}?)"
        return f"{describe_value(value)} is none of {listing(choices)}{hint}"
    message = str(error.args[0]) if error.args else str(error)
    message = message.removeprefix(f"'{field.name}' ")
    if isinstance(value, Mapping):  # its validator's message has the entry's value
        return message
    return message if describe_value(value) in message else f"{message}: {describe_value(value)}"


def unstructure(instance: Any) -> dict[str, Any]:
    """An options instance as a TOML table; None is left out, tuples become lists."""

    def plain(value: Any) -> Any:
        if attrs.has(type(value)):
            return unstructure(value)
        if isinstance(value, (tuple, list)):
            return [plain(v) for v in value]
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items() if v is not None}
        return value

    return {
        f.name: plain(getattr(instance, f.name))
        for f in attrs.fields(type(instance))
        if getattr(instance, f.name) is not None
    }
