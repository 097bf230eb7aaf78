"""What the supervisor of a local job promises: how a job ends, that nothing of it is left, and what is saved before."""

from __future__ import annotations

import json
import mmap
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import stub_jobs
from fakes.stub_jobs import wait_for

from harness import backends
from harness.backends import durable, leftovers, memory_pressure, processes, shared_memory, supervisor
from harness.backends.local import Local
from harness.errors import HarnessError
from harness.schema import Job, Outcome, Ticket

CONTROL_PLANE = Path(stub_jobs.__file__).parent / "stub_control_plane.py"


def submit(run_dir: Path, job: Job, backend: backends.Backend | None = None) -> Ticket:
    folder = stub_jobs.job_dir(run_dir, job)
    return (backend or Local()).submit(job, stub_jobs.command(job, folder), folder)


def ended(backend: backends.Backend, ticket: Ticket, seconds: float = 30.0) -> Outcome:
    wait_for(lambda: backend.poll([ticket]), seconds)
    return backend.collect(ticket)


def by_role(ticket: Ticket, role: str) -> list[processes.Process]:
    """Living processes of the job that play this role in the stub."""
    return [process for process in leftovers.find(ticket) if f" {role} " in command_line(process.pid)]


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def supervisor_of(ticket: Ticket) -> int:
    return int(ticket.handle["pid"])


def at_step(ticket: Ticket, step: int, ranks: int = 2) -> None:
    """Wait until every rank has written this step."""
    files = [Path(ticket.job_dir) / f"events.rank{rank}.jsonl" for rank in range(ranks)]
    wait_for(lambda: all(path.exists() and f'"step":{step},' in path.read_text() for path in files))


# ---------------------------------------------------------------- how jobs end: all of these run side by side

