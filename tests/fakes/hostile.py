"""Text that is out to break a page or a terminal, and records that hold it wherever a payload chooses the words."""

from __future__ import annotations

from typing import Any

from harness.schema import Record

NASTY = (
    "</script><script>window.broken=1;alert(1)</script><!-- <script> \x1b[31mred\x1b[0m \x1b]0;title\x07 "
    "\u202eevil\u202c \u200f <img src=x onerror=alert(2)> [bold red]markup[/] {{ 7*7 }} {% raw %} &lt; "
    "\u2028 \x00 \ud800 =cmd() " + "x" * 50_000
)


def with_last(record: Record, **changes: Any) -> Record:
    """`record` with its last attempt changed."""
    assert record.last
    last = record.last.model_copy(update=changes)
    return record.model_copy(update={"attempts": (*record.attempts[:-1], last)})


def hostile(record: Record, text: str) -> Record:
    """`record` with every string that a payload can choose set to `text`."""
    assert record.last
    seen = record.last.observation
    ranks = tuple(r.model_copy(update={"host": text, "device_name": text, "last_phase": text}) for r in seen.ranks)
    train = seen.train and seen.train.model_copy(
        update={"proof": {text: {text: text}}, "proof_mismatches": (text,), "phases_s": {text: 1.0}}
    )
    diagnosis = record.last.diagnosis
    if diagnosis:
        quotes = tuple(e.model_copy(update={"text": text, "file": text}) for e in diagnosis.evidence)
        culprit = diagnosis.culprit and diagnosis.culprit.model_copy(update={"host": text, "gpu": text})
        changes = {"summary": text, "next_step": text, "failure_class": text, "evidence": quotes, "culprit": culprit}
        diagnosis = diagnosis.model_copy(update=changes)
    jobs = tuple(job.model_copy(update={"dir": text}) for job in record.last.jobs)
    error = {"rank": text, "message": text, "traceback": text}
    said = {"notes": (text,), "problems": (text,), "libraries": {text: text}, "errors": (error,)}
    observation = seen.model_copy(update={"ranks": ranks, "train": train, **said})
    return with_last(record, observation=observation, diagnosis=diagnosis, log_tail=text, jobs=jobs)
