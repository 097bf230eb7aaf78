"""Hash-locked requirement files: what each entry names, and the refusal of any that is not pinned by hash."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

from harness.errors import HarnessError
from harness.installed import normalised
from harness.schema import Frozen

_PINNED = re.compile(
    r"^(?P<name>[A-Za-z0-9][\w.-]*)\s*(\[[^\]]*\])?\s*==\s*(?P<version>[^\s;\\,]+)\s*(?:;\s*(?P<marker>.*?))?$"
)
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})(?![0-9A-Za-z])")


class Requirement(Frozen):
    """One entry of a lock."""

    name: str
    """As indexes compare it."""
    version: str
    marker: str
    """Where it is wanted, empty for everywhere."""
    hashes: frozenset[str]
    """sha256 of each file that may be it, in hex."""


def digest(path: Path) -> str:
    """`sha256:` of the file's bytes."""
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def read(path: Path) -> tuple[Requirement, ...]:
    """The lock's entries; HarnessError naming the first that is not pinned to a version and to hashes."""
    if not path.is_file():
        raise HarnessError(f"there is no lock {path}", "make it with tools/lock")
    return tuple(_requirement(entry, line, path) for line, entry in _entries(path.read_text(encoding="utf-8")))


def _entries(text: str) -> Iterator[tuple[int, str]]:
    """Each entry as one line, and the number of the line where it begins."""
    entry, began = "", 0
    for number, raw in enumerate(text.splitlines(), 1):
        line = re.sub(r"(^|\s)#.*$", "", raw).rstrip()
        began = began if entry else number
        if line.endswith("\\"):
            entry += line[:-1] + " "
            continue
        if (entry + line).strip():
            yield began, (entry + line).strip()
        entry = ""
    if entry.strip():
        yield began, entry.strip()


def _requirement(entry: str, line: int, path: Path) -> Requirement:
    what = entry.split("--hash", 1)[0].strip()
    name = re.split(r"[\s\[=<>!~;@]", what, maxsplit=1)[0] or entry
    match = _PINNED.match(what)
    if match is None or "*" in match["version"]:
        raise HarnessError(
            f"{path}:{line}: {name} is not pinned to one version: {what}", "make the lock with tools/lock"
        )
    hashes = frozenset(_HASH.findall(entry))
    if not hashes:
        raise HarnessError(f"{path}:{line}: {name} has no sha256 in the lock", "make the lock with tools/lock")
    marker = match["marker"] or ""
    return Requirement(name=normalised(match["name"]), version=match["version"], marker=marker, hashes=hashes)