JOBS = {
    "fine": stub_jobs.job("fine", steps=3),
    "slow": stub_jobs.job("slow", steps=20, step_s=0.15, stall_s=1.2),
    "over-time": stub_jobs.job("over-time", hang_at_step=2, time_limit_s=1.0),
    "stubborn": stub_jobs.job("stubborn", hang_at_step=2, time_limit_s=1.0, ignore_sigterm=True),
    "stalled": stub_jobs.job("stalled", hang_at_step=3, stall_s=1.0),
    "deaf": stub_jobs.job("deaf", hang_at_step=1, stall_s=1.0, stacks=False),
    "never-began": stub_jobs.job("never-began", stall_s=1.0).model_copy(
        update={"argv": ("python", "-c", "import time; time.sleep(60)")}
    ),
    "killed-rank": stub_jobs.job("killed-rank", kill_at_step=2),
    "leaves-some": stub_jobs.job("leaves-some", left_behind=2, server=True, steps=3),
    "ends-itself": stub_jobs.job("ends-itself"),
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def outcomes(run_dir: Path) -> dict[str, Outcome]:
    backend = Local()
    os.makedirs(stub_jobs.job_dir(run_dir, JOBS["stalled"]))
    os.mkfifo(stub_jobs.job_dir(run_dir, JOBS["stalled"]) / "nccl_trace_rank_0.pipe")
    pipe = os.open(stub_jobs.job_dir(run_dir, JOBS["stalled"]) / "nccl_trace_rank_0.pipe", os.O_RDONLY | os.O_NONBLOCK)
    tickets = [submit(run_dir, job, backend) for job in JOBS.values()]
    wait_for(lambda: len(backend.poll(tickets)) == len(tickets), 60)
    (run_dir / "pipe").write_bytes(os.read(pipe, 128))
    os.close(pipe)
    found = {ticket.job_id: backend.collect(ticket) for ticket in tickets}
    assert [process for ticket in tickets for process in stub_jobs.living(ticket)] == []
    return found


def test_a_job_that_ends_by_itself_keeps_its_exit_code(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["fine"].ok
    assert outcomes["fine"].detail == ""


def test_a_job_that_writes_events_is_not_stalled_however_long_it_takes(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["slow"].ok
    assert outcomes["slow"].end - outcomes["slow"].start > 2 * JOBS["slow"].stall_s


def test_over_its_time_limit_a_job_is_ended(outcomes: dict[str, Outcome]) -> None:
    found = outcomes["over-time"]
    assert found.timed_out
    assert not found.stalled
    assert "time limit of 1 s" in found.detail
    assert 1.0 <= found.end - found.start < 4.0


def test_what_ignores_a_sigterm_gets_a_sigkill_after_the_grace(outcomes: dict[str, Outcome]) -> None:
    found = outcomes["stubborn"]
    assert (found.timed_out, found.signal) == (True, signal.SIGKILL)
    assert supervisor.GRACE_S <= found.end - found.start < supervisor.GRACE_S + 6


def test_without_events_a_job_is_stalled_and_not_timed_out(outcomes: dict[str, Outcome]) -> None:
    for name in ("stalled", "deaf", "never-began"):
        assert (outcomes[name].stalled, outcomes[name].timed_out) == (True, False), name
        assert "no rank wrote an event" in outcomes[name].detail


def test_before_a_stalled_job_is_ended_its_state_is_saved(outcomes: dict[str, Outcome], run_dir: Path) -> None:
    folder = stub_jobs.job_dir(run_dir, JOBS["stalled"])
    found = json.loads((folder / "stall.json").read_text())
    assert found["idle_s"] > JOBS["stalled"].stall_s
    assert found["stacks"] == ["stacks.rank0.txt", "stacks.rank1.txt"]
    for rank in (0, 1):
        assert "in wait_for_the_others" in (folder / f"stacks.rank{rank}.txt").read_text()
    assert set(found["last_events"]) == {"0", "1"}
    assert all(rank["size_bytes"] > 0 and rank["age_s"] > 1 for rank in found["last_events"].values())


def test_the_saved_state_shows_each_process(outcomes: dict[str, Outcome], run_dir: Path) -> None:
    found = json.loads((stub_jobs.job_dir(run_dir, JOBS["stalled"]) / "stall.json").read_text())
    assert len(found["processes"]) == 3
    for process in found["processes"]:
        assert process["state"] in ("S", "R")  # the launcher looks after its ranks a hundred times a second
        assert process["rss_bytes"] > 1_000_000
        assert process["threads"] == sum(process["thread_wchans"].values()) == 1
        assert process["cpu_share"] < 0.5
    ranks = [process for process in found["processes"] if " rank " in process["command"]]
    assert sorted(process["pid"] for process in ranks) == sorted(found["asked_for_stacks"])


def test_a_process_that_would_die_of_the_stack_signal_does_not_get_it(
    outcomes: dict[str, Outcome], run_dir: Path
) -> None:
    found = json.loads((stub_jobs.job_dir(run_dir, JOBS["deaf"]) / "stall.json").read_text())
    assert found["asked_for_stacks"] == []
    assert len(found["processes"]) == 3
    assert outcomes["deaf"].exit_code == 1  # the launcher's own answer to SIGTERM


def test_a_flight_recorder_that_listens_is_asked_to_dump(outcomes: dict[str, Outcome], run_dir: Path) -> None:
    found = json.loads((stub_jobs.job_dir(run_dir, JOBS["stalled"]) / "stall.json").read_text())
    assert found["recorder_pipes"] == ["nccl_trace_rank_0.pipe"]
    assert (run_dir / "pipe").read_bytes() == b"1\n"


def test_a_killed_rank_is_not_host_memory_unless_the_kernel_counted_it(outcomes: dict[str, Outcome]) -> None:
    assert outcomes["killed-rank"].exit_code == 1
    assert not outcomes["killed-rank"].host_oom_killed


def test_processes_left_behind_are_ended_and_named_but_cost_no_result(outcomes: dict[str, Outcome]) -> None:
    found = outcomes["leaves-some"]
    assert found.ok
    assert found.detail.startswith("left processes behind, which were ended: python")
    assert found.end - found.start < supervisor.LINGER_S  # the job's end, not that of its leftovers


def test_every_process_is_noted_once(outcomes: dict[str, Outcome], run_dir: Path) -> None:
    lines = (stub_jobs.job_dir(run_dir, JOBS["slow"]) / "pids.log").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 3
    assert all(line.startswith("process ") for line in lines)


def test_only_its_owner_reads_the_order_with_the_environment(outcomes: dict[str, Outcome], run_dir: Path) -> None:
    path = stub_jobs.job_dir(run_dir, JOBS["fine"]) / "supervisor.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_cannot_be_started_is_an_outcome(tmp_path: Path) -> None:
    backend, job = Local(), stub_jobs.job()
    folder = stub_jobs.job_dir(tmp_path, job)
    command = stub_jobs.command(job, folder).model_copy(update={"argv": ("/no/such/python",)})
    found = ended(backend, backend.submit(job, command, folder))
    assert found.exit_code == 127
    assert "/no/such/python" in found.detail


# ---------------------------------------------------------------- who may die


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path) -> Iterator[None]:
    """Whatever a failed test leaves at work is ended."""
    yield
    Local().reap(tmp_path)


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[tuple[Local, Ticket]]:
    """A job at work, with ranks and a server-like child in sessions of their own."""
    backend = Local()
    ticket = submit(tmp_path, stub_jobs.job(hang_at_step=2, server=True, steps=3), backend)
    at_step(ticket, 1)
    wait_for(lambda: by_role(ticket, "server"))
    yield backend, ticket
    backend.cancel(ticket)
    ended(backend, ticket)


def test_a_job_at_work_is_seen_as_such_by_every_process(hanging: tuple[Local, Ticket]) -> None:
    backend, ticket = hanging
    assert backend.poll([ticket]) == Local().poll([ticket]) == set()
    with pytest.raises(HarnessError, match="still at work"):
        Local().collect(ticket)


def test_ranks_go_with_a_launcher_that_is_killed(hanging: tuple[Local, Ticket]) -> None:
    backend, ticket = hanging
    os.kill(by_role(ticket, "launcher")[0].pid, signal.SIGKILL)
    found = ended(backend, ticket)
    assert found.signal == signal.SIGKILL
    assert not found.host_oom_killed
    assert stub_jobs.living(ticket) == []


def test_a_killed_supervisor_makes_the_job_lost_and_leaves_nothing(hanging: tuple[Local, Ticket]) -> None:
    backend, ticket = hanging
    server = by_role(ticket, "server")[0]
    wait_for(lambda: not processes.environment(server.pid) - {b""})  # known by the log alone from now on
    os.kill(supervisor_of(ticket), signal.SIGKILL)
    found = ended(backend, ticket)
    assert found.lost
    assert found.detail == "its supervisor was killed"
    assert stub_jobs.living(ticket) == []
    assert not processes.alive(*server.key)
    assert Local().collect(ticket) == found


def test_a_supervisor_asked_to_end_ends_its_job_first(hanging: tuple[Local, Ticket]) -> None:
    backend, ticket = hanging
    os.kill(supervisor_of(ticket), signal.SIGTERM)
    found = ended(backend, ticket)
    assert found.interrupted
    assert "SIGTERM" in found.detail
    assert stub_jobs.living(ticket) == []


def test_cancel_ends_what_a_killed_supervisor_left(hanging: tuple[Local, Ticket]) -> None:
    backend, ticket = hanging
    os.kill(supervisor_of(ticket), signal.SIGKILL)
    wait_for(lambda: backend.poll([ticket]))
    Local().cancel(ticket)
    assert stub_jobs.living(ticket) == []
    assert backend.collect(ticket).interrupted


def control_plane(run_dir: Path, stubs: dict[str, Any]) -> subprocess.Popen[bytes]:
    """A control plane in a process of its own, with these jobs."""
    (run_dir / "collected").mkdir(parents=True)
    (run_dir / "stubs.json").write_text(json.dumps(stubs))
    return subprocess.Popen([sys.executable, str(CONTROL_PLANE), str(run_dir), "2"], stdout=subprocess.DEVNULL)


def tickets_of(run_dir: Path) -> list[Ticket]:
    return [Ticket.model_validate_json(path.read_bytes()) for path in sorted(run_dir.glob("jobs/*/ticket.json"))]


def test_a_killed_control_plane_interrupts_its_jobs_at_once(tmp_path: Path) -> None:
    control = control_plane(tmp_path, {"one": {"hang_at_step": 2, "server": True}, "two": {"hang_at_step": 1}})
    one, two = wait_for(lambda: len(found := tickets_of(tmp_path)) == 2 and found)
    at_step(one, 1)
    control.kill()
    control.wait()
    backend = Local()
    for ticket in (one, two):
        found = ended(backend, ticket)
        assert found.interrupted
        assert "the control plane is gone" in found.detail
        assert leftovers.find(ticket) == []
    assert backend.reap(tmp_path) == []


def test_reap_ends_what_is_left_when_control_plane_and_supervisor_are_killed(tmp_path: Path) -> None:
    control = control_plane(tmp_path, {"one": {"hang_at_step": 2, "ignore_sigterm": True, "server": True}})
    (ticket,) = wait_for(lambda: tickets_of(tmp_path))
    at_step(ticket, 1)
    control.kill()
    os.kill(supervisor_of(ticket), signal.SIGKILL)
    control.wait()
    wait_for(lambda: not leftovers.supervisor_lives(ticket))
    assert len(leftovers.find(ticket)) == 4
    assert Local().reap(tmp_path) == ["one.1 had lost its supervisor; 4 processes of it had to be ended"]
    assert stub_jobs.living(ticket) == []
    assert Local().collect(ticket).lost
    assert Local().reap(tmp_path) == []


def test_reap_says_what_it_ended_through_a_living_supervisor(hanging: tuple[Local, Ticket]) -> None:
    _, ticket = hanging
    run_dir = Path(ticket.job_dir).parent.parent
    assert Local().reap(run_dir) == ["a-job.1 was still at work and was ended by its supervisor"]
    assert stub_jobs.living(ticket) == []


# ---------------------------------------------------------------- never another's process, never another's file


def vanished(tmp_path: Path, *lines: str) -> Ticket:
    """A ticket whose supervisor is gone, and a log with these lines."""
    folder = tmp_path / "jobs/gone.1"
    folder.mkdir(parents=True, exist_ok=True)
    handle = leftovers.handle(os.getpid(), "a-mark") | {"start_ticks": "1"}
    ticket = Ticket(backend="local", job_id="gone", job_dir=str(folder), submitted_at=time.time(), handle=handle)
    (folder / "ticket.json").write_text(ticket.model_dump_json())
    (folder / "pids.log").write_text("\n".join(lines) + "\n\n\n")
    return ticket


@pytest.mark.parametrize(
    ("line", "ours"),
    [
        ("process {pid} {start} {pid}", True),
        ("process {pid} {later} 999999", False),  # its pid was another's before
        ("process 999999 1 {pid}", True),  # started after the last look, in a session that was noted
        ("process 999999 1 999998", False),  # a person's shell in that directory
        ("process {pid}", False),  # cut short
        ("", False),
    ],
)
def test_reap_ends_a_process_only_where_the_log_proves_that_it_is_the_jobs(
    tmp_path: Path, line: str, ours: bool
) -> None:
    folder = tmp_path / "jobs/gone.1"
    folder.mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"], cwd=folder, start_new_session=True) as sleeper:
        start = wait_for(lambda: processes.read(sleeper.pid)).start_ticks
        ticket = vanished(tmp_path, line.format(pid=sleeper.pid, start=start, later=start + 1))
        Local().reap(tmp_path)
        found = processes.alive(sleeper.pid, start)
        sleeper.kill()
    assert found != ours
    assert Local().collect(ticket).lost


@pytest.mark.parametrize(
    ("mode", "ours"),
    [("ab", True), ("rb", False)],  # a process that the last look missed; a person who reads the log there
)
def test_reap_ends_what_works_in_the_directory_and_writes_its_output_there(
    tmp_path: Path, mode: str, ours: bool
) -> None:
    folder = tmp_path / "jobs/gone.1"
    folder.mkdir(parents=True)
    (folder / "stdout.log").touch()
    with (
        open(folder / "stdout.log", mode) as log,
        subprocess.Popen(["sleep", "60"], cwd=folder, stdout=log, start_new_session=True) as sleeper,
    ):
        start = wait_for(lambda: processes.read(sleeper.pid)).start_ticks
        vanished(tmp_path)
        Local().reap(tmp_path)
        found = processes.alive(sleeper.pid, start)
        sleeper.kill()
    assert found != ours


def test_after_a_restart_of_the_host_a_job_is_lost_and_nothing_is_ended(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        start = wait_for(lambda: processes.read(sleeper.pid)).start_ticks
        ticket = vanished(tmp_path, f"process {sleeper.pid} {start} {sleeper.pid}")
        ticket = ticket.model_copy(update={"handle": ticket.handle | {"place": "another-boot/1"}})
        (Path(ticket.job_dir) / "ticket.json").write_text(ticket.model_dump_json())
        assert Local().reap(tmp_path) == ["gone.1 had lost its supervisor; nothing of it had to be ended"]
        found = processes.alive(sleeper.pid, start)
        sleeper.kill()
    assert found


def test_a_job_of_another_host_is_left_to_it(tmp_path: Path) -> None:
    ticket = vanished(tmp_path)
    ticket = ticket.model_copy(update={"handle": ticket.handle | {"host": "node-7"}})
    (Path(ticket.job_dir) / "ticket.json").write_text(ticket.model_dump_json())
    assert Local().reap(tmp_path) == ["gone.1 was started on node-7: only there can it be ended"]
    assert not (Path(ticket.job_dir) / "outcome.json").exists()
    assert Local().poll([ticket]) == set()


@pytest.fixture
def segment() -> Iterator[str]:
    """How the names of files in /dev/shm begin that nobody has made yet."""
    name = f"psm_test_{os.getpid()}_{time.monotonic_ns()}"
    yield name
    for path in shared_files(name):
        path.unlink()


def shared_files(name: str) -> list[Path]:
    return sorted(Path("/dev/shm").glob(f"{name}*"))


def test_shared_memory_of_a_killed_server_is_removed_and_a_strangers_is_not(tmp_path: Path, segment: str) -> None:
    backend = Local()
    ticket = submit(tmp_path, stub_jobs.job(hang_at_step=2, server=True, shared_memory=segment), backend)
    at_step(ticket, 1)
    (ours,) = wait_for(lambda: shared_files(segment))
    stranger = Path("/dev/shm", f"{segment}_of_a_stranger")
    stranger.write_bytes(b"made while the job ran")
    wait_for(lambda: ours.name in (Path(ticket.job_dir) / "pids.log").read_text())
    os.kill(by_role(ticket, "server")[0].pid, signal.SIGKILL)
    backend.cancel(ticket)
    found = ended(backend, ticket)
    assert f"removed from /dev/shm: {ours.name}" in found.detail
    assert shared_files(segment) == [stranger]


def test_reap_removes_shared_memory_that_the_log_names(tmp_path: Path, segment: str) -> None:
    path = Path("/dev/shm", segment)
    path.write_bytes(b"x")
    vanished(tmp_path, f"shared {path.stat().st_ino} {segment}")
    Local().reap(tmp_path)
    assert not path.exists()


def test_shared_memory_is_removed_even_where_the_supervisor_died_before_it_could_note_it(
    tmp_path: Path, segment: str
) -> None:
    backend = Local()
    ticket = submit(tmp_path, stub_jobs.job(hang_at_step=1, server=True, shared_memory=segment), backend)
    wait_for(lambda: shared_files(segment) and by_role(ticket, "server"))
    os.kill(supervisor_of(ticket), signal.SIGKILL)
    (Path(ticket.job_dir) / "pids.log").write_text("")
    assert ended(backend, ticket).lost
    assert shared_files(segment) == []


def test_shared_memory_stays_where_it_is_mapped_or_another_file_by_now(segment: str) -> None:
    path = Path("/dev/shm", segment)
    path.write_bytes(b"x" * 4096)
    inode = path.stat().st_ino
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        assert shared_memory.remove({segment: inode}, processes.pids()) == []
    assert shared_memory.remove({segment: inode + 1}, processes.pids()) == []
    assert shared_memory.remove({segment: inode}, processes.pids()) == [segment]


# ---------------------------------------------------------------- a full disk

FULL_DISK_SCRIPT = """
import json, os, subprocess, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from fakes import stub_jobs
from harness import backends
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", {disk!r}], check=True)
def fill():
    with open({disk!r} + "/filler", "ab", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass
backend, job = backends.get("local"), stub_jobs.job(steps=30, step_s=0.05)
folder = Path({disk!r}) / "jobs/a-job.1"
if {when!r} == "before":
    Path({disk!r}, "jobs").mkdir()
    fill()
ticket = backend.submit(job, stub_jobs.command(job, folder), folder)
time.sleep(0.5)
fill()
while not backend.poll([ticket]):
    time.sleep(0.05)
print(backend.collect(ticket).model_dump_json())
print((folder / "stderr.log").read_text(), file=sys.stderr)
"""


def on_a_full_disk(tmp_path: Path, when: str) -> subprocess.CompletedProcess[str]:
    """Run a job on a disk of 1 MiB that is full before or after its start."""
    namespace = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode != 0:
        pytest.skip("no user namespaces here, so no disk to fill")
    tests = str(Path(__file__).parent)
    script = FULL_DISK_SCRIPT.format(root=str(stub_jobs.ROOT), tests=tests, disk=str(tmp_path), when=when)
    return subprocess.run([*namespace, sys.executable, "-c", script], capture_output=True, text=True, timeout=60)


def test_a_disk_that_fills_while_a_job_runs_does_not_lose_its_outcome(tmp_path: Path) -> None:
    found = on_a_full_disk(tmp_path, "after")
    assert found.returncode == 0, found.stderr
    outcome = Outcome.model_validate_json(found.stdout)
    assert not outcome.lost
    assert outcome.exit_code == 1  # the payload could not write its events, and said so


def test_on_a_full_disk_nothing_is_started_and_a_person_is_told(tmp_path: Path) -> None:
    found = on_a_full_disk(tmp_path, "before")
    assert found.returncode == 1
    assert "HarnessError: cannot start a-job.1: No space left on device" in found.stderr


def test_a_reserved_file_is_written_once_there_is_space_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "outcome.json"
    reserved = durable.Reserved(str(path))
    refusals = iter([OSError(28, "No space left on device"), OSError(122, "Disk quota exceeded")])
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if error := next(refusals, None):
            raise error
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    reserved.save("late but whole")
    assert path.read_text() == "late but whole"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_stays_full_is_an_error_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    reserved = durable.Reserved(str(tmp_path / "outcome.json"))
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        reserved.save("never", retry_s=0)
    assert not (tmp_path / "outcome.json").exists()


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ticket.json"
    durable.write_atomically(str(path), "old")

    def fsync(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        durable.write_atomically(str(path), "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------- host memory

VMSTAT = "nr_free_pages 123\noom_kill 2\nnuma_hit 5\n"
VERSION_2 = "low 0\nhigh 0\nmax 12\noom 1\noom_kill 1\noom_group_kill 0\n"
VERSION_1 = "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n"


@pytest.mark.parametrize(("text", "count"), [(VMSTAT, 2), (VERSION_2, 1), (VERSION_1, 7)])
def test_the_kernels_counters_of_memory_kills_are_read(tmp_path: Path, text: str, count: int) -> None:
    path = tmp_path / "counter"
    path.write_text(text)
    assert memory_pressure.kills([str(path), str(tmp_path / "missing")]) == {str(path): count}


def test_this_host_has_a_counter_of_memory_kills() -> None:
    assert memory_pressure.kills()["/proc/vmstat"] >= 0


def test_memory_kills_are_counted_from_the_jobs_start() -> None:
    assert memory_pressure.rose({"a": 1, "b": 2}, {"a": 1, "b": 3})
    assert not memory_pressure.rose({"a": 1, "b": 2}, {"a": 1, "b": 2, "new": 5})


def submit_with_counter(folder: Path, backend: Local, monkeypatch: pytest.MonkeyPatch, stub: dict[str, Any]) -> Ticket:
    """A job whose supervisor takes `folder/vmstat` for the kernel's only count of memory kills, which is 3."""
    folder.mkdir()
    counter, wrapper = folder / "vmstat", folder / "wrapped.py"
    counter.write_text("oom_kill 3\n")
    wrapper.write_text(
        f"import sys; sys.path.append({str(stub_jobs.ROOT)!r})\n"
        "from harness.backends import memory_pressure, supervisor\n"
        f"memory_pressure._counter_files = lambda: [{str(counter)!r}]\n"
        "supervisor.Supervisor(sys.argv[-1]).run()\n"
    )
    monkeypatch.setattr(supervisor, "__file__", str(wrapper))
    return submit(folder, stub_jobs.job(step_s=0.3, **stub), backend)


def test_killed_for_host_memory_takes_both_a_sigkill_and_the_kernels_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = Local()
    stubs: dict[str, dict[str, Any]] = {"killed": {"kill_at_step": 4}, "crashed": {"crash_at_step": 4}, "fine": {}}
    tickets = {
        (name, count): submit_with_counter(tmp_path / f"{name}-{count}", backend, monkeypatch, stub)
        for name, stub in stubs.items()
        for count in (3, 4)
    }
    for (name, count), ticket in tickets.items():
        at_step(ticket, 1)
        (tmp_path / f"{name}-{count}/vmstat").write_text(f"oom_kill {count}\n")
    found = [key for key, ticket in tickets.items() if ended(backend, ticket).host_oom_killed]
    assert found == [("killed", 4)]


OUT_OF_MEMORY_SCRIPT = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from fakes import stub_jobs
from harness import backends
Path({group!r}, "cgroup.procs").write_text(str(os.getpid()))
backend = backends.get("local")
job = stub_jobs.job(ranks=1, step_s=0.7, allocate_bytes=400 * 2**20)
folder = stub_jobs.job_dir(Path({run_dir!r}), job)
ticket = backend.submit(job, stub_jobs.command(job, folder), folder)
stub_jobs.wait_for(lambda: backend.poll([ticket]))
print(backend.collect(ticket).model_dump_json())
"""


@pytest.fixture
def small_memory() -> Iterator[Path]:
    """A memory cgroup of 200 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root makes a memory cgroup")
    version_1 = Path("/sys/fs/cgroup/memory")
    group = (version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")) / f"harness-test-{os.getpid()}"
    limit = group / ("memory.limit_in_bytes" if version_1.is_dir() else "memory.max")
    try:
        group.mkdir()
        limit.write_text(str(200 * 2**20))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield group
    wait_for(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


def test_a_rank_that_the_kernel_kills_for_memory_is_told_from_other_kills(tmp_path: Path, small_memory: Path) -> None:
    tests = str(Path(__file__).parent)
    script = OUT_OF_MEMORY_SCRIPT.format(
        root=str(stub_jobs.ROOT), tests=tests, group=str(small_memory), run_dir=str(tmp_path)
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    assert Outcome.model_validate_json(found.stdout).host_oom_killed
