"""Jobs as processes of this host, each under a supervisor that outlives the control plane long enough to end them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from harness.backends import container, durable, files, leftovers, supervisor
from harness.errors import HarnessError
from harness.schema import Command, Job, Outcome, Ticket

END_SIGNALS = {signal.SIGTERM, signal.SIGINT}
SUPERVISOR_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH")
"""All it needs; the job's own environment is in its order, and no token of ours goes anywhere."""


def open_backend(argument: str) -> Local:
    """The local backend; it takes no argument."""
    if argument:
        raise HarnessError(f"the local backend takes no argument, but got {argument!r}", "say `local`")
    return Local()


class Local:
    """Starts jobs on this host; they end as interrupted when the process that started them is gone."""

    name = "local"
    at_once = None
    outlives = False
    by_hand = False
    pause_s = 0.0

    def __init__(self) -> None:
        self._supervisors: dict[str, subprocess.Popen[bytes]] = {}

    def lacking(self, job: Job) -> str | None:
        """More than one node: it has this host alone."""
        if job.nodes > 1:
            return f"needs {job.nodes} nodes; the local backend has this host alone, so use --backend slurm"
        return None

    def adopt(self, run_dir: Path) -> list[str]:
        """End what an earlier control plane left: its jobs were to end with it."""
        return self.reap(run_dir)

    def submit(self, job: Job, command: Command, job_dir: Path) -> Ticket:
        """Start `command`; HarnessError where the directory was used before or cannot be written."""
        files.refuse_used(job_dir)
        try:
            return self._submit(job, command, job_dir.resolve())
        except OSError as error:
            raise files.cannot_start(job_dir, error) from error

    def _submit(self, job: Job, command: Command, job_dir: Path) -> Ticket:
        files.lay(job, job_dir)
        mark = uuid.uuid4().hex
        order = command.model_dump() | {"time_limit_s": job.time_limit_s, "stall_s": job.stall_s, "mark": mark}
        durable.write_atomically(str(job_dir / "supervisor.json"), json.dumps(order, indent=1) + "\n", mode=0o600)
        process = _start_supervisor(job_dir)
        self._supervisors[str(job_dir)] = process
        ticket = Ticket(
            backend=self.name,
            job_id=job.id,
            job_dir=str(job_dir),
            submitted_at=time.time(),
            handle=leftovers.handle(process.pid, mark),
        )
        try:
            files.write_ticket(ticket)
        except OSError:
            self._forget(str(job_dir))
            process.kill()  # it has no word to go, so nothing started; on a full disk it would wait to say so
            process.wait()
            raise
        with contextlib.suppress(BrokenPipeError):  # somebody killed it: `collect` will say that it is lost
            _lifeline(process, b"go\n")
        return ticket

    def poll(self, tickets: Sequence[Ticket]) -> set[str]:
        """Ids of the jobs that left an outcome or whose supervisor is gone."""
        return {ticket.job_id for ticket in tickets if not self._at_work(ticket)}

    def _at_work(self, ticket: Ticket) -> bool:
        process = self._supervisors.get(ticket.job_dir)
        if process is None:
            return not files.outcome_path(ticket).exists() and leftovers.supervisor_lives(ticket)
        if process.poll() is None:
            return True
        self._forget(ticket.job_dir)
        return False

    def _forget(self, job_dir: str) -> None:
        process = self._supervisors.pop(job_dir)
        if process.stdin:
            process.stdin.close()

    def collect(self, ticket: Ticket) -> Outcome:
        """The outcome its supervisor left; where there is none, ends what is left of the job and says `lost`."""
        if self._at_work(ticket):
            raise HarnessError(f"job {ticket.job_id} is still at work", "poll until it has ended")
        return files.read_outcome(ticket) or leftovers.give_up(ticket, lost=True, detail=_last_words(ticket))

    def cancel(self, ticket: Ticket) -> None:
        """Ask the supervisor to end the job; where there is none any more, end what it left."""
        if self._at_work(ticket):
            leftovers.signal_supervisor(ticket, signal.SIGTERM)
        elif files.read_outcome(ticket) is None:
            leftovers.give_up(ticket, interrupted=True, detail="cancelled; its supervisor was gone")

    def reap(self, run_dir: Path) -> list[str]:
        """End every job of `run_dir` that has a ticket but no outcome, and remove containers of it; a line for each."""
        lines = list(leftovers.reap(leftovers.open_tickets(run_dir)))
        return lines + container.remove_left(str(run_dir.resolve()))


def _start_supervisor(job_dir: Path) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-I", "-S", "-X", "utf8", os.path.abspath(supervisor.__file__), str(job_dir)]
    env = {name: os.environ[name] for name in SUPERVISOR_ENVIRONMENT if name in os.environ}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, END_SIGNALS)  # a `cancel` waits until it can be obeyed
    try:
        with open(job_dir / "supervisor.log", "ab") as log:
            return subprocess.Popen(
                argv, bufsize=0, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd="/", env=env, start_new_session=True
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _lifeline(process: subprocess.Popen[bytes], word: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(word)


def _last_words(ticket: Ticket) -> str:
    """Why the supervisor ended without an outcome, as far as its log tells."""
    with contextlib.suppress(OSError):
        lines = (Path(ticket.job_dir) / "supervisor.log").read_text(errors="replace").strip().splitlines()
        if lines:
            return f"its supervisor failed: {lines[-1]}"[: supervisor.DETAIL_CHARACTERS]
    return "its supervisor was killed"
