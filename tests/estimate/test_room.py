"""How much memory there is, by what the kernel says."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorakit.estimate.room import host_room, resident_bytes, room_on

GB = 2**30
PAGES = 1000
OWN = PAGES * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def machine(tmp_path: Path) -> Callable[..., Path]:
    """`machine(files)` is a root directory with those, of 16 GB with 10 available."""

    def make(**files: str) -> Path:
        proc = tmp_path / "proc"
        (proc / "self").mkdir(parents=True)
        (proc / "meminfo").write_text(
            f"MemTotal: {16 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {10 * 2**20} kB\n"
        )
        (proc / "self" / "statm").write_text(f"9999 {PAGES} 10 1 0 5 0\n")
        for name, text in files.items():
            place = tmp_path / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text)
        return tmp_path

    return make


def version_2(group: str, limit: str, used: int, cached: int = 0) -> dict[str, str]:
    place = f"sys/fs/cgroup{group}"
    return {
        f"{place}/memory.max": f"{limit}\n",
        f"{place}/memory.current": f"{used}\n",
        f"{place}/memory.stat": f"anon 5\ninactive_file {cached}\n",
    }


def test_without_a_limit_it_is_what_the_machine_has(machine: Callable[..., Path]):
    found = host_room(machine())
    assert (found.available, found.total, found.source) == (10 * GB + OWN, 16 * GB, "machine")


def test_a_container_has_what_its_limit_leaves(machine: Callable[..., Path]):
    files = version_2("", str(4 * GB), 3 * GB, cached=GB)
    found = host_room(machine(**{"proc/self/cgroup": "0::/\n", **files}))
    assert (found.available, found.total, found.source) == (2 * GB + OWN, 4 * GB, "cgroup")


def test_a_limit_on_an_enclosing_group_counts(machine: Callable[..., Path]):
    files = {
        **version_2("/jobs", str(6 * GB), 5 * GB),
        **version_2("/jobs/mine", "max", GB),
    }
    found = host_room(machine(**{"proc/self/cgroup": "0::/jobs/mine\n", **files}))
    assert (found.available, found.total) == (GB + OWN, 6 * GB)


def test_a_path_of_the_host_is_looked_for_at_the_mount(machine: Callable[..., Path]):
    files = version_2("", str(2 * GB), GB)
    found = host_room(machine(**{"proc/self/cgroup": "0::/kubepods/pod1\n", **files}))
    assert found.available == GB + OWN


def test_version_1_and_a_limit_beyond_the_machine(machine: Callable[..., Path]):
    place = "sys/fs/cgroup/memory/docker/x"
    files = {
        "proc/self/cgroup": "5:cpu:/docker/x\n4:memory:/docker/x\n",
        f"{place}/memory.limit_in_bytes": str(3 * GB),
        f"{place}/memory.usage_in_bytes": str(GB),
        f"{place}/memory.stat": "total_inactive_file 0\n",
    }
    root = machine(**files)
    assert host_room(root).available == 2 * GB + OWN
    (root / place / "memory.limit_in_bytes").write_text("9223372036854771712")
    assert host_room(root).source == "machine"


def test_where_nothing_is_said_the_whole_machine_counts(tmp_path: Path):
    found = host_room(tmp_path)
    assert found is not None
    assert found.available == found.total > 0


def test_here_and_now():
    found = room_on(torch.device("cpu"))
    assert found is not None
    assert resident_bytes() < found.available <= found.total + resident_bytes()
