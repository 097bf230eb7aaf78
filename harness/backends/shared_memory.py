"""Files in /dev/shm that a killed process leaves behind: which are provably ours, and their removal. Standard library.

A file is ours only where a process of our tree was seen to map it and it was not there before the job began; it is
removed only while no process at all maps it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable

ROOT = "/dev/shm"
LOOKS = 4
"""Looks at a new file before it is taken for another's: mapping follows creation at once."""
_MAPPED = re.compile(rb"^\S+ \S+ \S+ \S+ (\d+) +/dev/shm/([^\n/]+)$", re.MULTILINE)


def names() -> set[str]:
    """Every file in /dev/shm."""
    with contextlib.suppress(OSError):
        return set(os.listdir(ROOT))
    return set()


def mapped(pid: int) -> dict[str, int]:
    """Inode by name of the files of /dev/shm that a process maps."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", "rb") as file:
        return {os.fsdecode(name): int(inode) for inode, name in _MAPPED.findall(file.read())}
    return {}


class Segments:
    """The files that one tree of processes made, found while it lives."""

    def __init__(self) -> None:
        self._before = names()
        self._looks: dict[str, int] = {}
        self.owned: dict[str, int] = {}

    def look(self, members: Iterable[int]) -> dict[str, int]:
        """Files newly seen to be ours; reads maps only where a file is new, since that holds their owner up."""
        unknown = {name for name in names() - self._before - self.owned.keys() if self._looks.get(name, 0) < LOOKS}
        if not unknown:
            return {}
        for name in unknown:
            self._looks[name] = self._looks.get(name, 0) + 1
        seen: dict[str, int] = {}
        for pid in members:
            seen.update(mapped(pid))
        fresh = {name: inode for name, inode in seen.items() if name in unknown}
        self.owned.update(fresh)
        return fresh


def made_since(start: float, members: Iterable[int]) -> dict[str, int]:
    """Inode by name of what these processes map and what was not made, or changed, before `start` (Unix seconds)."""
    seen: dict[str, int] = {}
    for pid in members:
        seen.update(mapped(pid))
    return {name: inode for name, inode in seen.items() if _changed_at(name) >= start}


def _changed_at(name: str) -> float:
    with contextlib.suppress(OSError):
        return os.stat(os.path.join(ROOT, name)).st_ctime
    return 0.0


def remove(owned: dict[str, int], pids: Iterable[int]) -> list[str]:
    """Remove those of `owned` that are still the same file and that none of `pids` maps; their names."""
    left = {name: inode for name, inode in owned.items() if _inode(name) == inode}
    if not left:
        return []
    used = {name for pid in pids for name in mapped(pid)}
    removed = []
    for name in sorted(left.keys() - used):
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(ROOT, name))
            removed.append(name)
    return removed


def _inode(name: str) -> int | None:
    with contextlib.suppress(OSError):
        return os.stat(os.path.join(ROOT, name)).st_ino
    return None
