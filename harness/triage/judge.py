"""From what all files say to one verdict: cause before consequence.

Order: hardware and kernel; an end from outside before which nothing failed; the first initiating event in time; the
Flight Recorder; what survivors saw; errors that only pass on others; a crash; ranks that fell silent; a good end; a
traceback that breaks off before it says its error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from harness.schema import ClaimStatus, Culprit, Evidence, LogVerdict
from harness.triage import blame, disagree, recorder
from harness.triage.blame import NOBODY, Blame
from harness.triage.facts import Event, Facts, quote
from harness.triage.signature import kinds
from harness.triage.survival import of_the_program, survived, troubled_after
from harness.triage.told import MAX_EVIDENCE, Files, as_evidence, from_event, hard_crashes, made

CHAINED_LINES = 150
"""An exception that no signature knows, this close before one that is known, belongs to it."""


def judge(files: Files) -> LogVerdict:
    """The verdict; `unknown` where nothing tells."""
    return next(found for rule in RULES if (found := rule(files)))


# ---------------------------------------------------------------- the rules, in order


def _kernel(files: Files) -> LogVerdict | None:
    said = [one for one in files.events if one.signature and one.signature.kernel]
    hard = [one for one in said if one.failure_class != "cuda_illegal"]
    return from_event(files, hard[0], "established") if hard else None


def _ended_from_outside(files: Files) -> LogVerdict | None:
    ended = [one for one in files.events if one.failure_class == "terminated_external"]
    if not ended:
        return None
    causes = [*_initiating(files), *_cascades(files), *hard_crashes(files)]
    if any(files.before(cause, ended[0]) for cause in causes):
        return None
    if (odd := blame.stopped_early(files.facts)) and _stopped_behind(files.facts, odd):
        return _silence(files, odd, ended)
    return from_event(files, ended[0], "established", NOBODY)


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
    if (
        first.failure_class.startswith("oom_gpu_")
        and not first.framed
        and len({one.who.rank for one in candidates}) > 1
    ):
        return next((one for one in candidates if one.framed and one.failure_class.startswith("oom_gpu_")), first)
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
    status: ClaimStatus = first.signature.status if first.signature else "supported"
    return from_event(files, first, status)


def _crashed(files: Files) -> LogVerdict | None:
    crashes = hard_crashes(files)
    if not crashes:
        return None
    return _sizes_differ(files, crashes) or from_event(files, crashes[0], "supported")


def _sizes_differ(files: Files, crashes: Sequence[Event] = ()) -> LogVerdict | None:
    """Ranks that say the same sentence with another size, beside a failure in communication."""
    for facts in files.facts:
        if said := disagree.sizes(facts):
            lines = [Evidence(file=facts.file, line=line, text=quote(text), role="initiating") for line, text in said]
            return made(files, "coll_mismatch", "hypothesis", NOBODY,
                            [*lines, *(as_evidence(one, "cascade") for one in crashes[:2])])  # fmt: skip
    return None


def _recorded(files: Files) -> LogVerdict | None:
    found = recorder.compare(files.dumps)
    if found is None:
        return None
    name = "coll_mismatch" if found.kind == "mismatch" else "coll_timeout"
    whom = Blame(Culprit(rank=found.ranks[0]), "supported") if len(found.ranks) == 1 else NOBODY
    verdict = made(files, name, "supported", whom, [as_evidence(one) for one in _cascades(files)[:MAX_EVIDENCE]])
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
        return from_event(files, lost[0] if lost else killed[0], "supported", whom)
    if differ := _collectives_differ(files, found):
        return differ
    first = found[0]
    if first.failure_class == "coll_timeout":
        return from_event(files, first, "supported", blame.for_timeout(found, files.facts))
    if first.failure_class == "peer_lost":
        return from_event(files, first, "supported", blame.for_lost_peer(found, files.facts))
    return from_event(files, first, "supported", NOBODY)


def _after(killed: Event, waited: Sequence[Event]) -> bool:
    """Whether a process was killed only after a time-out: then whoever ended the rest did it."""
    return any(
        one.line < killed.line if one.file == killed.file else one.t is not None and one.t < (killed.t or 0.0)
        for one in waited
    )


def _collectives_differ(files: Files, found: Sequence[Event]) -> LogVerdict | None:
    """Two ranks that name another operation or size at the same number, or gave up in different collectives."""
    status = disagree.collectives(files.facts)
    lines = [as_evidence(one, "initiating") for one in found[:4]]
    return made(files, "coll_mismatch", status, NOBODY, lines) if status else None


def _silence(files: Files, odd: Sequence[int], ended: Sequence[Event] = ()) -> LogVerdict:
    """Ranks that stopped before the others: something was waited for."""
    lines = [Evidence(file=facts.file, line=mark.line, text=mark.text, role="initiating")
             for facts in files.facts for rank, mark in facts.marks.items() if rank in odd]  # fmt: skip
    whom = Blame(Culprit(rank=odd[0]), "hypothesis") if len(odd) == 1 else NOBODY
    verdict = made(files, "coll_timeout", "hypothesis", whom, [*lines[:4], *(as_evidence(one) for one in ended[:2])])
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
    if not odd or not _stopped_behind(files.facts, odd):
        return None
    if any(_all_steps(facts) or of_the_program(end[1]) for facts in files.facts for end in facts.good_ends):
        return None  # a sentence alone, which a script may say whatever happened, does not make up for silence
    return _silence(files, odd)


def _table_only(files: Files) -> LogVerdict | None:
    """What torchrun says, where no line of the failed rank is there."""
    for facts in files.facts:
        for rank, code, host, line, text, attempt in facts.tables:
            if attempt == facts.attempts and code not in (None, 0):
                evidence = Evidence(file=facts.file, line=line, text=text, role="initiating")
                whom = Blame(Culprit(rank=rank, host=host), "supported")
                return made(files, "app_exception", "supported", whom, [evidence])
    return None


def _weak(files: Files) -> LogVerdict | None:
    """Errors that count only where nothing better is found, such as NCCL's own."""
    named = [one for one in _weak_events(files) if one.failure_class != "app_exception"]
    return from_event(files, named[0], "supported", NOBODY) if named else None


