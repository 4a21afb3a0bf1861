"""Every hook is tested and documented, and so is every record's every field."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest

import lorakit
from lorakit import hookspecs
from lorakit.catalog import KINDS
from lorakit.records import Offer
from lorakit.testing import check_plugin

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs" / "reference" / "plugins.md"
CODE = re.findall(r"```python\n(.*?)```", REFERENCE.read_text(encoding="utf-8"), re.DOTALL)
HOOKS = sorted(name for name in vars(hookspecs) if name.startswith("lorakit_"))


def signatures() -> dict[str, str]:
    """Hook -> its signature as it stands in hookspecs.py."""
    tree = ast.parse(Path(hookspecs.__file__).read_text(encoding="utf-8"))
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.returns is not None:
            arguments, returned = ast.unparse(node.args), ast.unparse(node.returns)
            found[node.name] = f"{node.name}({arguments}) -> {returned}"
    return found


def section_of(heading: str) -> str:
    """The reference's text under a heading, up to the next."""
    _, found, rest = REFERENCE.read_text(encoding="utf-8").partition(f"\n{heading}\n")
    assert found, f"docs/reference/plugins.md has no heading {heading!r}"
    return re.split(r"^#+ ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def test_there_are_hooks():
    assert len(HOOKS) == 12
    assert set(HOOKS) == set(signatures())


@pytest.mark.parametrize("hook", HOOKS)
def test_each_hook_is_tested(hook: str):
    texts = [p.read_text(encoding="utf-8") for p in (ROOT / "tests").rglob("test_*.py")]
    assert any(re.search(rf"^def test_{hook}(_\w+)?\(", text, re.MULTILINE) for text in texts)


@pytest.mark.parametrize("hook", HOOKS)
def test_each_hook_is_documented_with_its_signature(hook: str):
    assert section_of(f"## `{signatures()[hook]}`").strip()


@pytest.mark.parametrize("kind", KINDS)
def test_each_record_is_documented_with_its_fields(kind: str):
    record = KINDS[kind].record
    text = section_of(f"### `{record.__name__}`")
    common = {field.name for field in attrs.fields(Offer)}
    own = [field.name for field in attrs.fields(record) if field.name not in common]
    assert own
    assert [name for name in own if f"| `{name}` |" not in text] == []


def test_what_records_have_in_common_is_documented():
    text = section_of("## What every record has")
    assert [f.name for f in attrs.fields(Offer) if f"| `{f.name}` |" not in text] == []


@pytest.mark.parametrize("hook", HOOKS)
def test_each_hook_of_records_has_a_kind(hook: str):
    """What a hook returns is filed in one registry, by the record its signature names."""
    if hook == "lorakit_recipe_problems":
        return
    (kind,) = [kind for kind in KINDS.values() if kind.hook == hook]
    assert signatures()[hook].endswith(f"-> Sequence[{kind.record.__name__}]")


def test_hooks_are_collected_from_everyone():
    """No hook stops at the first plugin, and none wraps another's."""
    for hook in HOOKS:
        settings = getattr(hookspecs, hook).lorakit_spec
        assert not settings["firstresult"]


def test_the_references_example_runs():
    code, _ = CODE
    namespace: dict[str, object] = {}
    exec(compile(code, "plugins.md", "exec"), namespace)
    assert callable(namespace["lorakit_optimizers"])


def test_the_references_dataset_conforms_and_trains(
    plant: Callable[..., str], small_recipe: Callable[..., str], tmp_path: Path
):
    _, code = CODE
    plant("lorakit-quiz", code)
    for row in ({"question": "?", "answer": "!"}, {"note": "Words."}):
        check_plugin("lorakit-quiz", samples={"dataset: quiz": row})
    quiz = {"name": "quiz", "path": str(tmp_path / "quiz.jsonl"), "system": "Be brief."}
    lorakit.train(small_recipe(data=quiz, training={"max_steps": 1}))


def test_the_reference_names_what_testing_exports():
    import lorakit.testing

    text = section_of("## `lorakit.testing`")
    for name in ("check_plugin", "conformance_cases", "check_torch_free", "write_checkpoint"):
        assert name in text
        assert name in lorakit.testing.__all__
