"""What all files say, and a verdict made of it: class, culprit, quoted lines, next step, timeline."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from harness.schema import ClaimStatus, Evidence, LogVerdict, NextStep, Role, TimelineEvent
from harness.triage import advice, blame, recorder
from harness.triage.blame import Blame
from harness.triage.facts import Event, Facts
from harness.triage.numbers import with_steps
from harness.triage.signature import kinds
from harness.triage.vocabulary import clock

MAX_EVIDENCE = 8
MAX_TIMELINE = 24
_HARD_CRASH = re.compile(
    r"egmentation fault|egfault enc|SIGSEGV|signal 11\b|(?<![\w.:-])(?:-11|139)\b|exitcode\W+-[478]\b"
    r"|error: (?:Bus|Illegal)"
)


@dataclass(frozen=True)
class Files:
    """All that a verdict may look at."""

    facts: tuple[Facts, ...]
    dumps: tuple[recorder.Dump, ...] = ()
    notes: tuple[str, ...] = ()

    def order(self, event: Event) -> tuple[float, int, int]:
        """Sorts events as they happened: by time where it is known, else as they stand in the files."""
        index = next(number for number, facts in enumerate(self.facts) if facts.file == event.file)
        return (event.t if event.t is not None else math.inf, index, event.line)

    def before(self, first: Event, second: Event) -> bool:
        """Whether `first` happened before `second`; in one file the order of lines decides."""
        if first.file == second.file:
            return first.line < second.line
        if first.t is None or second.t is None:
            return True
        return first.t <= second.t

    @property
    def events(self) -> list[Event]:
        """Events of the last attempt that says anything."""
        recent = [one for facts in self.facts for one in facts.events if one.attempt == facts.attempts]
        ended = any(end[2] == facts.attempts for facts in self.facts for end in (*facts.good_ends, *facts.serving))
        if not recent and not ended:
            recent = [one for facts in self.facts for one in facts.events]
        if len(self.facts) == 1:
            return recent
        return sorted(recent, key=self.order)


def hard_crashes(files: Files) -> list[Event]:
    """Crashes of the last attempt whose text alone tells of one."""
    crashes = [one for facts in files.facts for one in facts.crashes if one.attempt == facts.attempts]
    return [one for one in crashes if _HARD_CRASH.search(one.text)]


def from_event(files: Files, first: Event, status: ClaimStatus, whom: Blame | None = None) -> LogVerdict:
    """The verdict that `first` decides; whom it blames is found out where it is not given."""
    events = [*files.events, *(hard_crashes(files) if first.kind == "" else ())]
    same = [one for one in events if one.failure_class == first.failure_class and one.role == first.role]
    if first not in same:
        same = [first, *same]
    taken = set(map(id, same))
    rest = [one for one in files.events if id(one) not in taken and one.role != "teardown"]
    whom = blame.for_event(first, same, files.facts) if whom is None else whom
    quoted = [first, *_one_per_rank(one for one in same if one is not first), *rest[:2]]
    return made(files, first.failure_class, status, whom, [as_evidence(one) for one in quoted], first)


def _one_per_rank(events: object) -> list[Event]:
    found: dict[object, Event] = {}
    for one in events:  # type: ignore[attr-defined]
        found.setdefault((one.file, one.who.rank), one)
    return list(found.values())[:4]


def as_evidence(event: Event, role: Role | None = None) -> Evidence:
    """An event as it is quoted."""
    return Evidence(file=event.file, line=event.line, text=event.text, role=role or event.role)


def made(files: Files, name: str, status: ClaimStatus, whom: Blame, evidence: Sequence[Evidence],
             first: Event | None = None) -> LogVerdict:  # fmt: skip
    """A verdict of class `name`, with all that is told beside it."""
    kind = kinds()[name]
    unique = list({(one.file, one.line, one.text): one for one in evidence if one.text}.values())
    return LogVerdict(
        failure_class=name,
        summary=_summary(kind.summary, name, first),
        culprit=whom.culprit,
        class_status=status,
        culprit_status=whom.status,
        cause_status=_cause(name, status, first),
        evidence=tuple(unique[:MAX_EVIDENCE]),
        next=_next(files, name, whom),
        timeline=_timeline(files),
        attempts=max((facts.attempts for facts in files.facts), default=1),
        earlier=_earlier(files),
        files=len(files.facts) + len(files.dumps),
        notes=files.notes,
    )


def _summary(text: str, name: str, first: Event | None) -> str:
    if first and first.signature and first.signature.status != "established":
        return first.signature.summary
    return f"{text[:-1]}: {first.text[:160]}" if name == "app_exception" and first else text


def _cause(name: str, status: ClaimStatus, first: Event | None) -> ClaimStatus:
    """How sure the reason behind the class is: symptoms name none, a kernel's word or a signature supports one."""
    if name in ("unknown", "no_failure", "coll_timeout", "peer_lost", "nccl_unhandled"):
        return "unknown"
    return "supported" if status == "established" and first and first.signature else "hypothesis"


def _next(files: Files, name: str, whom: Blame) -> NextStep:
    stated: dict[str, str] = {}
    for facts in files.facts:
        stated |= facts.numbers
    known = with_steps(stated)
    if whom.culprit:
        parts = {"culprit_rank": whom.culprit.rank, "culprit_host": whom.culprit.host, "culprit_gpu": whom.culprit.gpu}
        known |= {key: value for key, value in parts.items() if value is not None}
    kind = kinds()[name]
    return NextStep(step=advice.first(kind.next, known), rung=kind.rung, why=kind.why, cost=kind.cost)


def _timeline(files: Files) -> tuple[TimelineEvent, ...]:
    """The first event of each class, role and rank, as they happened."""
    found: dict[tuple[object, ...], Event] = {}
    for one in files.events:
        found.setdefault((one.failure_class, one.role, one.who.rank), one)
    return tuple(
        TimelineEvent(time=clock(one.t), rank=one.who.rank, host=one.who.host, failure_class=one.failure_class,
                      role=one.role, file=one.file, line=one.line, text=one.text[:200])
        for one in list(found.values())[:MAX_TIMELINE]
    )  # fmt: skip


def _earlier(files: Files) -> tuple[str, ...]:
    old = [
        one
        for facts in files.facts
        for one in facts.events
        if one.attempt < facts.attempts and one.role == "initiating"
    ]
    return tuple(dict.fromkeys(one.failure_class for one in old))
