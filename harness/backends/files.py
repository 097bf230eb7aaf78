"""The files of a job's directory that every backend writes and reads in the same way."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from pydantic import ValidationError

from harness.backends import durable
from harness.errors import HarnessError
from harness.schema import Job, Outcome, Ticket


def refuse_used(job_dir: Path) -> None:
    """HarnessError where a job was started in this directory before."""
    if (job_dir / "ticket.json").exists():
        raise HarnessError(f"{job_dir.name} was started before", "a new attempt needs a directory of its own")


def cannot_start(job_dir: Path, error: OSError) -> HarnessError:
    """What to tell a person when a job's files cannot be written, or its process not started."""
    return HarnessError(
        f"cannot start {job_dir.name}: {error.strerror or error} ({error.filename or job_dir})",
        "check the free space and the permissions there; then run again: what is done stays done",
    )


def lay(job: Job, job_dir: Path) -> None:
    """Write `job.json` and the job's small files."""
    for name, text in (job.files | {"job.json": json.dumps(job.payload, indent=1) + "\n"}).items():
        path = job_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        durable.write_atomically(str(path), text)


def write_ticket(ticket: Ticket) -> None:
    """Put the ticket into its job's directory; it survives a crash from then on."""
    durable.write_atomically(str(Path(ticket.job_dir) / "ticket.json"), ticket.model_dump_json(indent=1) + "\n")


def outcome_path(ticket: Ticket) -> Path:
    """Where the job's outcome stands, once there is one."""
    return Path(ticket.job_dir) / "outcome.json"


def read_outcome(ticket: Ticket) -> Outcome | None:
    """The outcome that stands in the job's directory; `None` where there is none that reads as one."""
    with contextlib.suppress(OSError, ValidationError):
        return Outcome.model_validate_json(outcome_path(ticket).read_bytes())
    return None
