"""How much memory there is to be had, the limit of our container included."""

from __future__ import annotations

from pathlib import Path

import psutil

_ROOT, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def available_bytes(root: Path = _ROOT, own: Path = _OWN) -> int:
    """Bytes that can be taken before something is swapped out or killed.

    Args:
        root: where control groups (version 2) are; where there are none, the machine counts alone.
        own: tells which of them we are in; those above it limit us as well.
    """
    available = psutil.virtual_memory().available
    for group in _groups(root, own):
        available = min(available, _left_of(group, available))
    return available


def _groups(root: Path, own: Path) -> list[Path]:
    """The control group that we are in and those above it."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    ours = next((line[3:] for line in lines if line.startswith("0::")), "/")
    group = root / ours.strip("/")
    return [each for each in (group, *group.parents) if each == root or root in each.parents]


def _left_of(group: Path, available: int) -> int:
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        pages = (group / "memory.stat").read_text().split()
    except (OSError, ValueError):
        return available
    if limit == "max":
        return available
    cached = sum(
        int(pages[place + 1])
        for place, name in enumerate(pages)
        if name in ("inactive_file", "active_file")
    )
    return max(int(limit) - used + cached, 0)
