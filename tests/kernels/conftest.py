"""The kernels of lorakit-x86, where this machine has what they need.

What is written for AMX is tested on processors with AVX-512 only, too: compiled with its
instructions emulated.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lorakit.kernel_protocol import Kernels
from lorakit.records import KernelLibrary

PLUGIN = Path(__file__).parents[2] / "plugins" / "lorakit-x86"


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The compiled module, built so that it takes no AMX."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    built = tmp_path_factory.mktemp("emulated")
    environment = {**os.environ, "CFLAGS": "-DLORAKIT_EMULATED_TILES"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "-j2", "-b", built]
    command += ["-t", built / "objects"]
    done = subprocess.run(
        command, cwd=PLUGIN, env=environment, capture_output=True, text=True, check=False
    )
    found = list(built.glob("lorakit_x86/_kernels*.so"))
    assert found, done.stderr
    spec = importlib.util.spec_from_file_location("lorakit_x86._kernels", found[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["amx", "avx512"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> KernelLibrary:
    """Each library of kernels in turn, if it can be used here."""
    plugin = pytest.importorskip("lorakit_x86")
    found = next(each for each in plugin.lorakit_kernels() if each.name == request.param)
    if found.unusable() is not None and request.param == "amx":
        if (reason := plugin.unusable(plugin.AVX512)) is not None:
            pytest.skip(reason)
        monkeypatch.setattr(plugin, "_kernels", request.getfixturevalue("emulated"))
    if (reason := found.unusable()) is not None:
        pytest.skip(reason)
    return found


@pytest.fixture
def native(library: KernelLibrary) -> Kernels:
    return library.load()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
