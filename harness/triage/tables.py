"""The table in which torchrun names the rank that failed first."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from harness.logs import Line, split
from harness.schema import Evidence

TABLE_LINES = 12
TOGETHER_S = 5.0
"""torchrun looks at its ranks now and then: of deaths this near to each other it cannot tell which came first."""
ENDED_BY_TORCHRUN = frozenset({-15, -2})

_FIRST = "Root Cause (first observed failure)"
_OTHERS = "Failures:"
_TIME = re.compile(r"^\s*time\s*:\s*(\d{4}-\d\d-\d\d_\d\d:\d\d:\d\d)\b")
_RANK = re.compile(r"^\s*rank\s*:\s*(\d{1,6})\b")
_EXIT = re.compile(r"^\s*exitcode\s*:\s*(-?\d{1,3})\b")


@dataclass(frozen=True)
class Failed:
    """What torchrun observed first (torch/distributed/elastic/multiprocessing/errors)."""

    rank: int
    exit_code: int
    evidence: Evidence
    time: datetime | None = None

    @property
    def signal(self) -> int | None:
        """The signal that ended the rank."""
        return -self.exit_code if self.exit_code < 0 else None


def launcher_table(log_text: str) -> Failed | None:
    """The last such table of `log_text`: several attempts leave several."""
    if _FIRST not in log_text:
        return None
    lines = list(split(log_text))
    heads = [index for index, line in enumerate(lines) if _FIRST in line.text]
    found = (_first_of(lines, head) for head in reversed(heads))
    return next((failed for failed in found if failed), None)


def _first_of(lines: Sequence[Line], head: int) -> Failed | None:
    """What the table at `head` names, or a rank beside it that a signal ended: who lost that peer exits by itself."""
    named = _parsed(lines[head + 1 : head + TABLE_LINES])
    if named is None or named.exit_code < 0:
        return named
    return next((other for other in _others(lines, head) if _killed_with(other, named)), named)


def _others(lines: Sequence[Line], head: int) -> Iterator[Failed]:
    """The further failures, which stand above the first one."""
    start = next((index for index in range(head, -1, -1) if lines[index].text.strip() == _OTHERS), head)
    for index in range(start, head):
        if _TIME.match(lines[index].text[:200]) and (other := _parsed(lines[index : min(index + 6, head)])):
            yield other


def _killed_with(other: Failed, named: Failed) -> bool:
    if other.exit_code >= 0 or other.exit_code in ENDED_BY_TORCHRUN or not (other.time and named.time):
        return False
    return abs((other.time - named.time).total_seconds()) <= TOGETHER_S


def _parsed(lines: Sequence[Line]) -> Failed | None:
    rank = next((int(match[1]) for line in lines if (match := _RANK.match(line.text[:200]))), None)
    code = next(((int(match[1]), line) for line in lines if (match := _EXIT.match(line.text[:200]))), None)
    if rank is None or code is None:
        return None
    exit_code, line = code
    evidence = Evidence(file=line.file, line=line.number, text=line.text.strip()[:400], role="advice")
    time = next((match[1] for line in lines if (match := _TIME.match(line.text[:200]))), None)
    return Failed(rank, exit_code, evidence, _moment(time))


def _moment(text: str | None) -> datetime | None:
    try:
        return datetime.strptime(text, "%Y-%m-%d_%H:%M:%S") if text else None
    except ValueError:
        return None
