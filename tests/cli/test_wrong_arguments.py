"""Arguments that are wrong: one message that names what may be given, and status 2."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]


def message_of(done: Any) -> str:
    """What a command that refused its input said."""
    assert done.status == 2, done.err
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    return str(done.err.removeprefix("error: ").rstrip())


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "x", "--prompt", "a"),
        ("eval", "x", "--data", "a.jsonl"),
        ("merge", "x", "--output", "out"),
    ],
)
def test_a_device_that_nobody_has(command: tuple[str, ...], cli: Cli) -> None:
    known = "is none of auto, cpu, mps, cuda and cuda:N"
    for name in ("xyz", "cpu:1", "cuda:", "cuda:x"):
        assert message_of(cli(*command, "--device", name)) == f'--device: "{name}" {known}'
    message = message_of(cli(*command, "--device", "gpu"))
    assert message == f"--device: \"gpu\" {known} (did you mean 'cuda'?)"
    assert "has no cuda:3000" in message_of(cli(*command, "--device", "cuda:3000"))


def test_a_recipes_device(make_recipe: Callable[..., str], cli: Cli) -> None:
    message = message_of(cli("train", make_recipe(device="xyz")))
    assert 'device: "xyz" is none of auto, cpu, mps, cuda and cuda:N' in message


# /proc refuses even root; a name may have 255 letters.
@pytest.mark.parametrize("place", ["/proc/a", "/proc/a/b", "taken/a", "x" * 300])
def test_a_place_that_cannot_be_written(
    place: str,
    cli: Cli,
    train_run: Callable[..., Path],
    make_recipe: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if place.startswith("/proc") and not Path("/proc/self").exists():
        pytest.skip("no /proc here")
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("precious", encoding="utf-8")
    run, reference = train_run(), make_recipe()
    for command in (
        ("recipes", "copy", "quickstart", f"{place}.toml"),
        ("merge", run, "--output", place),
        ("train", reference, "--output", place),
    ):
        message = message_of(cli(*command))
        assert place in message
        assert "Name another " in message or "File name too long" in message
    assert Path("taken").read_text(encoding="utf-8") == "precious"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("path", ["x" * 300, "~nobody-is-called-so/run"])
def test_a_path_that_nothing_can_have(path: str, cli: Cli, make_recipe: Callable[..., str]) -> None:
    for command in (
        ("generate", path, "--prompt", "a"),
        ("eval", path, "--data", "a.jsonl"),
        ("merge", path, "--output", "out"),
        ("recipes", "list", path),
        ("train", f"{path}.toml"),
        ("train", make_recipe(adapter={"path": path})),
        ("train", make_recipe(), "--resume", "--output", path),
    ):
        assert path in message_of(cli(*command))


def test_a_typo_in_a_runs_name(
    cli: Cli, make_recipe: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    message = message_of(cli("generate", "runs/mien", "--prompt", "a"))
    assert message.startswith("runs/mien: no such path here (did you mean 'mine'?)")
    message = message_of(cli("merge", "runs/mien", "--output", "out"))
    assert "runs/mien is no run and no adapter directory (did you mean 'mine'?)" in message
    message = message_of(cli("train", make_recipe(adapter={"path": "runs/mien"})))
    assert "adapter.path: runs/mien is no run" in message
    assert "(did you mean 'mine'?)" in message
    message = message_of(cli("train", make_recipe(), "--set", "model.path=run"))
    assert "no directory or file here (did you mean 'runs'?)" in message


def test_fewer_rows_than_none(cli: Cli, make_recipe: Callable[..., str]) -> None:
    done = cli("preview", make_recipe(), "--rows", -1)
    assert done.status == 2
    assert "'--rows': -1 is not in the range x>=0" in done.err


def test_numbers_that_no_answer_can_be_drawn_with(cli: Cli) -> None:
    message = message_of(cli("generate", "x", "--prompt", "a", "--temperature", "nan"))
    assert message == "--temperature: expected a finite number, got nan"
    done = cli("generate", "x", "--prompt", "a", "--seed", 2**64)
    assert done.status == 2
    assert "'--seed': " in done.err


@pytest.mark.parametrize(("option", "value"), [("--top-p", 0.9), ("--top-p", 1), ("--top-k", 5)])
def test_limits_of_draws_where_nothing_is_drawn(option: str, value: float, cli: Cli) -> None:
    message = message_of(cli("generate", "x", "--prompt", "a", option, value))
    assert message == (
        f"{option}: nothing is drawn at temperature 0, which takes the likeliest token\n"
        f"  Leave {option} out, or set --temperature above 0."
    )


def test_limits_of_draws_that_leave_nothing_to_draw(cli: Cli) -> None:
    ask = ("generate", "x", "--prompt", "a", "--temperature", 1)
    assert message_of(cli(*ask, "--top-p", "nan")) == "--top-p: expected a finite number, got nan"
    for option, value in (("--top-p", 0), ("--top-p", 1.1), ("--top-k", 0)):
        done = cli(*ask, option, value)
        assert done.status == 2
        assert f"'{option}': {value} is not in the range" in done.err.replace("0.0 is", "0 is")


def test_text_that_is_not_utf_8(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an argument it comes with lone surrogates."""
    assert message_of(cli("generate", "x", "--prompt", "a\udcff")) == (
        "--prompt: the text is not UTF-8"
    )
    message = message_of(cli("generate", "x", "--prompt", "a", "--system", "\udcff"))
    assert message == "--system: the text is not UTF-8"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8"))
    message = message_of(cli("generate", "x", "--prompt", "-"))
    assert message == "--prompt: the text is not UTF-8"
