"""A control plane to be killed: runs stub jobs in a run directory, and takes up where an earlier one was killed.

`python stub_control_plane.py RUN_DIR AT_ONCE` with the options of each job in `RUN_DIR/stubs.json`. It writes
`collected/<job id>` when a job is done for good, as the store would write a record.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import stub_jobs

from harness import backends
from harness.backends import durable
from harness.schema import Outcome, Ticket


def settled(run_dir: Path, job_id: str) -> Outcome | None:
    """The outcome of the attempt at the job that ended by itself, where there is one."""
    for path in run_dir.glob(f"jobs/{job_id}.*/outcome.json"):
        outcome = Outcome.model_validate_json(path.read_bytes())
        if not (outcome.interrupted or outcome.lost):
            return outcome
    return None


def keep(run_dir: Path, job_id: str, outcome: Outcome) -> None:
    durable.write_atomically(str(run_dir / "collected" / job_id), outcome.model_dump_json())


def start(backend: backends.Backend, run_dir: Path, job_id: str, stub: dict[str, object]) -> Ticket:
    attempt = 1 + len(list(run_dir.glob(f"jobs/{job_id}.*")))
    job = stub_jobs.job(job_id, **stub)
    folder = stub_jobs.job_dir(run_dir, job, attempt)
    return backend.submit(job, stub_jobs.command(job, folder), folder)


def main(run_dir: Path, at_once: int) -> None:
    backend = backends.get("local")
    for line in backend.reap(run_dir):
        print(line, flush=True)
    stubs = json.loads((run_dir / "stubs.json").read_text())
    waiting = []
    for job_id in stubs:
        if outcome := settled(run_dir, job_id):
            keep(run_dir, job_id, outcome)
        else:
            waiting.append(job_id)
    tickets: dict[str, Ticket] = {}
    while waiting or tickets:
        while waiting and len(tickets) < at_once:
            job_id = waiting.pop(0)
            tickets[job_id] = start(backend, run_dir, job_id, stubs[job_id])
        for job_id in backend.poll(list(tickets.values())):
            outcome = backend.collect(tickets.pop(job_id))
            if outcome.interrupted or outcome.lost:
                waiting.append(job_id)
            else:
                keep(run_dir, job_id, outcome)
        time.sleep(0.02)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
