"""What is on offer: one registry per kind of record, and which plugin each comes from."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from typing import Any

import tomli
from attrs import evolve, field, frozen

from lorakit import records
from lorakit.errors import UserError, did_you_mean, listing
from lorakit.plugins import Plugin, explain, load_plugins


@frozen
class Kind:
    """A kind of record: its word in messages, its hook, its class, its recipe section."""

    word: str
    hook: str
    record: type[records.Offer]
    section: str


KINDS = {
    kind.word: kind
    for kind in (
        Kind("model family", "lorakit_model_families", records.ModelFamily, "model"),
        Kind("adapter", "lorakit_adapters", records.AdapterMethod, "adapter"),
        Kind("quantization", "lorakit_quantizations", records.QuantizationScheme, "quantization"),
        Kind("optimizer", "lorakit_optimizers", records.OptimizerType, "optimizer"),
        Kind("precision", "lorakit_precisions", records.PrecisionPolicy, "precision"),
        Kind("checkpointer", "lorakit_checkpointers", records.CheckpointerType, "checkpointer"),
        Kind("logger", "lorakit_loggers", records.LoggerType, "loggers"),
        Kind("dataset", "lorakit_datasets", records.DatasetFormat, "data"),
        Kind("weight format", "lorakit_weight_formats", records.WeightFormat, ""),
        Kind("model source", "lorakit_model_sources", records.ModelSource, ""),
        Kind("kernels", "lorakit_kernels", records.KernelLibrary, ""),
    )
}


@frozen
class Offered:
    """A record and the plugin it came from."""

    record: Any
    plugin: Plugin


@frozen
class FirstParty:
    """A plugin distribution that lorakit's own project publishes."""

    distribution: str
    summary: str
    provides: tuple[str, ...]


@frozen
class Catalog:
    """All records by kind and name.

    Attributes:
        plugins: Every plugin found, broken and blocked ones too.
        offers: kind -> name -> who offers it; more than one owner is a clash, raised when the
            name is asked for, so that a clash never stops an unrelated run.
        rules: The `lorakit_recipe_problems` implementations, with their plugins.
    """

    plugins: tuple[Plugin, ...]
    offers: dict[str, dict[str, list[Offered]]]
    rules: list[tuple[Any, Plugin]] = field(factory=list)

    def names(self, kind: str) -> list[str]:
        """The names of one kind, sorted."""
        return sorted(self.offers[kind])

    def all(self, kind: str) -> list[Any]:
        """The records of one kind that nobody else claims the name of, sorted by name."""
        return [o[0].record for _, o in sorted(self.offers[kind].items()) if len(o) == 1]

    def defaults(self, kind: str) -> list[Any]:
        """The records chosen where a recipe leaves the section out."""
        return [record for record in self.all(kind) if record.default]

    def get(self, kind: str, name: str) -> Any:
        """The record of that name.

        Raises:
            UserError: Nobody offers it, or more than one plugin does.
        """
        offered = self.offers[kind].get(name, [])
        if len(offered) == 1:
            return offered[0].record
        if offered:
            owners = listing([f"{o.plugin.label} {o.plugin.version}" for o in offered])
            raise UserError(
                f"{kind} {name!r} is offered by {owners}",
                "Uninstall one of them, or leave it out with LORAKIT_BLOCK=name.",
            )
        raise UserError(self._unknown(kind, name), self._who_would(kind, name))

    def _unknown(self, kind: str, name: str) -> str:
        hint = did_you_mean(name, self.offers[kind])
        known = listing(self.names(kind))
        # "kernels" is a plural.
        verb = "are" if kind.endswith("s") else "is"
        return f"no {kind} {verb} called {name!r}{hint or f' (there is: {known})'}"

    def _who_would(self, kind: str, name: str) -> str:
        """Which plugin that is not loaded would offer the name, and what to do about it."""
        wanted = f"{kind}: {name}"
        publisher = next((f for f in first_party() if wanted in f.provides), None)
        absent = [p for p in self.plugins if p.status != "loaded"]
        for plugin in absent:
            ours = publisher is not None and plugin.distribution == publisher.distribution
            if ours or name in (plugin.name, plugin.distribution.removeprefix("lorakit-")):
                return (
                    f"It would come from {plugin.label}, which is {plugin.status}: {plugin.reason}"
                )
        if publisher is not None:
            return f"It comes with {publisher.distribution}: pip install {publisher.distribution}"
        if absent:
            reasons = [f"{p.label} ({p.status}: {p.reason})" for p in absent]
            return f"Plugins that are not loaded may offer it: {listing(reasons)}"
        return ""


@lru_cache(maxsize=1)
def first_party() -> tuple[FirstParty, ...]:
    """The plugins lorakit's own project publishes, installed or not; from first_party.toml."""
    text = (files("lorakit") / "first_party.toml").read_text(encoding="utf-8")
    return tuple(
        FirstParty(name, entry["summary"], tuple(entry["provides"]))
        for name, entry in tomli.loads(text).items()
    )


def load_catalog() -> Catalog:
    """Loads every plugin and files what it offers.

    A plugin whose hook raises, or returns something that is not the hook's record, is listed as
    broken, and none of its records is filed.
    """
    loaded = load_plugins()
    by_label = {p.label: p for p in loaded.plugins}
    offered: dict[str, dict[str, list[Any]]] = {label: {} for label in by_label}
    for kind in KINDS.values():
        for impl in getattr(loaded.manager.hook, kind.hook).get_hookimpls():
            plugin = by_label[impl.plugin_name]
            if plugin.status != "loaded":
                continue
            try:
                offered[plugin.label][kind.word] = _collect(kind, impl.function)
            except (Exception, SystemExit) as error:
                by_label[plugin.label] = evolve(plugin, status="broken", reason=explain(error))

    offers: dict[str, dict[str, list[Offered]]] = {kind: {} for kind in KINDS}
    for label, kinds in offered.items():
        plugin = by_label[label]
        if plugin.status != "loaded":
            continue
        for kind_word, found in kinds.items():
            for record in found:
                offers[kind_word].setdefault(record.name, []).append(Offered(record, plugin))

    rules = [
        (impl.function, by_label[impl.plugin_name])
        for impl in loaded.manager.hook.lorakit_recipe_problems.get_hookimpls()
        if by_label[impl.plugin_name].status == "loaded"
    ]
    return Catalog(tuple(by_label.values()), offers, rules)


def _collect(kind: Kind, function: Any) -> list[Any]:
    found = list(function())
    for record in found:
        if not isinstance(record, kind.record):
            expected = f"lorakit.records.{kind.record.__name__}"
            raise TypeError(f"{kind.hook} returned {record!r}, expected {expected}")
    return found
