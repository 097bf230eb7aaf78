"""What is kept of one file of logs: events, marks of progress, ends, tables of launchers, numbers."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from harness.schema import Role
from harness.scrub import scrub
from harness.triage import vocabulary as words
from harness.triage.signature import Signature

QUOTE_CHARS = 400
LAST_LINES = 12


@dataclass(frozen=True)
class Event:
    """A line that matched, or an exception that no signature knows."""

    failure_class: str
    role: Role
    signature: Signature | None
    file: str
    line: int
    text: str
    who: words.Who
    gpu: str | None
    t: float | None
    attempt: int
    kind: str = ""
    """The exception's type; empty where it is no exception."""
    framed: bool = False
    """Whether its traceback stands before it."""


@dataclass
class Mark:
    """The last sign of progress of one rank."""

    step: int
    line: int
    text: str
    t: float | None
    attempt: int


@dataclass
class Facts:
    """All that is kept of one file; its size does not grow with the file's."""

    file: str
    events: list[Event] = field(default_factory=list)
    marks: dict[int, Mark] = field(default_factory=dict)
    last_work: dict[int, tuple[int, int, str]] = field(default_factory=dict)
    """Sequence number, elements and operation of the last collective that each rank names as failed."""
    completed: dict[int, int] = field(default_factory=dict)
    tables: list[tuple[int, int | None, str | None, int, str, int]] = field(default_factory=list)
    """Rank, exit code, host, line, text, attempt: what torchrun saw fail first."""
    good_ends: list[tuple[int, str, int]] = field(default_factory=list)
    serving: list[tuple[int, str, int]] = field(default_factory=list)
    health: list[tuple[int, str]] = field(default_factory=list)
    numbers: dict[str, str] = field(default_factory=dict)
    ranks: set[int] = field(default_factory=set)
    world: int | None = None
    nccl_ranks: dict[str, int] = field(default_factory=dict)
    sized: dict[str, dict[int, tuple[tuple[str, ...], int, str]]] = field(default_factory=dict)
    """Sentences with a size in them: template -> rank -> its numbers, line, text."""
    crashes: list[Event] = field(default_factory=list)
    broken_off: Event | None = None
    """The last frame of a traceback whose error does not follow, where nothing shows that the run went on."""
    failed: set[int] = field(default_factory=set)
    """Ranks that torchrun lists as failed."""
    closed: set[str] = field(default_factory=set)
    """Processes that torchrun ended because another had failed."""
    listed: set[str] = field(default_factory=set)
    """Processes in torchrun's list of failures."""
    asked: dict[int, str] = field(default_factory=dict)
    """The collective that each rank was in when it gave up, by the name of PyTorch's function."""
    telling: deque[tuple[int, str]] = field(default_factory=lambda: deque(maxlen=LAST_LINES))
    total: tuple[int, int] | None = None
    attempts: int = 1


def quote(text: str, at: int = 0) -> str:
    """The part of a line that a person should read, from its start or, in a long one, from shortly before `at`."""
    start = max(0, at - QUOTE_CHARS // 4) if at > QUOTE_CHARS - 100 else 0
    return scrub(text[start : start + QUOTE_CHARS]).strip()
