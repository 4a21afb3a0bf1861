"""Core, outside of builtin/, names no plugin and nothing that a plugin offers.

Recipes name plugins; core only ever looks names up.  This walks core's syntax trees for string
constants and identifiers that are such a name as a whole word, and for imports of plugins.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from lorakit.catalog import first_party, load_catalog

CORE = Path(__file__).resolve().parents[2] / "core" / "lorakit"
KINDS = ("model family", "adapter", "optimizer", "quantization", "logger", "kernels")
# Names that core would be free of only by paraphrase: what they mean there is no plugin.
# `disk` and `terminal` are words for places (a disk that is full, a terminal that is none);
# `TerminalProgress` is core's own.  They may stand in prose with other words around them, but
# not alone, as a name looked up would.
WORDS_OF_PROSE = ("disk", "terminal")
# torch's names, of a dtype and of a processor's instructions, before they are those of a plugin.
TORCHS = ("int8", "avx512")


def offered_names() -> set[str]:
    """Every name of those kinds that an installed plugin offers or a first-party one would."""
    catalog = load_catalog()
    names = {name for kind in KINDS for name in catalog.names(kind)}
    for plugin in first_party():
        for offer in plugin.provides:
            kind, _, name = offer.partition(": ")
            if kind in KINDS:
                names.add(name)
    return names - set(TORCHS)


def plugin_modules() -> set[str]:
    catalog = load_catalog()
    return {p.module for p in catalog.plugins} | {
        p.distribution.replace("-", "_") for p in first_party()
    }


def docstrings(tree: ast.AST) -> set[int]:
    """The ids of the constants that are docstrings, of attributes too."""
    found = set()
    for node in ast.walk(tree):
        # A string that is a statement of its own does nothing but be read.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found.add(id(node.value))
    return found


def identifiers(node: ast.AST) -> Iterator[str]:
    for field in ("id", "attr", "name", "arg", "asname"):
        value = getattr(node, field, None)
        if isinstance(value, str):
            yield value
    yield from getattr(node, "names", []) if isinstance(node, (ast.Global, ast.Nonlocal)) else []


def words(identifier: str) -> list[str]:
    """`LlamaModel` -> llama, model; `build_llama2` -> build, llama2."""
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", identifier).lower().split("_")
    return [part for part in parts if part]


def names_in(source: str, names: Iterable[str]) -> list[str]:
    """`line: name` for each place where `source` names one of `names`."""
    tree = ast.parse(source)
    skipped = docstrings(tree)
    found = []
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        for name in names:
            parts = words(name)
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
                alone = text.strip().lower() == name
                inside = re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text, re.IGNORECASE)
                hit = alone if name in WORDS_OF_PROSE else bool(inside)
                if hit and id(node) not in skipped:
                    found.append(f"{line}: {text!r} holds {name}")
            for identifier in identifiers(node):
                own = words(identifier)
                spans = [own[i : i + len(parts)] for i in range(len(own))]
                hit = own == parts if name in WORDS_OF_PROSE else parts in spans
                if hit:
                    found.append(f"{line}: {identifier} holds {name}")
    return found


def plugin_imports(source: str, modules: Iterable[str]) -> list[str]:
    """`line: module` for each import of a plugin's module or of a part of it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        imported: list[str] = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            imported = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        found += [
            f"{node.lineno}: {name}"
            for name in imported
            for module in modules
            if name == module or name.startswith(f"{module}.")
        ]
    return found


def core_files() -> list[Path]:
    apart = ("builtin", "testing")
    return [p for p in sorted(CORE.rglob("*.py")) if p.relative_to(CORE).parts[0] not in apart]


def test_there_is_something_to_look_for():
    assert {"lora", "adamw", "sgd", "llama", "terminal", "disk"} <= offered_names()
    assert {"lorakit.builtin", "lorakit_llama"} <= plugin_modules()
    assert len(core_files()) > 30


@pytest.mark.parametrize("file", core_files(), ids=lambda p: str(p.relative_to(CORE)))
def test_core_names_no_plugin(file: Path):
    source = file.read_text(encoding="utf-8")
    assert names_in(source, offered_names()) == []
    assert plugin_imports(source, plugin_modules()) == []


@pytest.mark.parametrize(
    "source",
    [
        "x = 'lora'",
        "if name == 'llama': pass",
        "raise ValueError('use adamw or sgd')",
        "x = f'{a} adamw'",
        "def build_llama(): pass",
        "class LlamaModel: pass",
        "import llama",
        "from x import y as sgd",
        "x.lora = 1",
        "f(adamw=1)",
        "x: 'LoRA' = 1",
        "x = 'disk'",
        "def terminal(): pass",
        "def f():\n    'A docstring.'\n    'disk'\n    return 'lora'",
        "global sgd",
    ],
)
def test_a_name_in_core_would_be_found(source: str):
    assert names_in(source, ["lora", "adamw", "sgd", "llama", "disk", "terminal"])


@pytest.mark.parametrize(
    "source",
    [
        "'''lora in a docstring'''",
        "class A:\n    x: int\n    '''the lora rank'''",
        "x = 'lorakit'",
        "x = 'lorakit-llama'",
        "print('the disk is full')",
        "class TerminalProgress: pass",
        "explore = floral = 1",
    ],
)
def test_what_only_looks_like_a_name_is_let_be(source: str):
    assert names_in(source, ["lora", "llama", "disk", "terminal"]) == []


@pytest.mark.parametrize(
    "source",
    [
        "import lorakit.builtin",
        "from lorakit.builtin import lora",
        "from lorakit import builtin",
        "from lorakit.builtin.lora import LoRAOptions",
        "def f():\n    import lorakit_llama.model",
    ],
)
def test_an_import_of_a_plugin_would_be_found(source: str):
    assert plugin_imports(source, ["lorakit.builtin", "lorakit_llama"])
