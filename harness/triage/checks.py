"""Checks of the numbers in a line, for signatures whose words alone do not decide."""

from __future__ import annotations

import re
from collections.abc import Callable

LARGE_SHARE = 0.25
"""Of a GPU's memory: what others must hold at least before they count as the cause."""

_UNIT_GIB = {"KiB": 1 / 1024**2, "MiB": 1 / 1024, "GiB": 1.0, "bytes": 1 / 1024**3}
_SIZE = r"(\d[\d.]*) (KiB|MiB|GiB|bytes)"
_OTHERS = re.compile(rf"Process (\d+) has {_SIZE} memory in use")
_OWN = re.compile(rf"[Tt]his process has {_SIZE} memory in use")
_BY_TORCH = re.compile(rf"{_SIZE} is allocated by PyTorch")
_TOTAL = re.compile(rf"total capac\w+ of {_SIZE}")


def _gib(number: str, unit: str) -> float:
    try:
        return float(number) * _UNIT_GIB[unit]
    except ValueError:
        return 0.0


def others(text: str) -> list[tuple[int, float]]:
    """Process id and GiB of the other processes that PyTorch's message lists.

    Where it does not say what this process has, the one that holds what PyTorch allocated is this process itself:
    inside a container its id is another.
    """
    listed = [(int(pid), _gib(number, unit)) for pid, number, unit in _OTHERS.findall(text)]
    allocated = _BY_TORCH.search(text)
    if _OWN.search(text) or not listed:
        return listed
    own = max(listed, key=lambda one: one[1])
    if not allocated or own[1] >= _gib(*allocated.groups()):
        listed.remove(own)
    return listed


def foreign_memory(text: str) -> bool:
    """Whether other processes hold so much of the GPU that they, not the size of the job, are the cause."""
    held = sum(size for _, size in others(text))
    total, own = _TOTAL.search(text), _OWN.search(text)
    least = LARGE_SHARE * _gib(*total.groups()) if total else 1.0
    return held > least or (own is not None and held > _gib(*own.groups()) > 0)


CHECKS: dict[str, Callable[[str], bool]] = {"foreign_memory": foreign_memory}
