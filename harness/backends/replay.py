"""Plays a recorded run directory (a cassette) back: each job ends at once with the files and outcome it had then."""

from __future__ import annotations

import difflib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from harness.backends import durable, files
from harness.errors import HarnessError
from harness.schema import Command, Job, Outcome, Ticket

NOT_PLAYED = frozenset(
    {"job.json", "ticket.json", "supervisor.json", "supervisor.log", "pids.log", "outcome.json", "artifacts"}
)
"""What belongs to the recorded run alone or is large; the outcome is played last."""
HINT = "pass the run directory that holds the recording, as in `--backend replay:runs/NAME`"


def open_backend(argument: str) -> Replay:
    """A player of the run directory `argument`."""
    if not argument:
        raise HarnessError("the replay backend needs a recorded run", HINT)
    return Replay(Path(argument))


class Replay:
    """Answers each job with what was recorded of the job with the same id."""

    name = "replay"
    at_once = None
    outlives = False
    by_hand = False
    pause_s = 0.0

    def __init__(self, cassette: Path) -> None:
        self._jobs = cassette / "jobs"
        if not self._jobs.is_dir():
            raise HarnessError(f"{cassette} is no recorded run: it has no folder `jobs`", HINT)

    def lacking(self, job: Job) -> str | None:
        """Nothing: what was recorded did run."""
        return None

    def adopt(self, run_dir: Path) -> list[str]:
        """Nothing is left at work by a copy."""
        return []

    def submit(self, job: Job, command: Command, job_dir: Path) -> Ticket:
        """Copy the recorded files into `job_dir`; HarnessError where the job was not recorded, or did not end."""
        recorded = self._recorded(job.id, job_dir.name)
        files.refuse_used(job_dir)
        try:
            return self._play(job, recorded, job_dir.resolve())
        except OSError as error:
            raise files.cannot_start(job_dir, error) from error

    def _play(self, job: Job, recorded: Path, job_dir: Path) -> Ticket:
        files.lay(job, job_dir)
        skipped = NOT_PLAYED | job.files.keys()
        shutil.copytree(
            recorded,
            job_dir,
            dirs_exist_ok=True,
            ignore=lambda folder, names: skipped if folder == str(recorded) else (),
        )
        handle = {"recorded": str(recorded)}
        ticket = Ticket(backend=self.name, job_id=job.id, job_dir=str(job_dir), submitted_at=time.time(), handle=handle)
        files.write_ticket(ticket)
        durable.write_atomically(str(job_dir / "outcome.json"), (recorded / "outcome.json").read_text())
        return ticket

    def _recorded(self, job_id: str, folder: str) -> Path:
        """The recorded directory of the same attempt at the job, else of its last attempt that ended."""
        ended = {path.parent.name: path.parent.resolve() for path in self._jobs.glob("*/outcome.json")}
        attempts = {name: path for name, path in ended.items() if name.rpartition(".")[0] == job_id}
        if folder in attempts:
            return attempts[folder]
        if attempts:
            return attempts[max(attempts, key=lambda name: int(name.rpartition(".")[2]))]
        near = difflib.get_close_matches(job_id, [name.rpartition(".")[0] for name in ended], 1)
        known = f"the nearest one it has is {near[0]}" if near else "it has none like it"
        raise HarnessError(f"{self._jobs.parent} has no recording of job {job_id}", f"{known}; {HINT}")

    def poll(self, tickets: Sequence[Ticket]) -> set[str]:
        """Every job: what was recorded has ended."""
        return {ticket.job_id for ticket in tickets}

    def collect(self, ticket: Ticket) -> Outcome:
        """The recorded outcome; `lost` where the copy was cut short."""
        outcome = files.read_outcome(ticket)
        return outcome or Outcome(
            lost=True, start=ticket.submitted_at, end=time.time(), detail="the copy was cut short"
        )

    def cancel(self, ticket: Ticket) -> None:
        """Nothing: what was recorded has ended."""

    def reap(self, run_dir: Path) -> list[str]:
        """Nothing: a copy leaves no process, and one cut short is made again as a new attempt."""
        return []
