"""Finding and loading plugins.

Finding reads entry points and imports nothing, so every plugin has a name, a distribution and
a version before anything of it can go wrong.  Loading imports each one on its own: pluggy's
own loader stops at the first that fails, and takes the ones behind it down as well.
"""

from __future__ import annotations

import os
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

import pluggy
from attrs import evolve, frozen

from lorakit import hookspecs
from lorakit.hookspecs import GROUP

BLOCK_VARIABLE = "LORAKIT_BLOCK"


@frozen
class Plugin:
    """A plugin as found, and what became of it.

    Attributes:
        name: The entry point's name.
        distribution: The distribution it came with.
        version: That distribution's version.
        module: The module the entry point names.
        status: `loaded`, `broken` or `blocked`.
        reason: Why it is not loaded.
    """

    name: str
    distribution: str
    version: str
    module: str
    status: str = "loaded"
    reason: str = ""

    @property
    def label(self) -> str:
        """`lorakit-toy[toy]`: for messages."""
        return f"{self.distribution}[{self.name}]"


@frozen
class LoadedPlugins:
    """pluggy's manager, fresh for this call, and every plugin that was found."""

    manager: pluggy.PluginManager
    plugins: tuple[Plugin, ...]


def find_plugins() -> list[tuple[Plugin, EntryPoint]]:
    """Every entry point of group `lorakit`, in a fixed order, each once."""
    found: dict[tuple[str, str, str], tuple[Plugin, EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        dist = entry.dist
        name = dist.metadata["Name"] if dist else "?"
        version = dist.version if dist else "?"
        # A distribution that is on sys.path twice (an editable install beside a build) is one.
        found.setdefault(
            (name.lower(), entry.name, entry.value),
            (Plugin(entry.name, name, version, entry.value), entry),
        )
    return [found[key] for key in sorted(found)]


def blocked_names() -> set[str]:
    """The names in the LORAKIT_BLOCK variable: plugins, or distributions."""
    return {n.strip() for n in os.environ.get(BLOCK_VARIABLE, "").split(",") if n.strip()}


def load_plugins() -> LoadedPlugins:
    """Finds, imports and registers every plugin; none of them can stop another."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    blocked = blocked_names()
    plugins = []
    for plugin, entry in find_plugins():
        if blocked & {plugin.name, plugin.distribution}:
            reason = f"blocked by {BLOCK_VARIABLE}"
            plugins.append(evolve(plugin, status="blocked", reason=reason))
            continue
        try:
            _register(manager, entry.load(), plugin)
        # A plugin may fail in any way at import, SystemExit included; it is listed, not fatal.
        except (Exception, SystemExit) as error:
            plugins.append(evolve(plugin, status="broken", reason=explain(error)))
        else:
            plugins.append(plugin)
    return LoadedPlugins(manager, tuple(plugins))


def explain(error: BaseException) -> str:
    """One line: the error's type and its message's first line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _register(manager: pluggy.PluginManager, module: Any, plugin: Plugin) -> None:
    _check_markers(module)
    try:
        manager.register(module, name=plugin.label)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        manager.unregister(name=plugin.label)
        # pluggy says what is wrong on the last of several lines.
        raise TypeError(" ".join(str(error).split())) from None


def _check_markers(module: ModuleType) -> None:
    """A hook without @hookimpl would be ignored in silence."""
    specs = {name for name in vars(hookspecs) if name.startswith("lorakit_")}
    for name in specs & set(vars(module)):
        function = getattr(module, name)
        if callable(function) and not hasattr(function, f"{GROUP}_impl"):
            raise TypeError(f"{name} lacks the @lorakit.hookimpl decorator")
