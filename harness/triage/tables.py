"""The table in which torchrun names the rank that failed first."""

from __future__ import annotations

import re
from dataclasses import dataclass

from harness.logs import Line, split
from harness.schema import Evidence

TABLE_LINES = 12

_FIRST = "Root Cause (first observed failure)"
_RANK = re.compile(r"^\s*rank\s*:\s*(\d{1,6})\b")
_EXIT = re.compile(r"^\s*exitcode\s*:\s*(-?\d{1,3})\b")


@dataclass(frozen=True)
class Failed:
    """What torchrun observed first (torch/distributed/elastic/multiprocessing/errors)."""

    rank: int
    exit_code: int
    evidence: Evidence

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
    found = (_parsed(lines[head + 1 : head + TABLE_LINES]) for head in reversed(heads))
    return next((failed for failed in found if failed), None)


def _parsed(lines: list[Line]) -> Failed | None:
    rank = next((int(match[1]) for line in lines if (match := _RANK.match(line.text[:200]))), None)
    code = next(((int(match[1]), line) for line in lines if (match := _EXIT.match(line.text[:200]))), None)
    if rank is None or code is None:
        return None
    exit_code, line = code
    evidence = Evidence(file=line.file, line=line.number, text=line.text.strip()[:400], role="advice")
    return Failed(rank, exit_code, evidence)
