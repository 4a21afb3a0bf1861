"""A hub that refuses, is not there, or has no such thing: one message with the fix."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lorakit.catalog import load_catalog
from lorakit.data.files import find_data_files
from lorakit.errors import UserError
from lorakit.progress import SilentProgress
from lorakit.weights.base import fetch_base

FILES = {"config.json": b"{}", "model.safetensors": b"w" * 10_000, "tokenizer.json": b"t"}
Refused = Callable[[str], UserError]


@pytest.fixture
def refused() -> Refused:
    """`refused("owner/name")` fetches a model that must be refused."""

    def refused(path: str) -> UserError:
        with pytest.raises(UserError) as error:
            fetch_base(path, load_catalog(), SilentProgress())
        assert error.value.exit_status == 2
        assert error.value.fix
        assert "\n" not in error.value.message
        return error.value

    return refused


def test_gated(hub: Any, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("models/acme/tiny", FILES)
    hub.gated.add("models/acme/tiny")
    error = refused("acme/tiny")
    assert "model.path: acme/tiny is gated" in error.message
    assert "a request without a token" in error.message
    assert f"licence at {hub.address}/acme/tiny" in error.fix
    assert "set HF_TOKEN" in error.fix
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert "the account of the token in use" in refused("acme/tiny").message
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert fetch_base("acme/tiny", load_catalog(), SilentProgress()).is_dir()


def test_a_typo_in_a_local_path_is_told_as_both(
    hub: Any, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mymodel").mkdir(parents=True)
    error = refused("models/mymodl")
    assert error.message == (
        "model.path: models/mymodl: no such path here (did you mean 'mymodel'?), and no such "
        f"model on the hub ({hub.address}/models/mymodl)"
    )
    assert "(did you mean 'models'?)" in refused("modles/mymodel").message


def test_no_such_revision(hub: Any, refused: Refused) -> None:
    hub.add("models/acme/tiny", FILES)
    error = refused("acme/tiny@v2")
    assert error.message == "model.path: acme/tiny@v2: acme/tiny has no revision 'v2'"
    assert f"{hub.address}/acme/tiny/tree/main" in error.fix


def test_offline_and_not_in_the_cache(
    hub: Any, refused: Refused, offline: Callable[[], None]
) -> None:
    hub.add("models/acme/tiny", FILES)
    offline()
    started = time.perf_counter()
    error = refused("acme/tiny")
    assert time.perf_counter() - started < 1
    assert f"not in the cache ({hub.cache}), and HF_HUB_OFFLINE is set" in error.message
    assert "HF_HUB_OFFLINE=0" in error.fix
    assert hub.log == []


def test_offline_with_half_a_model(hub: Any, refused: Refused, offline: Callable[[], None]) -> None:
    hub.add("models/acme/tiny", FILES)
    directory = fetch_base("acme/tiny", load_catalog(), SilentProgress())
    (directory / "model.safetensors").unlink()
    offline()
    assert "HF_HUB_OFFLINE is set" in refused("acme/tiny").message


def test_nobody_answers(hub: Any, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    # Port 9 of this machine: the connection is refused at once.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.perf_counter()
    error = refused("acme/tiny")
    assert time.perf_counter() - started < 5
    assert "model.path: acme/tiny: no connection to http://127.0.0.1:9" in error.message
    assert "HF_ENDPOINT" in error.fix


@pytest.mark.parametrize("unplugged", [True, False])
def test_a_local_path_is_told_of_before_the_network(
    unplugged: bool,
    hub: Any,
    refused: Refused,
    offline: Callable[[], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import constants

    if unplugged:
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    else:
        offline()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    why = "no connection to http://127.0.0.1:9" if unplugged else f"not in the cache ({hub.cache})"
    for path, near in (
        ("runs/quickstrat", "(did you mean 'quickstart'?)"),
        ("runs/nix", "(runs holds quickstart)"),
        ("rnus/quickstart", "(did you mean 'runs'?)"),
    ):
        error = refused(path)
        told = f"model.path: {path}: no such path here {near}; as a model on the hub: {why}"
        assert error.message.startswith(told)
        assert error.fix.startswith("Check the spelling. If it is on the hub: ")
    error = refused("acme/tiny")
    assert why in error.message
    assert error.message.endswith("; no such path here either")


def test_a_hub_that_is_down(hub: Any, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    hub.busy = True
    assert "does not answer as it should (status 503)" in refused("acme/tiny").message


def test_a_connection_lost_for_good(
    hub: Any, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)
    hub.add("models/acme/tiny", FILES)
    hub.storage = "http://localhost:9"
    error = refused("acme/tiny")
    assert "no connection to" in error.message
    assert "goes on with what is there already" in error.fix


def test_a_disk_without_room(hub: Any, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("models/acme/tiny", FILES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2_000_000))
    error = refused("acme/tiny")
    assert f"no room on the disk of {hub.cache}" in error.message
    assert "HF_HOME" in error.fix
    assert hub.fetched() == []


@pytest.mark.parametrize(
    ("begun", "fits"),
    [
        # Of the weights' 10 MB, and the disk has 8 MB beside what is kept free.
        ({}, False),
        ({"a" * 64: 1_000_000}, False),
        ({"a" * 64: 3_000_000}, True),
        # A second half-done file is no part of the only large one that is missing ...
        ({"a" * 64: 1_000_000, "b" * 64: 1_500_000}, False),
        ({"a" * 64: 3_000_000, "b" * 64: 1_500_000}, True),
        # ... and huggingface_hub's own are begun anew.
        ({f"{'a' * 64}.0123abcd": 3_000_000}, False),
    ],
)
def test_room_is_counted_without_what_a_stopped_download_has_left(
    begun: dict[str, int], fits: bool, hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("models/acme/tiny", {**FILES, "model.safetensors": b"w" * 10_000_000})
    blobs = Path(hub.cache) / "models--acme--tiny" / "blobs"
    blobs.mkdir(parents=True)
    for name, size in begun.items():
        (blobs / f"{name}.incomplete").write_bytes(bytes(size))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=58_000_000))
    if fits:
        assert fetch_base("acme/tiny", load_catalog(), SilentProgress()).is_dir()
        return
    with pytest.raises(UserError, match="no room on the disk"):
        fetch_base("acme/tiny", load_catalog(), SilentProgress())


def test_a_disk_that_fills_up_midway(
    hub: Any, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from lorakit.hub import transfer

    def write(self: Any, chunk: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.add("models/acme/tiny", FILES)
    monkeypatch.setattr(transfer._Counted, "write", write)
    assert "no room on the disk of" in refused("acme/tiny").message


def test_a_cache_that_cannot_be_made(hub: Any, refused: Refused, tmp_path: Path) -> None:
    hub.add("models/acme/tiny", FILES)
    (tmp_path / "hf").write_text("a file")
    error = refused("acme/tiny")
    assert "cannot be kept in" in error.message
    assert "HF_HOME" in error.fix


@pytest.mark.parametrize(
    ("names", "expected", "fix"),
    [
        (["config.json", "m.gguf"], "it has .gguf files", "download the .gguf file"),
        (["config.json"], "has no weights that lorakit takes", "another repository"),
        (["adapter_config.json", "adapter_model.safetensors"], "no config.json", "base model"),
    ],
)
def test_a_repository_of_something_else(
    names: list[str], expected: str, fix: str, hub: Any, refused: Refused
) -> None:
    hub.add("models/acme/tiny", dict.fromkeys(names, b"{}"))
    error = refused("acme/tiny")
    assert expected in error.message
    assert fix in error.fix
    assert hub.fetched() == []


def test_no_such_data_set(hub: Any) -> None:
    with pytest.raises(UserError) as error:
        find_data_files("acme/rows", SilentProgress())
    assert error.value.message == (
        "data.path: acme/rows: no such path here, and no such data set on the hub "
        f"({hub.address}/datasets/acme/rows)"
    )
