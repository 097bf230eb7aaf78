"""What a drill shows: was the fault made, and did triage name it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from harness.drill.faults import Fault
from harness.schema import Culprit, Frozen, LogVerdict

Status = Literal["right", "wrong", "skipped", "not injected"]


class Truth(Frozen):
    """What was done, beside the log that it left; triage is never given it."""

    fault: str
    done: str
    failure_class: str
    culprit: Culprit | None
    debug: bool
    shown_class: str
    """What the log can show at best: differs from `failure_class` where `why` says so."""
    shown_culprit: Culprit | None
    why: str = ""
    made_by: str = ""
    when: str = ""
    python: str = ""
    libraries: dict[str, str] = Field(default_factory=dict)
    exit_code: int | None = None
    seconds: float | None = None


class Drilled(Frozen):
    """One drill's result."""

    name: str
    debug: bool
    status: Status
    reason: str = ""
    """Why it was skipped or not injected, or what triage got wrong."""
    expected_class: str
    """What the log can show at best, as `expected_culprit`; `why` where that is not what was done."""
    expected_culprit: Culprit | None = None
    why: str = ""
    found_class: str = ""
    found_culprit: Culprit | None = None
    class_status: str = ""
    seconds: float = 0.0
    folder: str = ""


def truth_of(fault: Fault, debug: bool) -> Truth:
    """What is to be seen in the log that `fault` leaves, with the debug variables or without."""
    best = fault.shown or (None if debug else fault.off)
    return Truth(
        fault=fault.name,
        done=fault.done,
        failure_class=fault.failure_class,
        culprit=fault.culprit,
        debug=debug,
        shown_class=best.failure_class if best else fault.failure_class,
        shown_culprit=best.culprit if best else fault.culprit,
        why=best.why if best else "",
    )


def mistakes(truth: Truth, verdict: LogVerdict) -> list[str]:
    """What triage got wrong; a rank named where none is to blame is as wrong as one not named."""
    found = []
    if verdict.failure_class != truth.shown_class:
        found.append(f"class {verdict.failure_class}, but it was {truth.shown_class}")
    named, meant = rank_of(verdict.culprit), rank_of(truth.shown_culprit)
    if named != meant:
        found.append(f"{_said(named)} named, but it was {_said(meant)}")
    return found


def rank_of(culprit: Culprit | None) -> int | None:
    """The rank in it, if any."""
    return culprit.rank if culprit else None


def _said(rank: int | None) -> str:
    return "no rank" if rank is None else f"rank {rank}"


def summary(results: Sequence[Drilled]) -> dict[str, int]:
    """The counts under the table."""
    judged = [one for one in results if one.status in ("right", "wrong")]
    faults = [one for one in judged if one.expected_class != "no_failure"]
    healthy = [one for one in judged if one.expected_class == "no_failure"]
    blamed = [one for one in faults if one.expected_culprit]
    return {
        "faults": len(faults),
        "class_right": sum(one.found_class == one.expected_class for one in faults),
        "culprits": len(blamed),
        "culprit_right": sum(rank_of(one.found_culprit) == rank_of(one.expected_culprit) for one in blamed),
        "culprit_wrong": sum(rank_of(one.found_culprit) not in (None, rank_of(one.expected_culprit)) for one in judged),
        "healthy": len(healthy),
        "false_alarms": sum(one.found_class != "no_failure" for one in healthy),
        "skipped": sum(one.status == "skipped" for one in results),
        "not_injected": sum(one.status == "not injected" for one in results),
    }


def exit_code(results: Sequence[Drilled]) -> int:
    """0 where triage was right about all, 1 where it was wrong, 2 where nothing or not all could be judged."""
    if any(one.status == "wrong" for one in results):
        return 1
    return 0 if any(one.status == "right" for one in results) and not summary(results)["not_injected"] else 2
