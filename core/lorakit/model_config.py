"""Reading config.json strictly: a field a family cannot honour is an error, never ignored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import frozen

from lorakit.errors import UserError

_MISSING: Any = object()

INERT = frozenset(
    """
    attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id
    cache_implementation decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id generation_config id2label initializer_range is_decoder
    label2id length_penalty max_length max_new_tokens max_position_embeddings max_sequence_length
    min_length model_max_length model_type name_or_path no_repeat_ngram_size num_beam_groups
    num_beams num_labels num_return_sequences output_attentions output_hidden_states output_scores
    pad_token_id prefix problem_type remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate suppress_tokens task_specific_params temperature tf_legacy_loss
    tokenizer_class top_k top_p torch_dtype torchscript transformers.js_config transformers_version
    typical_p unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache
    """.split()  # noqa: SIM905
)
"""Fields of any config.json that do not change what a model computes from a document's tokens."""
QUANTIZED = ("quantization_config", "compression_config", "quantization")
"""Each of them says that the stored weights are quantized already."""


@frozen
class AttentionShape:
    """Query heads, key and value heads, and the width of each."""

    heads: int
    kv_heads: int
    head_dim: int


class ModelConfig:
    """Typed access to a config.json, which remembers what was read.

    Args:
        values: Its contents, or those of a table in it.
        family: For messages.
        where: The table's key with a dot behind it; empty at the top.
    """

    def __init__(self, values: Mapping[str, Any], family: str, where: str = "") -> None:
        self.values = values
        self.family = family
        self.where = where
        self._read: set[str] = set()
        self._tables: dict[str, ModelConfig] = {}

    def integer(self, key: str, default: Any = _MISSING) -> int:
        """A positive whole number; null counts as absent."""
        value = self._value(key, default, (int,), "a whole number")
        if value <= 0 and value is not default:
            raise self._error(key, value, "a whole number above 0")
        return int(value)

    def optional_integer(self, key: str, default: int | None = None) -> int | None:
        """A positive whole number, None where the field is null, `default` where it is absent."""
        if key not in self.values:
            return default
        return self.integer(key) if self._get(key) is not None else None

    def number(self, key: str, default: Any = _MISSING) -> float:
        """A positive number; null counts as absent."""
        value = float(self._value(key, default, (int, float), "a number"))
        if value is not default and not (value > 0 and math.isfinite(value)):
            raise self._error(key, value, "a number above 0")
        return value

    def optional_number(self, key: str, default: float | None = None) -> float | None:
        """A positive number, None where the field is null, `default` where it is absent."""
        if key not in self.values:
            return default
        return self.number(key) if self._get(key) is not None else None

    def numbers(self, key: str) -> list[float]:
        """A list of positive numbers."""
        values = self._value(key, _MISSING, (list, tuple), "a list of numbers")
        if not all(
            isinstance(v, (int, float)) and not isinstance(v, bool) and v > 0 for v in values
        ):
            raise self._error(key, values, "a list of numbers above 0")
        return [float(value) for value in values]

    def text(self, key: str, default: Any = _MISSING) -> str:
        return str(self._value(key, default, (str,), "a string"))

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._error(key, value, "true or false")
        return value

    def table(self, key: str) -> ModelConfig:
        """A table within; empty, and then false, if it is absent or null."""
        if key not in self._tables:
            value = self._get(key) or {}
            if not isinstance(value, Mapping):
                raise self._error(key, value, "a table")
            self._tables[key] = ModelConfig(value, self.family, f"{self.where}{key}.")
        return self._tables[key]

    def __bool__(self) -> bool:
        return bool(self.values)

    def attention_shape(self) -> AttentionShape:
        """Without `num_key_value_heads` there are as many as query heads; without `head_dim` the
        query heads share hidden_size."""
        heads = self.integer("num_attention_heads")
        kv_heads = self.integer("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise self._error("num_key_value_heads", kv_heads, f"a divisor of {heads} query heads")
        dim = self.integer("hidden_size")
        if self._get("head_dim") is None and dim % heads:
            raise self._error("hidden_size", dim, f"a multiple of {heads} query heads")
        return AttentionShape(heads, kv_heads, self.integer("head_dim", default=dim // heads))

    def windows(
        self, layers: int, window: int | None, default: Sequence[str] | None = None
    ) -> list[int | None]:
        """What each layer sees: so many tokens, oneself included, or with None all.

        Args:
            layers: How many there are.
            window: Of the layers that `layer_types` calls `sliding_attention`.
            default: `layer_types` where the file leaves it out; None: every layer has the window.
        """
        usual = default or ["sliding_attention" if window else "full_attention"] * layers
        types = self._value("layer_types", list(usual), (list, tuple), "a list of strings")
        if len(types) != layers:
            raise self._error("layer_types", types, f"one entry for each of {layers} layers")
        for kind in types:
            if kind not in ("full_attention", "sliding_attention"):
                raise self.refuse("layer_types", kind, "full_attention and sliding_attention")
        if window is None and "sliding_attention" in types:
            raise UserError(
                "config.json: layer_types has sliding_attention, but there is no sliding window"
            )
        return [window if kind == "sliding_attention" else None for kind in types]

    def require(self, key: str, expected: Any, default: Any = _MISSING) -> None:
        """The field must have this value, or one of these of a tuple: the family does nothing
        else."""
        value = self._get(key, default)
        known = expected if isinstance(expected, tuple) else (expected,)
        if value is _MISSING or value not in known:
            raise self.refuse(key, value, " and ".join(repr(k) for k in known))

    def require_architecture(self, name: str) -> None:
        """`architectures` must hold this one, if it holds any: others share a `model_type`, yet
        see later tokens too, or have another head."""
        found = self._get("architectures") or [name]
        if name not in found:
            raise self.refuse("architectures", found, name)

    def ignore(self, *keys: str) -> None:
        """Says, where a family is read, that these fields are known and have no effect."""
        self._read.update(keys)

    def refuse_unread(self) -> None:
        """To be called once a family has read all it knows.

        A field that nobody read may change what the model computes, unless it says no (null,
        false, zero, empty), is a library's own (`_name`), or is in `INERT`.

        Raises:
            UserError: There are such fields.
        """
        quantized = next((key for key in QUANTIZED if self.values.get(key)), None)
        if quantized:
            raise UserError(
                f"config.json: {quantized}: the stored weights are quantized already",
                "Take the model's original weights: lorakit quantizes while it loads, as the "
                "recipe's quantization section says.",
            )
        unread = self._unread()
        if unread:
            raise UserError(
                f"config.json: the {self.family} family does not know "
                + ", ".join(f"{key} = {value!r:.60}" for key, value in unread),
                "It may change what the model computes, and training on an approximation would be "
                "wrong in silence. If it does not, set it to null in the file.",
            )

    def _unread(self) -> list[tuple[str, Any]]:
        known = self._read | INERT
        found = [
            (f"{self.where}{key}", value)
            for key, value in self.values.items()
            if value and key not in known and not key.startswith("_")
        ]
        return found + [item for table in self._tables.values() for item in table._unread()]

    def refuse(self, key: str, value: Any, known: str) -> UserError:
        """The error for a value the family cannot honour."""
        said = "is missing" if value is _MISSING else f"= {value!r}"
        return UserError(
            f"config.json: {self.where}{key} {said}: the {self.family} family "
            f"supports {known} only",
            "Training on an approximation would be wrong in silence, so lorakit does not.",
        )

    def _get(self, key: str, default: Any = None) -> Any:
        self._read.add(key)
        return self.values.get(key, default)

    def _value(self, key: str, default: Any, kinds: tuple[type, ...], expected: str) -> Any:
        value = self._get(key)
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
