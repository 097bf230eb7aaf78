"""What a job whose supervisor may be gone left at work: found by its ticket and its log alone, and ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.backends import durable, files, outside, processes, shared_memory, supervisor
from harness.backends.processes import Process
from harness.schema import Outcome, Ticket

GRACE_S = 1.0
"""From SIGTERM to SIGKILL; short, since nobody waits any more for what the job would still say."""
SUPERVISOR_S = supervisor.GRACE_S + 25.0
"""How long a living supervisor may take to end its job: its grace, and what it may save of a stalled one."""


@dataclass(frozen=True)
class Known:
    """What `pids.log` of a job names."""

    processes: frozenset[tuple[int, int]]
    """Pid and start time."""
    sessions: frozenset[int]
    shared: dict[str, int]


def handle(pid: int, mark: str) -> dict[str, str]:
    """What a ticket needs to find this supervisor and its processes again."""
    process = processes.read(pid)
    start_ticks = process.start_ticks if process else 0
    return {
        "pid": str(pid),
        "start_ticks": str(start_ticks),
        "mark": mark,
        "host": socket.gethostname(),
        "place": processes.place(),
    }


def here(ticket: Ticket) -> bool:
    """Whether the ticket's pids mean anything in this boot of this host."""
    return ticket.handle["place"] == processes.place()


def elsewhere(ticket: Ticket) -> bool:
    """Whether another host has the job, so that nothing can be said of its processes."""
    return ticket.handle["host"] != socket.gethostname()


def supervisor_lives(ticket: Ticket) -> bool:
    """Whether the job's supervisor is at work; on another host it is taken to be."""
    if elsewhere(ticket):
        return True
    return here(ticket) and processes.alive(int(ticket.handle["pid"]), int(ticket.handle["start_ticks"]))


def signal_supervisor(ticket: Ticket, number: int) -> None:
    """Signal the job's supervisor, and never a process that has its pid by now."""
    process = processes.read(int(ticket.handle["pid"])) if here(ticket) else None
    if process and process.start_ticks == int(ticket.handle["start_ticks"]):
        processes.send(process, number)


def open_tickets(run_dir: Path) -> list[Ticket]:
    """Tickets of the jobs that have no outcome, with the directory where they lie now."""
    found = []
    for path in sorted(run_dir.glob("jobs/*/ticket.json")):
        with contextlib.suppress(OSError, ValidationError):
            ticket = Ticket.model_validate_json(path.read_bytes())
            ticket = ticket.model_copy(update={"job_dir": str(path.parent.resolve())})
            if ticket.backend == "local" and not files.outcome_path(ticket).exists():
                found.append(ticket)
    return found


def reap(tickets: list[Ticket]) -> Iterator[str]:
    """End these jobs, all at the same time; a line for each."""
    for ticket in tickets:
        signal_supervisor(ticket, signal.SIGTERM)
    deadline = time.monotonic() + SUPERVISOR_S
    for ticket in sorted(tickets, key=supervisor_lives):
        yield _reap(ticket, deadline)


def _reap(ticket: Ticket, deadline: float) -> str:
    name = Path(ticket.job_dir).name
    if elsewhere(ticket):
        return f"{name} was started on {ticket.handle['host']}: only there can it be ended"
    lived = supervisor_lives(ticket)
    while supervisor_lives(ticket) and time.monotonic() < deadline:
        time.sleep(0.05)
    signal_supervisor(ticket, signal.SIGKILL)
    if lived and files.read_outcome(ticket):
        return f"{name} was still at work and was ended by its supervisor"
    count = len(find(ticket))
    give_up(ticket, lost=True, detail="its supervisor was gone when the next harness looked")
    ended = f"{count} process{'es' if count > 1 else ''}" if count else "nothing"
    return f"{name} had lost its supervisor; {ended} of it had to be ended"


def give_up(ticket: Ticket, *, detail: str, lost: bool = False, interrupted: bool = False) -> Outcome:
    """End what is left of a job whose supervisor is gone, and write the outcome that it could not write."""
    at_work = [process.pid for process in find(ticket)]
    shared = known(ticket).shared | shared_memory.made_since(ticket.submitted_at, at_work)
    left = processes.end(lambda: find(ticket), GRACE_S)
    said = outside.clean_up(_order(ticket))
    if here(ticket):
        shared_memory.remove(shared, processes.pids())
    if said.get("detail"):
        detail += f"; {said['detail']}"
    if left:
        detail += f"; could not be ended: {', '.join(str(process.pid) for process in left)}"
    outcome = files.read_outcome(ticket)  # it may have come while we looked
    if outcome is None:
        outcome = Outcome(lost=lost, interrupted=interrupted, start=ticket.submitted_at, end=time.time(), detail=detail)
        with contextlib.suppress(OSError):  # a full disk: the next `reap` comes to the same answer
            durable.Reserved(str(files.outcome_path(ticket))).save(outcome.model_dump_json(indent=1) + "\n", retry_s=0)
    return outcome


def _order(ticket: Ticket) -> dict[str, Any]:
    """What the supervisor was told to start, empty where that is gone."""
    with contextlib.suppress(OSError, ValueError):
        order = json.loads((Path(ticket.job_dir) / "supervisor.json").read_text(encoding="utf-8"))
        return order if isinstance(order, dict) else {}
    return {}


def find(ticket: Ticket) -> list[Process]:
    """Living processes of the job, and no other's: noted ones, marked ones, and those that work where only it does."""
    if not here(ticket):
        return []
    noted, folder = known(ticket), os.path.realpath(ticket.job_dir)
    mark = f"{outside.MARK}={ticket.handle['mark']}".encode()
    every = processes.everything()
    roots = [process.pid for process in every if _belongs(process, noted, folder, mark)]
    found = processes.with_descendants(roots, every)
    return [process for process in found if not process.ended and process.pid != os.getpid()]


def _belongs(process: Process, noted: Known, folder: str, mark: bytes) -> bool:
    if process.key in noted.processes or mark in processes.environment(process.pid):
        return True
    if not _within(processes.working_directory(process.pid), folder):
        return False
    # A directory alone may be a person's shell, and a session id alone may have passed to a stranger's session.
    return process.session in noted.sessions or any(_within(path, folder) for path in processes.outputs(process.pid))


def _within(path: str | None, folder: str) -> bool:
    return path is not None and (path == folder or path.startswith(folder + os.sep))


def known(ticket: Ticket) -> Known:
    """What the supervisor noted in `pids.log`; whatever does not read as its lines is left out."""
    keys: set[tuple[int, int]] = set()
    sessions: set[int] = set()
    shared: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for line in (Path(ticket.job_dir) / "pids.log").read_text(errors="replace").splitlines():
            match line.split(maxsplit=3):
                case ["process", pid, start_ticks, session] if (pid + start_ticks + session).isdigit():
                    keys.add((int(pid), int(start_ticks)))
                    sessions.add(int(session))
                case ["shared", inode, name] if inode.isdigit() and "/" not in name:
                    shared[name] = int(inode)
    return Known(frozenset(keys), frozenset(sessions), shared)
