"""How much memory there is for a run."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from attrs import frozen

ROOT = Path("/")


@frozen
class Room:
    """Memory of a device, in bytes.

    Attributes:
        available: What a run may take, this process' own included.
        total: What there is, or what a limit leaves of it.
        source: What says so: `machine`, `cgroup`, `cuda:0`.
    """

    available: int
    total: int
    source: str


def room_on(device: torch.device) -> Room | None:
    """The device's memory; None where the platform does not tell."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Room(free + torch.cuda.memory_reserved(device), total, str(device))
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return Room(total, total, "mps")
    return host_room()


def host_room(root: Path = ROOT) -> Room | None:
    """The machine's memory that can be had without swapping, or what a container's limit leaves.

    Sources: proc(5), MemAvailable; the kernel's cgroup-v2 documentation, memory.max; cgroup-v1,
    memory.limit_in_bytes.
    """
    machine = _machine_room(root)
    limits = [room for room in _cgroup_rooms(root) if machine is None or room.total < machine.total]
    return min([*limits, *([machine] if machine else [])], key=_available, default=None)


def _available(room: Room) -> int:
    return room.available


def _machine_room(root: Path) -> Room | None:
    try:
        lines = (root / "proc" / "meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if ":" in line}
        available, total = kilobytes["MemAvailable"] * 1024, kilobytes["MemTotal"] * 1024
    except (OSError, ValueError, KeyError, IndexError):
        return _whole_machine()
    return Room(available + resident_bytes(root), total, "machine")


def _whole_machine() -> Room | None:
    """Where the system does not say what is free."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    return Room(total, total, "machine") if total > 0 else None


def _cgroup_rooms(root: Path) -> list[Room]:
    """What each limit on this process leaves, from its own group up to the root's."""
    rooms = []
    mount = root / "sys" / "fs" / "cgroup"
    names = {"": ("memory.max", "memory.current"), "memory": V1_NAMES}
    for controller, group in _groups(root):
        top = mount / controller
        # In a container, the path is the host's, and the group itself is at the mount.
        for place in [top / group, *(top / group).parents]:
            if place != top and top not in place.parents:
                break
            room = _limited(place, *names[controller], own=resident_bytes(root))
            if room is not None:
                rooms.append(room)
    return rooms


V1_NAMES = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def _groups(root: Path) -> list[tuple[str, str]]:
    """Controller's directory and the process' group in it: version 2 has one for all."""
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers == "" or "memory" in controllers.split(","):
            found.append(("memory" if controllers else "", group.lstrip("/")))
    return found


def _limited(place: Path, limit_name: str, usage_name: str, *, own: int) -> Room | None:
    try:
        limit = int((place / limit_name).read_text(encoding="ascii"))
        usage = int((place / usage_name).read_text(encoding="ascii"))
        lines = (place / "memory.stat").read_text(encoding="ascii").splitlines()
    # No such file, or `max`.
    except (OSError, ValueError):
        return None
    statistics = dict(line.split()[:2] for line in lines if len(line.split()) >= 2)
    # The kernel drops these before it runs out.
    cached = int(statistics.get("total_inactive_file", statistics.get("inactive_file", 0)))
    return Room(limit - usage + cached + own, limit, "cgroup")


def resident_bytes(root: Path = ROOT) -> int:
    """Of this process; its peak where the system does not tell what it is now."""
    try:
        pages = int((root / "proc" / "self" / "statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        from lorakit.memory import peak_memory_bytes

        return peak_memory_bytes(torch.device("cpu"))
