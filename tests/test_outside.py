"""What a job starts outside its supervisor's process tree ends with it, and what its clean-up saw is believed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakes import stub_jobs

from harness import backends
from harness.backends import outside, processes
from harness.schema import Job, Outcome, Ticket

Start = Callable[..., tuple[backends.Backend, Ticket]]


@pytest.fixture
def strangers() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that no supervisor is an ancestor of, as a container's are not; ended with the test."""
    found: list[subprocess.Popen[bytes]] = []
    yield found
    for process in found:
        process.kill()
        process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Submits a job whose clean-up appends a line to `cleaned` and prints `says`."""

    def submit(job: Job, says: str = "", exits: int = 0) -> tuple[backends.Backend, Ticket]:
        folder = stub_jobs.job_dir(tmp_path / "run", job)
        script = f"echo cleaned >> '{tmp_path}/cleaned'; echo '{says}'; exit {exits}"
        command = stub_jobs.command(job, folder).model_copy(update={"cleanup": ("/bin/sh", "-c", script)})
        backend = backends.get("local")
        return backend, backend.submit(job, command, folder)

    return submit


def ended(backend: backends.Backend, ticket: Ticket) -> Outcome:
    stub_jobs.wait_for(lambda: backend.poll([ticket]))
    return backend.collect(ticket)


def stranger(ticket: Ticket) -> subprocess.Popen[bytes]:
    """A process that has the job's mark and nothing else of it."""
    env = {"PATH": os.environ["PATH"], outside.MARK: ticket.handle["mark"]}
    return subprocess.Popen(["/bin/sleep", "600"], env=env, start_new_session=True)


def cleaned(tmp_path: Path) -> int:
    path = tmp_path / "cleaned"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.parametrize(
    ("stub", "limits"),
    [
        ({}, {}),
        ({"exit_code": 3}, {}),
        ({"hang_at_step": 1}, {"time_limit_s": 1.0}),
        ({"hang_at_step": 1}, {"stall_s": 1.0}),
    ],
    ids=["finished", "failed", "time limit", "stalled"],
)
def test_the_cleanup_runs_once_at_every_end(
    start: Start, tmp_path: Path, stub: dict[str, int], limits: dict[str, float]
) -> None:
    outcome = ended(*start(stub_jobs.job(**limits, **stub)))
    assert cleaned(tmp_path) == 1
    assert outcome.detail == "" or "clean" not in outcome.detail


def test_the_cleanup_runs_when_the_job_is_cancelled(start: Start, tmp_path: Path) -> None:
    backend, ticket = start(stub_jobs.job(hang_at_step=1))
    stub_jobs.wait_for(lambda: list(Path(ticket.job_dir).glob("events.*")))
    backend.cancel(ticket)
    assert ended(backend, ticket).interrupted
    assert cleaned(tmp_path) == 1


def test_reaping_cleans_up_for_a_supervisor_that_was_killed(
    start: Start, tmp_path: Path, strangers: list[subprocess.Popen[bytes]]
) -> None:
    backend, ticket = start(stub_jobs.job(hang_at_step=1))
    stub_jobs.wait_for(lambda: list(Path(ticket.job_dir).glob("events.*")))
    strangers.append(stranger(ticket))
    os.kill(int(ticket.handle["pid"]), 9)
    stub_jobs.wait_for(lambda: backend.poll([ticket]))
    assert cleaned(tmp_path) == 0
    (line,) = backends.get("local").reap(tmp_path / "run")
    assert "had lost its supervisor" in line
    assert cleaned(tmp_path) == 1
    assert strangers[0].wait(5) < 0


@pytest.mark.parametrize(
    ("stub", "says", "expected"),
    [
        ({"exit_code": 137}, {"host_oom_killed": True}, {"host_oom_killed": True}),
        ({"exit_code": 1}, {"interrupted": True, "detail": "no Engine"}, {"interrupted": True, "detail": "no Engine"}),
        ({}, {"host_oom_killed": True, "interrupted": True}, {"host_oom_killed": False, "interrupted": False}),
        ({"exit_code": 1}, {"exit_code": 0, "lost": True}, {"exit_code": 1, "lost": False}),
    ],
)
def test_what_the_cleanup_saw_is_part_of_a_failed_outcome(
    start: Start, stub: dict[str, int], says: dict[str, object], expected: dict[str, object]
) -> None:
    outcome = ended(*start(stub_jobs.job(**stub), json.dumps(says))).model_dump()
    assert {name: outcome[name] for name in expected} == expected


def test_a_cleanup_that_says_nonsense_costs_no_result(start: Start) -> None:
    outcome = ended(*start(stub_jobs.job(), "no json", exits=9))
    assert outcome.ok
    assert "cleaning up failed" in outcome.detail


def test_a_process_outside_the_tree_is_looked_at_when_it_stalls_and_then_ended(
    start: Start, strangers: list[subprocess.Popen[bytes]]
) -> None:
    backend, ticket = start(stub_jobs.job(hang_at_step=1, stall_s=2.0))
    strangers.append(stranger(ticket))
    outcome = ended(backend, ticket)
    assert outcome.stalled
    seen = json.loads((Path(ticket.job_dir) / "stall.json").read_text())["processes"]
    assert [entry["pid"] for entry in seen] == [strangers[0].pid]
    assert strangers[0].wait(5) < 0


def test_without_a_cleanup_nothing_outside_the_tree_is_touched(
    tmp_path: Path, strangers: list[subprocess.Popen[bytes]]
) -> None:
    job = stub_jobs.job(steps=3)
    folder = stub_jobs.job_dir(tmp_path, job)
    backend = backends.get("local")
    ticket = backend.submit(job, stub_jobs.command(job, folder), folder)
    strangers.append(stranger(ticket))
    assert ended(backend, ticket).ok
    assert strangers[0].poll() is None


def test_marked_finds_descendants_that_lost_the_mark(strangers: list[subprocess.Popen[bytes]]) -> None:
    script = "import subprocess, sys; subprocess.run(['/bin/sleep', '600'], env={})"
    env = {outside.MARK: "a-mark-of-this-test"}
    strangers.append(subprocess.Popen([sys.executable, "-S", "-c", script], env=env))
    deadline = time.monotonic() + 10
    while len(found := outside.marked("a-mark-of-this-test")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert {process.name for process in found} >= {"sleep"}
    assert outside.marked("another-mark") == []
    processes.end(lambda: outside.marked("a-mark-of-this-test"), 0.5)
