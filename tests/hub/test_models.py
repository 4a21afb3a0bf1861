"""Base models from a hub: only what is needed, once, whole, and to the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lorakit.builtin.hub import claims, fetch, weight_files
from lorakit.catalog import load_catalog
from lorakit.errors import UserError
from lorakit.progress import SilentProgress
from lorakit.weights.base import fetch_base

WEIGHTS = bytes(range(256)) * 40_000
SMALL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
}

UNWANTED = (
    *("README.md", ".gitattributes", "LICENSE", "a.py", "training_args.bin", "params.json"),
    *("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "model.Q4_K_M.gguf"),
    *("onnx/model.onnx", "onnx/config.json", "original/tokenizer.model"),
    *("consolidated.safetensors", "consolidated.00.pth", "original/consolidated.00.pth"),
)


def get(path: str = "acme/tiny") -> Path:
    return fetch(path, SilentProgress())


@pytest.mark.parametrize(
    "path",
    ["acme/tiny", "mistralai/Mistral-7B-v0.1", "01-ai/Yi_6B.x", "acme/tiny@v1", "a/b@refs/pr/3"],
)
def test_hub_ids(path: str) -> None:
    assert claims(path)


@pytest.mark.parametrize(
    "path",
    ["tiny", "/acme/tiny", "./tiny", "../a/b", "a/b/c", "~/tiny", "acme/", "acme/tiny@", "a--b/c",
     "acme/model.gguf", "models/model.safetensors", "acme/ti ny", "pypi:a/b", "https://x/y",
     "acme/" + "x" * 100, "acme/tiny\n", ""],
)  # fmt: skip
def test_no_hub_ids(path: str) -> None:
    assert not claims(path)


def test_a_local_directory_of_that_name_wins(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme" / "tiny").mkdir(parents=True)
    found = fetch_base("acme/tiny", load_catalog(), SilentProgress())
    assert found == tmp_path / "acme" / "tiny"
    assert hub.log == []


def test_only_what_is_needed_is_fetched(hub: Any) -> None:
    wanted = {
        **SMALL,
        "generation_config.json": b"{ }",
        "tokenizer_config.json": b"{  }",
        "special_tokens_map.json": b"{   }",
        "chat_template.jinja": b"x",
    }
    unwanted = dict.fromkeys(UNWANTED, b"unwanted")
    hub.add("models/acme/tiny", {**unwanted, **wanted})
    directory = get()
    assert hub.fetched() == sorted(set(wanted) - {"model.safetensors"})
    assert {p.name: p.read_bytes() for p in directory.iterdir()} == wanted
    # The weights come from where the hub's redirect points.
    assert [line for line in hub.log if "storage" in line] == [
        "GET storage/|models/acme/tiny|model.safetensors"
    ]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["model.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["model.safetensors.index.json", "model.safetensors"], ["model.safetensors.index.json"]),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "x.bin"],
         ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
        (["model.fp16.safetensors", "model.safetensors"], ["model.safetensors"]),
        (["weights.safetensors"], ["weights.safetensors"]),
        (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin"],
         ["pytorch_model.bin.index.json"]),
        (["pytorch_model.bin", "consolidated.00.pth"], ["pytorch_model.bin"]),
        (["consolidated.01.pth", "consolidated.00.pth"],
         ["consolidated.00.pth", "consolidated.01.pth"]),
        (["adapter_model.safetensors", "model.gguf", "onnx/model.safetensors"], []),
    ],
)  # fmt: skip
def test_one_weight_format(names: list[str], expected: list[str]) -> None:
    assert weight_files(names) == expected


def test_an_index_names_the_shards(hub: Any) -> None:
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    files = {
        "config.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        "part-1.safetensors": b"1",
        "part-2.safetensors": b"2",
        "part-3.safetensors": b"3",
        "model.safetensors": b"whole",
    }
    hub.add("models/acme/tiny", files)
    get()
    assert hub.fetched() == [
        *("config.json", "model.safetensors.index.json", "part-1.safetensors", "part-2.safetensors")
    ]
    del files["part-2.safetensors"]
    hub.add("models/acme/broken", files)
    with pytest.raises(UserError, match=r"lacks 1 of the 2 weight files .* part-2\.safetensors"):
        get("acme/broken")


def test_metas_own_format_comes_with_its_params(hub: Any) -> None:
    files = {
        "consolidated.00.pth": b"0",
        "params.json": b"{}",
        "tokenizer.model": b"t",
        "x.md": b"",
    }
    hub.add("models/acme/tiny", files)
    get()
    assert hub.fetched() == ["consolidated.00.pth", "params.json", "tokenizer.model"]


def test_a_second_run_asks_nothing(hub: Any, offline: Callable[[], None]) -> None:
    hub.add("models/acme/tiny", SMALL)
    first = get()
    asked = len(hub.log)
    assert get() == first
    assert len(hub.log) == asked
    offline()
    assert get() == first
    assert get(f"acme/tiny@{hub.commit('models/acme/tiny')}") == first


def test_the_revision_is_asked_for_and_files_are_of_its_commit(hub: Any) -> None:
    commit = hub.add("models/acme/tiny", SMALL)
    directory = get("acme/tiny@v1")
    assert hub.log[0] == "GET api/models/acme/tiny/revision/v1"
    assert all(f"/resolve/{commit}/" in line for line in hub.log if "/resolve/" in line)
    assert directory.name == commit


def test_a_cache_filled_by_huggingface_hub_serves_offline(
    hub: Any, offline: Callable[[], None]
) -> None:
    from huggingface_hub import hf_hub_download

    hub.add("models/acme/tiny", SMALL)
    for name in SMALL:
        hf_hub_download("acme/tiny", name, endpoint=hub.address)
    offline()
    assert sorted(p.name for p in get().iterdir()) == sorted(SMALL)


def test_what_lorakit_downloads_serves_huggingface_hub_offline(
    hub: Any, offline: Callable[[], None]
) -> None:
    from huggingface_hub import hf_hub_download

    hub.add("models/acme/tiny", SMALL)
    directory = get()
    offline()
    for name in SMALL:
        assert Path(hf_hub_download("acme/tiny", name)) == directory / name


def test_the_token_is_sent_to_the_hub_and_not_to_the_storage(
    hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    hub.add("models/acme/tiny", SMALL)
    hub.gated.add("models/acme/tiny")
    get()
    storage = [t for line, t in zip(hub.log, hub.tokens, strict=True) if "storage" in line]
    others = [t for line, t in zip(hub.log, hub.tokens, strict=True) if "storage" not in line]
    assert storage == [None]
    assert set(others) == {"Bearer hf_good"}


class Counting:
    """A progress that adds up all its tasks."""

    def __init__(self) -> None:
        self.done = self.total = 0

    @contextmanager
    def task(self, description: str, total: int | None = None, unit: str = "") -> Any:
        assert unit == "bytes"
        self.total += total or 0
        yield self

    def advance(self, amount: int = 1) -> None:
        self.done += amount


def test_progress_counts_every_byte_once(hub: Any) -> None:
    hub.add("models/acme/tiny", SMALL)
    hub.cut["model.safetensors"] = 1_000_000
    progress = Counting()
    fetch("acme/tiny", progress)
    assert progress.done == progress.total == sum(len(c) for c in SMALL.values())


def test_a_cut_connection_is_taken_up_again(hub: Any) -> None:
    hub.add("models/acme/tiny", SMALL)
    hub.cut["model.safetensors"] = 1_000_000
    assert (get() / "model.safetensors").read_bytes() == WEIGHTS
    (wanted,) = hub.ranges
    assert 0 < int(wanted.removeprefix("bytes=").partition("-")[0]) <= 1_000_000


def test_a_stopped_download_goes_on_in_the_next_run(hub: Any) -> None:
    hub.add("models/acme/tiny", SMALL)
    hub.cut["model.safetensors"] = 2_000_000
    blobs = Path(hub.cache) / "models--acme--tiny" / "blobs"

    class Later(Counting):
        def advance(self, amount: int = 1) -> None:
            super().advance(amount)
            # The second piece of the file: the first is on the disk by then.
            if hub.ranges:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch("acme/tiny", Later())
    (partial,) = blobs.glob("*.incomplete")
    kept = partial.stat().st_size
    assert 0 < kept < len(WEIGHTS)
    hub.log.clear()
    hub.ranges.clear()
    assert (get() / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges == [f"bytes={kept}-"]
    assert hub.fetched() == []
    assert list(blobs.glob("*.incomplete")) == []


def test_damaged_weights_are_not_kept(hub: Any) -> None:
    hub.add("models/acme/tiny", SMALL)
    hub.damaged.add("model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors arrived damaged"):
        get()
    hub.damaged.clear()
    assert (get() / "model.safetensors").read_bytes() == WEIGHTS


def test_without_links_a_file_that_is_half_copied_does_not_count(
    hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(source: Path, target: Path) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:100])
        raise KeyboardInterrupt

    def refused(*_: Any) -> None:
        raise OSError

    hub.add("models/acme/tiny", SMALL)
    monkeypatch.setattr(Path, "symlink_to", refused)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", half)
        with pytest.raises(KeyboardInterrupt):
            get()
    folder = get()
    assert {name: (folder / name).read_bytes() for name in SMALL} == SMALL


def test_without_xet_all_comes_over_http(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.add("models/acme/tiny", SMALL)
    hub.xet = True
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    assert (get() / "model.safetensors").read_bytes() == WEIGHTS


def test_with_xet_huggingface_hub_fetches_and_progress_is_ours(
    hub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from lorakit.hub import transfer

    calls = []

    def hf_hub_download(
        repo_id: str, filename: str, *, tqdm_class: Any, revision: str, **_: Any
    ) -> None:
        calls.append((repo_id, filename, revision))
        with tqdm_class(desc="x", total=5, unit="B", position=1, leave=True) as bar:
            bar.update(len(WEIGHTS))
            bar.update_transfer(123)
            bar.set_postfix_str("1 MB/s", refresh=False)
        assert callable(tqdm_class.update_transfer)

    hub.add("models/acme/tiny", SMALL)
    hub.xet = True
    monkeypatch.setattr(transfer, "_has_xet", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    progress = Counting()
    fetch("acme/tiny", progress)
    assert calls == [("acme/tiny", "model.safetensors", hub.commit("models/acme/tiny"))]
    assert progress.done == progress.total
