"""From what all files say to one verdict: cause before consequence.

Order: hardware and kernel; an end from outside before which nothing failed; the first initiating event in time; the
Flight Recorder; what survivors saw; errors that only pass on others; a crash; ranks that fell silent; a good end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.schema import ClaimStatus, Culprit, Evidence, LogVerdict, NextStep, Role, TimelineEvent
from harness.triage import advice, blame, disagree, recorder
from harness.triage.blame import NOBODY, Blame
from harness.triage.facts import Event, Facts, quote
from harness.triage.numbers import with_steps
from harness.triage.signature import kinds
from harness.triage.survival import survived, troubled_after
from harness.triage.vocabulary import clock

MAX_EVIDENCE = 8
MAX_TIMELINE = 24
CHAINED_LINES = 150
"""An exception that no signature knows, this close before one that is known, belongs to it."""
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


def judge(files: Files) -> LogVerdict:
    """The verdict; `unknown` where nothing tells."""
    return next(found for rule in RULES if (found := rule(files)))


# ---------------------------------------------------------------- the rules, in order


def _kernel(files: Files) -> LogVerdict | None:
    said = [one for one in files.events if one.signature and one.signature.kernel]
    hard = [one for one in said if one.failure_class != "cuda_illegal"]
    return _from_event(files, hard[0], "established") if hard else None


def _ended_from_outside(files: Files) -> LogVerdict | None:
    ended = [one for one in files.events if one.failure_class == "terminated_external"]
    if not ended:
        return None
    causes = [*_initiating(files), *_cascades(files), *_crashes(files)]
    if any(files.before(cause, ended[0]) for cause in causes):
        return None
    if (odd := blame.stopped_early(files.facts)) and _stopped_behind(files.facts, odd):
        return _silence(files, odd, ended)
    return _from_event(files, ended[0], "established", NOBODY)


def _initiating(files: Files) -> list[Event]:
    """Events that may have begun it, without those that the program evidently survived."""
    found = [one for one in files.events if one.role == "initiating" and not (one.signature and one.signature.weak)]
    found = [one for one in found if one.failure_class != "terminated_external"]
    return [one for one in found if not _survived(files, one, found)]


def _survived(files: Files, event: Event, others: Sequence[Event]) -> bool:
    """Whether the program evidently went on after this."""
    return survived(next(one for one in files.facts if one.file == event.file), event, others)


def _first(files: Files, candidates: Sequence[Event]) -> Event:
    """The first in time; an exception that no signature knows gives way to a known one of the same chain."""
    first = candidates[0]
    for other in candidates:
        near = other.file == first.file and other.line - first.line <= CHAINED_LINES
        if near and other.who.key == first.who.key and _says_more(other, first):
            return other
    return first


def _says_more(other: Event, first: Event) -> bool:
    """Whether a later line of a chain names the cause better: a known error, NCCL's last one, a sought adapter."""
    if first.signature is None:
        return other.signature is not None
    if first.kind.endswith("ValidationError"):  # pydantic's first line names only the field
        return other.signature is not None and 0 < other.line - first.line <= 3
    if first.failure_class == "nccl_invalid_usage":  # NCCL's own last error stands some lines below its code
        return other.failure_class.startswith("nccl_") and other.failure_class != first.failure_class
    return first.failure_class == "hub_access" and other.failure_class == "peft_config"


def _initiated(files: Files) -> LogVerdict | None:
    candidates = _initiating(files)
    if not candidates:
        return None
    first = _first(files, candidates)
    status: ClaimStatus = "established" if first.signature else "supported"
    return _from_event(files, first, status)


def _crashes(files: Files) -> list[Event]:
    crashes = [one for facts in files.facts for one in facts.crashes if one.attempt == facts.attempts]
    return [one for one in crashes if _HARD_CRASH.search(one.text)]


def _crashed(files: Files) -> LogVerdict | None:
    crashes = _crashes(files)
    if not crashes:
        return None
    return _sizes_differ(files, crashes) or _from_event(files, crashes[0], "supported")


def _sizes_differ(files: Files, crashes: Sequence[Event] = ()) -> LogVerdict | None:
    """Ranks that say the same sentence with another size, beside a failure in communication."""
    for facts in files.facts:
        if said := disagree.sizes(facts):
            lines = [Evidence(file=facts.file, line=line, text=quote(text), role="initiating") for line, text in said]
            return _verdict(files, "coll_mismatch", "hypothesis", NOBODY,
                            [*lines, *(_evidence(one, "cascade") for one in crashes[:2])])  # fmt: skip
    return None


