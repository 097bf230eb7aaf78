"""Where signatures hold: in the payload's `error` events, and in lines of a log."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.logs import Line, split
from harness.schema import Evidence, Role
from harness.triage.signature import Signature, signatures

CONTEXT_LINES = 200
"""How far before a line of a log its traceback may begin."""
MAX_LINE_CHARS = 2_000
MAX_MATCHES = 200
"""Lines of one log that are looked at for one signature."""
QUOTE_CHARS = 400

_RANK_IN_LINE = re.compile(r"\[(?:rank|default|Rank )(\d{1,5})\]|\(Worker_TP(\d{1,5})\b")
_SOURCE = re.compile(r"\braise [A-Za-z_][\w.]*\(")
"""A line of source in a traceback quotes the message before it is said."""
_RANK_IN_FILE = re.compile(r"(?:attempt_\d+/|rank[_-]?)(\d{1,5})\b")


@dataclass(frozen=True)
class Hit:
    """A signature, or an error that none knows, where it was found."""

    signature: Signature | None
    at: tuple[float, int]
    """Unix seconds (infinite where unknown), then the order of reading."""
    rank: int | None
    phase: str | None
    evidence: Evidence
    structured: bool
    """Found in an `error` event, not in free text."""
    kind: str = ""
    """The exception's type."""

    @property
    def role(self) -> Role:
        """An error that no signature knows may have begun it."""
        return self.signature.role if self.signature else "initiating"

    @property
    def failure_class(self) -> str:
        """The class it speaks for."""
        return self.signature.failure_class if self.signature else "app_exception"


def in_events(errors: Sequence[Mapping[str, Any]]) -> list[Hit]:
    """One hit for each `error` event of an observation, in order of time."""
    hits = [_event_hit(error, index) for index, error in enumerate(errors)]
    return sorted(hits, key=lambda hit: hit.at)


def _event_hit(error: Mapping[str, Any], index: int) -> Hit:
    fields = {name: _str(error.get(name)) for name in ("type", "message", "traceback", "phase", "file")}
    found = next((s for s in signatures() if _holds(s, fields)), None)
    text = _quoted(found, fields)
    rank, t, line = error.get("rank"), error.get("t"), error.get("line")
    return Hit(
        signature=found,
        at=(t if isinstance(t, float) else math.inf, index),
        rank=rank if isinstance(rank, int) else None,
        phase=fields["phase"] or None,
        evidence=Evidence(
            file=fields["file"] or "events",
            line=line if isinstance(line, int) else index + 1,
            text=text[:QUOTE_CHARS],
            role=found.role if found else "initiating",
        ),
        structured=True,
        kind=fields["type"],
    )


def _str(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _holds(signature: Signature, fields: Mapping[str, str]) -> bool:
    if signature.phase and fields["phase"] not in signature.phase:
        return False
    if not signature.suits(fields["traceback"]):
        return False
    places = [fields[place] for place in signature.where if place != "log"]
    return any(signature.pattern.search(place) and signature.holds_for(place) for place in places)


def _quoted(signature: Signature | None, fields: Mapping[str, str]) -> str:
    """The line of an error that says it: the one that matched, else the first of its message."""
    lines = [line.strip() for name in ("message", "traceback") for line in fields[name].splitlines() if line.strip()]
    matched = [line for line in lines if signature and signature.pattern.search(line)]
    return next(iter(matched or lines), fields["type"])


def rank_of(line: Line) -> int | None:
    """The rank that a log line names itself, or that its file belongs to."""
    found = _RANK_IN_LINE.search(line.text[:200]) or _RANK_IN_FILE.search(line.file)
    return int(next(group for group in found.groups() if group)) if found else None


def in_log(log_text: str) -> list[Hit]:
    """The first line that each signature holds in, in order of reading; one line speaks for one signature."""
    wanted = [signature for signature in signatures() if "log" in signature.where]
    present = [signature for signature in wanted if signature.pattern.search(log_text)]
    lines = list(split(log_text)) if present else []
    taken: set[int] = set()
    hits = []
    for signature in present:
        for index in _matches(signature, lines):
            if index not in taken:
                taken.add(index)
                if signature.role == "advice":
                    continue
                hits.append(_log_hit(signature, lines[index], index))
                break
    return sorted(hits, key=lambda hit: hit.at)


def _matches(signature: Signature, lines: Sequence[Line]) -> Iterator[int]:
    """Indexes of lines in which the signature holds, its context included."""
    looked_at = 0
    for index, line in enumerate(lines):
        text = line.text[:MAX_LINE_CHARS]
        if not signature.pattern.search(text) or _SOURCE.search(text):
            continue
        looked_at += 1
        around = _traceback_before(lines, index) if signature.looks_around else ""
        if signature.suits(around) and signature.holds_for(text):
            yield index
        if looked_at == MAX_MATCHES:
            return


def _traceback_before(lines: Sequence[Line], index: int) -> str:
    """The last traceback that begins within the lines before one of the same file; empty where there is none."""
    file = lines[index].file
    before = "\n".join(line.text for line in lines[max(0, index - CONTEXT_LINES) : index] if line.file == file)
    began = before.rfind("Traceback (most recent call last)")
    return before[began:] if began >= 0 else ""


def _log_hit(signature: Signature, line: Line, index: int) -> Hit:
    return Hit(
        signature=signature,
        at=(math.inf, index),
        rank=rank_of(line),
        phase=None,
        evidence=Evidence(file=line.file, line=line.number, text=line.text.strip()[:QUOTE_CHARS], role=signature.role),
        structured=False,
    )
