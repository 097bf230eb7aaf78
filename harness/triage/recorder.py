"""Flight Recorder dumps (torch.distributed's trace of collectives): plain data in a pickle that is not trusted.

The unpickler admits dictionaries, lists, tuples, strings and numbers; whatever names a class or function is refused,
so that nothing in a dump is ever called. JSON dumps have the same fields.
"""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

MAX_DUMP_BYTES = 256 << 20
_RANK_IN_NAME = re.compile(r"(\d{1,6})(?:\.\w{1,8})?$")


@dataclass(frozen=True)
class Call:
    """One collective as one rank recorded it."""

    group: str
    number: int
    operation: str
    sizes: str
    state: str


@dataclass(frozen=True)
class Dump:
    """What one rank recorded."""

    file: str
    rank: int
    calls: tuple[Call, ...]

    def last(self, group: str) -> int:
        """The highest number this rank reached in a group."""
        return max((call.number for call in self.calls if call.group == group), default=-1)


class _Plain(pickle.Unpickler):
    """Admits nothing but plain data."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a dump may not name {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("a dump may not refer to other objects")


def looks_like_dump(head: bytes) -> bool:
    """Whether a file may be a pickle or a JSON dump of the recorder."""
    return (head[:1] == b"\x80" and len(head) > 1 and head[1] in range(2, 6)) or (
        head.lstrip()[:1] == b"{" and b'"entries"' in head
    )


def read(file: str, rank: int | None, blocks: Iterable[bytes]) -> Dump | None:
    """The dump in a file, or None where it holds something else."""
    content = bytearray()
    for block in blocks:
        content += block
        if len(content) > MAX_DUMP_BYTES:
            return None
    try:
        loaded = json.loads(content) if content.lstrip()[:1] == b"{" else _Plain(io.BytesIO(bytes(content))).load()
        return _dump(file, rank, loaded)
    except (pickle.UnpicklingError, ValueError, TypeError, KeyError, AttributeError, IndexError, EOFError, ImportError,
            RecursionError, MemoryError, OverflowError):  # fmt: skip
        return None


def _dump(file: str, rank: int | None, loaded: Any) -> Dump | None:
    if not isinstance(loaded, dict) or not isinstance(loaded.get("entries"), list):
        return None
    if rank is None:
        named = _RANK_IN_NAME.search(file)
        rank = loaded["rank"] if isinstance(loaded.get("rank"), int) else int(named[1]) if named else 0
    return Dump(file, rank, tuple(_call(one) for one in loaded["entries"] if isinstance(one, dict)))


def _call(entry: dict[str, Any]) -> Call:
    group = entry.get("process_group") or entry.get("pg_id") or 0
    number = entry.get("collective_seq_id", entry.get("seq_id", 0))
    return Call(
        group=str(group)[:100],
        number=number if isinstance(number, int) else 0,
        operation=str(entry.get("profiling_name", ""))[:100],
        sizes=str(entry.get("input_sizes", ""))[:200],
        state=str(entry.get("state", ""))[:20],
    )


@dataclass(frozen=True)
class Disagreement:
    """What the dumps of several ranks show when laid side by side."""

    kind: str
    """`missing`: ranks that did not join; `mismatch`: ranks that asked for another operation or size."""
    ranks: tuple[int, ...]
    sentence: str
    file: str


def compare(dumps: Iterable[Dump]) -> Disagreement | None:
    """The first number at which ranks of a group differ, or those that stopped short; None where they agree."""
    known = sorted(dumps, key=lambda dump: dump.rank)
    groups = sorted({call.group for dump in known for call in dump.calls})
    return next((found for group in groups if (found := _in_group(group, known))), None) if len(known) > 1 else None


def _in_group(group: str, dumps: list[Dump]) -> Disagreement | None:
    members = [dump for dump in dumps if any(call.group == group for call in dump.calls)]
    asked: dict[int, dict[int, Call]] = {}
    for dump in members:
        for call in dump.calls:
            if call.group == group:
                asked.setdefault(call.number, {})[dump.rank] = call
    for number, calls in sorted(asked.items()):
        if len({(call.operation, call.sizes) for call in calls.values()}) > 1:
            return _mismatch(group, number, calls, members)
    last = {dump.rank: dump.last(group) for dump in members}
    behind = tuple(rank for rank, number in last.items() if number < max(last.values()))
    if not behind:
        return None
    front = max(last.values())
    sentence = f"group {group}: ranks {', '.join(map(str, behind))} did not join collective {front}"
    return Disagreement("missing", behind, sentence, next(dump.file for dump in members if dump.rank == behind[0]))


def _mismatch(group: str, number: int, calls: dict[int, Call], members: list[Dump]) -> Disagreement:
    by_call: dict[tuple[str, str], list[int]] = {}
    for rank, call in sorted(calls.items()):
        by_call.setdefault((call.operation, call.sizes), []).append(rank)
    fewest = min(by_call.values(), key=len)
    odd = tuple(fewest) if len(fewest) < len(calls) / 2 else ()
    said = "; ".join(f"ranks {', '.join(map(str, ranks))}: {name} {sizes}" for (name, sizes), ranks in by_call.items())
    return Disagreement("mismatch", odd, f"group {group}, collective {number}: {said}", members[0].file)
