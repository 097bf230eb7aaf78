"""What failed, who began it, and what to change first."""

from __future__ import annotations

from typing import Literal

from harness.schema.base import Frozen

ClaimStatus = Literal["established", "supported", "hypothesis", "unknown"]
Role = Literal["initiating", "cascade", "teardown", "advice"]


class Culprit(Frozen):
    """Where a failure began."""

    rank: int | None = None
    host: str | None = None
    gpu: str | None = None


class Evidence(Frozen):
    """A line that stands in a log."""

    file: str
    line: int
    text: str
    role: Role


class Diagnosis(Frozen):
    """What failed, who is to blame, and what to change first."""

    failure_class: str
    phase: str | None = None
    summary: str
    """One sentence."""
    culprit: Culprit | None = None
    class_status: ClaimStatus = "unknown"
    culprit_status: ClaimStatus = "unknown"
    cause_status: ClaimStatus = "unknown"
    evidence: tuple[Evidence, ...] = ()
    next_step: str = ""
    showed: str = ""
    """What the probes of a ladder showed, in one sentence; the next step then follows from it."""


class TimelineEvent(Frozen):
    """One thing that a log tells, in the order in which it happened."""

    time: str | None = None
    """`MM-DD HH:MM:SS` as the log says it, or nothing."""
    rank: int | None = None
    host: str | None = None
    failure_class: str
    role: Role
    file: str
    line: int
    text: str


class NextStep(Frozen):
    """What to change first."""

    step: str
    rung: str | None = None
    """The rung of the out-of-memory (O1..O6) or communication (N1..N4) ladder; none outside both."""
    why: str = ""
    cost: str = ""


class LogVerdict(Frozen):
    """What logs of any origin tell: what failed, who began it, the lines that show it, what to change first."""

    failure_class: str
    summary: str
    culprit: Culprit | None = None
    class_status: ClaimStatus = "unknown"
    culprit_status: ClaimStatus = "unknown"
    cause_status: ClaimStatus = "unknown"
    evidence: tuple[Evidence, ...] = ()
    next: NextStep
    timeline: tuple[TimelineEvent, ...] = ()
    attempts: int = 1
    earlier: tuple[str, ...] = ()
    """Classes of what failed in earlier attempts that the logs also hold."""
    files: int = 0
    notes: tuple[str, ...] = ()
    """What was left out or not read, and why."""
