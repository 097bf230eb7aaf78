"""Whatever is killed, whenever: what had ended keeps its outcome, nothing stays at work, and the next run goes on.

`HARNESS_STORM_SEED` chooses another storm; the moments of the kills follow the host's speed, so that even one seed
never gives the same storm twice.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fakes import stub_jobs

from harness import events
from harness.backends import leftovers, processes
from harness.backends.local import Local
from harness.schema import Outcome, Ticket

CONTROL_PLANE = Path(stub_jobs.__file__).parent / "stub_control_plane.py"
AT_ONCE = 3
VICTIMS = {"control": 3, "supervisor": 3, "rank": 6, "server": 12, "launcher": 6, "control and supervisor": 2}
"""Relative frequency of what is killed, where there is one just then."""


def stub_of(number: int, mark: str) -> dict[str, Any]:
    """A job of about a second; every other one has a server-like child, every twentieth ignores SIGTERM."""
    found: dict[str, Any] = {"ranks": 1 + number % 3, "steps": 8, "step_s": 0.1}
    if number % 2 == 0:
        found |= {"server": True, "shared_memory": f"{mark}_{number}"}
    if number % 20 == 7:
        found["ignore_sigterm"] = True
    return found


@dataclass
class Storm:
    """A run under fire."""

    run_dir: Path
    dice: random.Random
    control: subprocess.Popen[bytes] | None = None
    kills: Counter[str] = field(default_factory=Counter)
    settled: dict[Path, bytes] = field(default_factory=dict)
    """Outcomes that stood at some kill, as they were then."""
    hit: set[str] = field(default_factory=set)
    """Job directories whose control plane or supervisor was killed while they had no outcome."""

    def start(self) -> None:
        argv = [sys.executable, str(CONTROL_PLANE), str(self.run_dir), str(AT_ONCE)]
        with open(self.run_dir / "control.log", "ab") as log:
            self.control = subprocess.Popen(argv, stdout=log, stderr=log)

    def tickets(self) -> list[Ticket]:
        return [Ticket.model_validate_json(path.read_bytes()) for path in self.run_dir.glob("jobs/*/ticket.json")]

    def open_tickets(self) -> list[Ticket]:
        return [ticket for ticket in self.tickets() if not (Path(ticket.job_dir) / "outcome.json").exists()]

    def strike(self) -> None:
        """One kill at a random moment; nothing where the chosen kind of victim is not there."""
        time.sleep(self.dice.uniform(0, 0.5))
        kind = self.dice.choices(list(VICTIMS), list(VICTIMS.values()))[0]
        self.settled |= {path: path.read_bytes() for path in self.run_dir.glob("jobs/*/outcome.json")}
        open_tickets = self.open_tickets()
        if "control" in kind:
            self._kill_control(open_tickets, with_supervisor="supervisor" in kind)
        elif open_tickets:
            self._kill_in(self.dice.choice(open_tickets), kind)

    def _kill_in(self, ticket: Ticket, kind: str) -> None:
        if kind == "supervisor":
            self.hit.add(ticket.job_dir)
            self.kills[kind] += self._kill_supervisor(ticket)
            return
        found = [process for process in leftovers.find(ticket) if f" {kind} " in command_line(process.pid)]
        if found:
            self.kills[kind] += processes.send(self.dice.choice(found), signal.SIGKILL)

    def _kill_supervisor(self, ticket: Ticket) -> bool:
        process = processes.read(int(ticket.handle["pid"]))
        ours = process is not None and process.start_ticks == int(ticket.handle["start_ticks"])
        return bool(process and ours and processes.send(process, signal.SIGKILL))

    def _kill_control(self, open_tickets: list[Ticket], *, with_supervisor: bool) -> None:
        assert self.control is not None
        assert self.control.poll() is None, (self.run_dir / "control.log").read_text()
        self.control.kill()
        self.control.wait()
        self.kills["control"] += 1
        for ticket in open_tickets if with_supervisor else []:
            self.kills["supervisor"] += self._kill_supervisor(ticket)
        Local().reap(self.run_dir)
        self.hit |= {str(path.parent) for path in self.run_dir.glob("jobs/*/outcome.json") if path not in self.settled}
        self.check_nothing_is_left()
        self.start()

    def check_nothing_is_left(self) -> None:
        """No process of the run lives, by a look that shares nothing with the one under test; every job has ended."""
        assert at_work_in(self.run_dir) == []
        assert self.open_tickets() == []

    def finish(self) -> None:
        """The next run goes on where the storm left off, and gets everything that was begun to its end."""
        self.settled |= {path: path.read_bytes() for path in self.run_dir.glob("jobs/*/outcome.json")}
        self._kill_control(self.open_tickets(), with_supervisor=False)
        assert self.control is not None
        self.control.kill()
        self.control.wait()
        begun = {ticket.job_id for ticket in self.tickets()}
        stubs = json.loads((self.run_dir / "stubs.json").read_text())
        (self.run_dir / "stubs.json").write_text(json.dumps({name: stubs[name] for name in stubs if name in begun}))
        self.start()
        assert self.control.wait(120) == 0, (self.run_dir / "control.log").read_text()
        assert {path.name for path in (self.run_dir / "collected").iterdir()} == begun


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def at_work_in(folder: Path) -> list[str]:
    """Command lines of every living process that works in the folder or below."""
    found = []
    for process in processes.everything():
        where = processes.working_directory(process.pid)
        if where and Path(where).is_relative_to(folder) and not process.ended:
            found.append(command_line(process.pid))
    return found


def ended_well(folder: Path) -> bool:
    """Every rank of the job wrote its last line."""
    stub = json.loads((folder / "job.json").read_text())["stub"]
    last = [
        [event for _, event in events.read(path) if event][-1]["kind"] for path in events.files(str(folder)).values()
    ]
    return last == ["end"] * stub["ranks"]


def check(storm: Storm) -> None:
    """What holds after any storm."""
    storm.check_nothing_is_left()
    for path, content in storm.settled.items():
        assert path.read_bytes() == content, f"{path} lost its outcome"
    for path in storm.run_dir.glob("jobs/*/outcome.json"):
        outcome = Outcome.model_validate_json(path.read_bytes())
        folder = path.parent
        if outcome.ok:
            assert ended_well(folder), f"{folder.name} did not end well"
        if (folder / "ticket.json").exists() and (outcome.lost or outcome.interrupted):
            assert str(folder.resolve()) in storm.hit, f"{folder.name}: {outcome.detail}"


def storm(tmp_path: Path, kills: int, seed: int) -> Storm:
    mark = f"psm_storm_{os.getpid()}_{time.monotonic_ns()}"
    (tmp_path / "collected").mkdir()
    (tmp_path / "stubs.json").write_text(json.dumps({f"job-{n:04}": stub_of(n, mark) for n in range(20 + 8 * kills)}))
    found = Storm(tmp_path.resolve(), random.Random(seed))
    found.start()
    try:
        while found.kills.total() < kills:
            found.strike()
        found.finish()
    finally:
        if found.control:
            found.control.kill()
            found.control.wait()
        Local().reap(tmp_path)
        shared = sorted(path.name for path in Path("/dev/shm").glob(f"{mark}_*"))
        for name in shared:
            Path("/dev/shm", name).unlink()
    noted = "\n".join(path.read_text() for path in tmp_path.glob("jobs/*/pids.log"))
    assert [name for name in shared if f" {name}\n" in noted] == []
    return found


def run_storm(tmp_path: Path, kills: int) -> None:
    seed = int(os.environ.get("HARNESS_STORM_SEED", "1"))
    began = time.monotonic()
    found = storm(tmp_path, kills, seed)
    check(found)
    assert set(found.kills) == {"control", "supervisor", "rank", "server", "launcher"}
    outcomes = [Outcome.model_validate_json(path.read_bytes()) for path in tmp_path.glob("jobs/*/outcome.json")]
    ways = Counter(
        "ok" if o.ok else "lost" if o.lost else "interrupted" if o.interrupted else "failed" for o in outcomes
    )
    assert set(ways) == {"ok", "lost", "interrupted", "failed"}
    print(f"seed {seed}: {dict(found.kills)} in {time.monotonic() - began:.0f} s, outcomes {dict(ways)}")


def test_fifty_kills_lose_nothing_and_leave_nothing(tmp_path: Path) -> None:
    run_storm(tmp_path, 50)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_three_hundred_kills_lose_nothing_and_leave_nothing(tmp_path: Path) -> None:
    run_storm(tmp_path, 300)
