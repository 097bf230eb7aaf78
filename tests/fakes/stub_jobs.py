"""Jobs that run the stub payload, and looks at the processes they leave."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.backends import leftovers, processes
from harness.schema import Command, Job, Ticket

ROOT = Path(__file__).resolve().parent.parent.parent
STUB = Path(__file__).resolve().parent / "stub_payload.py"


def job(job_id: str = "a-job", *, time_limit_s: float = 60.0, stall_s: float = 60.0, **stub: Any) -> Job:
    """A job of the stub payload with these options."""
    return Job(
        id=job_id,
        environment="train",
        case_ids=(job_id,),
        argv=("python", "-S", str(STUB), "launcher", "0"),
        env={},
        device="cpu",
        devices=1,
        time_limit_s=time_limit_s,
        stall_s=stall_s,
        files={"notes/small.txt": "laid by the backend\n"},
        payload={"job_id": job_id, "stub": stub},
    )


def command(job: Job, job_dir: Path) -> Command:
    """The job in the interpreter that runs the tests."""
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    return Command(argv=(sys.executable, *job.argv[1:]), env=env, cwd=str(job_dir))


def job_dir(run_dir: Path, job: Job, attempt: int = 1) -> Path:
    """Where a run directory keeps that attempt."""
    return run_dir / "jobs" / f"{job.id}.{attempt}"


def wait_for(condition: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What `condition` answers as soon as it is true; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {condition}"
        time.sleep(0.02)
    return answer


def living(ticket: Ticket) -> list[processes.Process]:
    """Processes of the job that still run, its supervisor included."""
    pid, start_ticks = int(ticket.handle["pid"]), int(ticket.handle["start_ticks"])
    own = [process for process in [processes.read(pid)] if process and processes.alive(pid, start_ticks)]
    return leftovers.find(ticket) + own