def _weak_events(files: Files) -> list[Event]:
    weak = [one for one in files.events if one.signature and one.signature.weak]
    return [one for one in weak if not _survived(files, one, weak)]


def _passed_on(files: Files) -> LogVerdict | None:
    """Errors that only say that another process failed."""
    weak = _weak_events(files)
    return from_event(files, weak[0], "hypothesis", NOBODY) if weak else None


def _soft_crash(files: Files) -> LogVerdict | None:
    crashes = [one for facts in files.facts for one in facts.crashes if one.attempt == facts.attempts]
    return from_event(files, crashes[0], "supported") if crashes else None


def _teardown(files: Files) -> LogVerdict | None:
    ended = (one for one in files.events if one.failure_class == "terminated_external")
    return from_event(files, first, "supported", NOBODY) if (first := next(ended, None)) else None


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
    if ends and not any(_believed(facts, end[1]) for facts, end in ends):
        status = "hypothesis"
    lines = [Evidence(file=facts.file, line=said[0], text=quote(said[1]), role="advice") for facts, said in found[-3:]]
    return made(files, "no_failure", status, NOBODY, lines)


def _at_the_end(facts: Facts, line: int) -> bool:
    """Whether no step follows: what is said to be complete while steps go on is not the run."""
    last = max((mark.line for mark in facts.marks.values() if mark.attempt == facts.attempts), default=0)
    return line >= last or _all_steps(facts)


def _believed(facts: Facts, end: str) -> bool:
    """Whether a good end is the program's own, or nothing shows that steps were still to come."""
    return facts.total is None or _all_steps(facts) or of_the_program(end)


def _all_steps(facts: Facts) -> bool:
    """Whether the last count of steps is at its total."""
    return facts.total is not None and facts.total[0] >= facts.total[1] > 0


def _store_gone(files: Files) -> LogVerdict | None:
    """Ranks that find the store gone, and nothing else: whoever kept it ended before them."""
    gone = [one for one in files.events if one.role == "teardown" and "TCPStore" in one.text]
    return from_event(files, gone[0], "hypothesis", blame.for_lost_peer(gone, files.facts)) if gone else None


def _broken_off(files: Files) -> LogVerdict | None:
    """A traceback whose error is not in the log: the place that raised it is all that tells."""
    open_ones = [one for facts in files.facts if (one := facts.broken_off) and one.attempt == facts.attempts]
    return from_event(files, open_ones[0], "hypothesis") if open_ones else None


def _unknown(files: Files) -> LogVerdict:
    lines = [Evidence(file=facts.file, line=line, text=quote(text), role="advice")
             for facts in files.facts for line, text in list(facts.telling)[-3:] if text]  # fmt: skip
    return made(files, "unknown", "unknown", NOBODY, lines[:MAX_EVIDENCE])


RULES: tuple[Callable[[Files], LogVerdict | None], ...] = (
    _kernel, _ended_from_outside, _initiated, _crashed, _recorded, _communication, _weak, _table_only, _passed_on,
    _soft_crash, _teardown, _fell_silent, _good, _store_gone, _broken_off,
    _unknown,
)  # fmt: skip
