"""Checks of the numbers in a line, for signatures whose words alone do not decide."""

from __future__ import annotations

import re
from collections.abc import Callable

LARGE_SHARE = 0.25
"""Of a GPU's memory: what others must hold at least before they count as the cause."""

CONTEXT_GIB = 2.0
"""What a process may hold beside PyTorch's memory: context, kernels, NCCL's buffers."""

UNKNOWN_GIB = 1e6
"""What NVML cannot tell of another container's process, PyTorch prints as 2**64 bytes."""

_UNIT_GIB = {"KiB": 1 / 1024**2, "MiB": 1 / 1024, "GiB": 1.0, "bytes": 1 / 1024**3}
_SIZE = r"(\d[\d.]*) (KiB|MiB|GiB|bytes)"
_OTHERS = re.compile(rf"Process (\d+) has {_SIZE} memory in use")
_OWN = re.compile(rf"[Tt]his process has {_SIZE} memory in use")
_BY_TORCH = re.compile(rf"{_SIZE} is allocated by PyTorch")
_UNUSED = re.compile(rf"{_SIZE} is reserved by PyTorch but unallocated")
_FREE = re.compile(rf"of which {_SIZE} is free")
_OLD = re.compile(
    rf"{_SIZE} total capacity; {_SIZE} already allocated; {_SIZE} free; {_SIZE} reserved in total by PyTorch"
)
_TOTAL = re.compile(rf"total capac\w+ of {_SIZE}")
_ASKED = re.compile(rf"Tried to allocate {_SIZE}")


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
    said = [(int(pid), _gib(number, unit)) for pid, number, unit in _OTHERS.findall(text)]
    listed = [one for one in said if one[1] < UNKNOWN_GIB]
    allocated = _BY_TORCH.search(text)
    if _OWN.search(text) or not listed:
        return listed
    least = _gib(*allocated.groups()) if allocated else 0.0
    may_be_own = [one for one in listed if one[1] >= least]
    if may_be_own:  # what PyTorch holds and a context; of several the one that fits closest
        listed.remove(min(may_be_own, key=lambda one: one[1]) if allocated else max(may_be_own, key=lambda one: one[1]))
    return listed


def foreign_memory(text: str) -> bool:
    """Whether other processes hold so much of the GPU that they, not the size of the job, are the cause."""
    if enough_free(text):
        return False
    held = max(sum(size for _, size in others(text)), unaccounted(text))
    total, own = _TOTAL.search(text), _OWN.search(text)
    least = LARGE_SHARE * _gib(*total.groups()) if total else 1.0
    return held > least or (own is not None and held > _gib(*own.groups()) > 0)


def enough_free(text: str) -> bool:
    """Whether the GPU had what was asked for: then a limit of this process, or memory in pieces, is the cause."""
    asked, free = _ASKED.search(text), _FREE.search(text)
    return bool(asked and free) and _gib(*free.groups()) > _gib(*asked.groups())  # type: ignore[union-attr]


def unaccounted(text: str) -> float:
    """GiB of the GPU that are neither free nor PyTorch's, where the message lists no process; 0 where numbers lack."""
    old, total, free = _OLD.search(text), _TOTAL.search(text), _FREE.search(text)
    if old:
        size, _, left, reserved = (_gib(*old.groups()[at : at + 2]) for at in (0, 2, 4, 6))
    elif total and free and (own := _OWN.search(text)) and not _OTHERS.search(text):
        size, left, reserved = _gib(*total.groups()), _gib(*free.groups()), _gib(*own.groups())
    elif total and free and _BY_TORCH.search(text) and "memory in use" not in text:
        size, left = _gib(*total.groups()), _gib(*free.groups())
        reserved = sum(_gib(*found.groups()) for form in (_BY_TORCH, _UNUSED) if (found := form.search(text)))
    else:
        return 0.0
    rest = size - left - reserved
    return rest if rest > LARGE_SHARE * size + CONTEXT_GIB else 0.0


CHECKS: dict[str, Callable[[str], bool]] = {"foreign_memory": foreign_memory}