def _recorded(files: Files) -> LogVerdict | None:
    found = recorder.compare(files.dumps)
    if found is None:
        return None
    name = "coll_mismatch" if found.kind == "mismatch" else "coll_timeout"
    whom = Blame(Culprit(rank=found.ranks[0]), "supported") if len(found.ranks) == 1 else NOBODY
    verdict = _verdict(files, name, "supported", whom, [_evidence(one) for one in _cascades(files)[:MAX_EVIDENCE]])
    said = f"{kinds()[name].summary} Flight Recorder: {found.sentence} ({found.file})."
    return verdict.model_copy(update={"summary": said})


def _cascades(files: Files) -> list[Event]:
    found = [one for one in files.events if one.role == "cascade" and not (one.signature and one.signature.weak)]
    return [one for one in found if not _survived(files, one, found)]


def _communication(files: Files) -> LogVerdict | None:
    found = _cascades(files)
    if not found:
        return None
    lost = [one for one in found if one.failure_class == "peer_lost"]
    waited = [one for one in found if one.failure_class == "coll_timeout"]
    killed = [one for one in found if one.failure_class == "oom_host" and not _after(one, waited)]
    if killed:
        whom = blame.for_lost_peer(found, files.facts)
        return _from_event(files, lost[0] if lost else killed[0], "supported", whom)
    if differ := _collectives_differ(files, found):
        return differ
    first = found[0]
    if first.failure_class == "coll_timeout":
        return _from_event(files, first, "supported", blame.for_timeout(found, files.facts))
    if first.failure_class == "peer_lost":
        return _from_event(files, first, "supported", blame.for_lost_peer(found, files.facts))
    return _from_event(files, first, "supported", NOBODY)


def _after(killed: Event, waited: Sequence[Event]) -> bool:
    """Whether a process was killed only after a time-out: then whoever ended the rest did it."""
    return any(
        one.line < killed.line if one.file == killed.file else one.t is not None and one.t < (killed.t or 0.0)
        for one in waited
    )


def _collectives_differ(files: Files, found: Sequence[Event]) -> LogVerdict | None:
    """Two ranks that name another operation or size at the same number, or gave up in different collectives."""
    status = disagree.collectives(files.facts)
    lines = [_evidence(one, "initiating") for one in found[:4]]
    return _verdict(files, "coll_mismatch", status, NOBODY, lines) if status else None


def _silence(files: Files, odd: Sequence[int], ended: Sequence[Event] = ()) -> LogVerdict:
    """Ranks that stopped before the others: something was waited for."""
    lines = [Evidence(file=facts.file, line=mark.line, text=mark.text, role="initiating")
             for facts in files.facts for rank, mark in facts.marks.items() if rank in odd]  # fmt: skip
    whom = Blame(Culprit(rank=odd[0]), "hypothesis") if len(odd) == 1 else NOBODY
    verdict = _verdict(files, "coll_timeout", "hypothesis", whom, [*lines[:4], *(_evidence(one) for one in ended[:2])])
    said = f"Ranks {', '.join(map(str, odd[:8]))} fell silent before the others, which then waited."
    return verdict.model_copy(update={"summary": said})


def _stopped_behind(facts: Sequence[Facts], odd: Sequence[int]) -> bool:
    """Whether the others' last marks come later in the file than those of the silent ranks."""
    marks = {rank: mark for one in facts for rank, mark in one.marks.items() if rank >= 0}
    return len(facts) > 1 or min(marks[rank].line for rank in marks if rank not in odd) > max(
        marks[rank].line for rank in odd
    )


def _fell_silent(files: Files) -> LogVerdict | None:
    odd = blame.stopped_early(files.facts)
    if not odd or any(facts.good_ends for facts in files.facts) or not _stopped_behind(files.facts, odd):
        return None
    return _silence(files, odd)


def _table_only(files: Files) -> LogVerdict | None:
    """What torchrun says, where no line of the failed rank is there."""
    for facts in files.facts:
        for rank, code, host, line, text, attempt in facts.tables:
            if attempt == facts.attempts and code not in (None, 0):
                evidence = Evidence(file=facts.file, line=line, text=text, role="initiating")
                whom = Blame(Culprit(rank=rank, host=host), "supported")
                return _verdict(files, "app_exception", "supported", whom, [evidence])
    return None


