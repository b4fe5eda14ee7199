"""How much memory there is to be had, the limit of our container included."""

from __future__ import annotations

from pathlib import Path

import psutil

_GROUP = Path("/sys/fs/cgroup")


def available_bytes(group: Path = _GROUP) -> int:
    """Bytes that can be taken before something is swapped out or killed.

    Args:
        group: our control group (version 2); where there is none, the machine's memory counts.
    """
    available = psutil.virtual_memory().available
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
    return min(available, max(int(limit) - used + cached, 0))