def _weak(files: Files) -> LogVerdict | None:
    """Errors that count only where nothing better is found, such as NCCL's own."""
    named = [one for one in _weak_events(files) if one.failure_class != "app_exception"]
    return _from_event(files, named[0], "supported", NOBODY) if named else None


def _weak_events(files: Files) -> list[Event]:
    weak = [one for one in files.events if one.signature and one.signature.weak]
    return [one for one in weak if not _survived(files, one, weak)]


def _passed_on(files: Files) -> LogVerdict | None:
    """Errors that only say that another process failed."""
    weak = _weak_events(files)
    return _from_event(files, weak[0], "hypothesis", NOBODY) if weak else None


def _soft_crash(files: Files) -> LogVerdict | None:
    crashes = [one for facts in files.facts for one in facts.crashes if one.attempt == facts.attempts]
    return _from_event(files, crashes[0], "supported") if crashes else None


def _teardown(files: Files) -> LogVerdict | None:
    ended = (one for one in files.events if one.failure_class == "terminated_external")
    return _from_event(files, first, "supported", NOBODY) if (first := next(ended, None)) else None


def _good(files: Files) -> LogVerdict | None:
    """A good end, where the log goes on no further; a server that answers, or a healthy report of the hardware."""
    every = [(facts, end) for facts in files.facts for end in facts.good_ends if end[2] == facts.attempts]
    ends = [(facts, end) for facts, end in every if _at_the_end(facts, end[0])]
    calm = [facts for facts in files.facts if not troubled_after(facts)]
    serving = [(facts, end) for facts in calm for end in facts.serving if end[2] == facts.attempts]
    done = [(facts, (mark.line, mark.text)) for facts in calm for mark in facts.marks.values()
            if _all_steps(facts) and mark.attempt == facts.attempts]  # fmt: skip
    health = [(facts, said) for facts in files.facts for said in facts.health]
    found = ends or serving or done or health
    if not found:
        return None
    status: ClaimStatus = "established" if ends else "supported"
    lines = [Evidence(file=facts.file, line=said[0], text=quote(said[1]), role="advice") for facts, said in found[-3:]]
    return _verdict(files, "no_failure", status, NOBODY, lines)


def _at_the_end(facts: Facts, line: int) -> bool:
    """Whether no step follows: what is said to be complete while steps go on is not the run."""
    last = max((mark.line for mark in facts.marks.values() if mark.attempt == facts.attempts), default=0)
    return line >= last or _all_steps(facts)


def _all_steps(facts: Facts) -> bool:
    """Whether the last count of steps is at its total."""
    return facts.total is not None and facts.total[0] >= facts.total[1] > 0


def _unknown(files: Files) -> LogVerdict:
    lines = [Evidence(file=facts.file, line=line, text=quote(text), role="advice")
             for facts in files.facts for line, text in list(facts.telling)[-3:] if text]  # fmt: skip
    return _verdict(files, "unknown", "unknown", NOBODY, lines[:MAX_EVIDENCE])


RULES: tuple[Callable[[Files], LogVerdict | None], ...] = (
    _kernel, _ended_from_outside, _initiated, _crashed, _recorded, _communication, _weak, _table_only, _passed_on,
    _soft_crash, _teardown, _fell_silent, _good, _unknown,
)  # fmt: skip


# ---------------------------------------------------------------- parts of a verdict


def _from_event(files: Files, first: Event, status: ClaimStatus, whom: Blame | None = None) -> LogVerdict:
    events = [*files.events, *(_crashes(files) if first.kind == "" else ())]
    same = [one for one in events if one.failure_class == first.failure_class and one.role == first.role]
    if first not in same:
        same = [first, *same]
    taken = set(map(id, same))
    rest = [one for one in files.events if id(one) not in taken and one.role != "teardown"]
    whom = blame.for_event(first, same, files.facts) if whom is None else whom
    quoted = [first, *_one_per_rank(one for one in same if one is not first), *rest[:2]]
    return _verdict(files, first.failure_class, status, whom, [_evidence(one) for one in quoted], first)


def _one_per_rank(events: object) -> list[Event]:
    found: dict[object, Event] = {}
    for one in events:  # type: ignore[attr-defined]
        found.setdefault((one.file, one.who.rank), one)
    return list(found.values())[:4]


def _evidence(event: Event, role: Role | None = None) -> Evidence:
    return Evidence(file=event.file, line=event.line, text=event.text, role=role or event.role)


def _verdict(files: Files, name: str, status: ClaimStatus, whom: Blame, evidence: Sequence[Evidence],
             first: Event | None = None) -> LogVerdict:  # fmt: skip
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
