"""Jobs in real containers: what they may reach, how they end, and that nothing of them stays. With stub payloads.

The real payloads in the real images are tests/e2e/test_in_containers.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import containers, stub_jobs
from fakes.containers import left
from fakes.stub_jobs import wait_for
from fakes.stub_run import FOUR, Bench, failure, status

from harness import backends, boxes
from harness.boxes.docker import DockerBox
from harness.errors import HarnessError
from harness.schema import Job, Outcome, Ticket

pytestmark = [pytest.mark.docker, pytest.mark.timeout(300)]

ROOT = containers.ROOT
SLOW = [("*", {"step_s": 60})]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return containers.checkout(tmp_path / "checkout")


@pytest.fixture
def start(tmp_path: Path, checkout: Path) -> Iterator[Callable[[Job], tuple[backends.Backend, Ticket]]]:
    """Submits a stub job in a container; nothing of it is left after the test."""
    backend, tickets = backends.get("local"), []

    def submit(job: Job) -> tuple[backends.Backend, Ticket]:
        folder = stub_jobs.job_dir(tmp_path / "run", job)
        tickets.append(backend.submit(job, containers.command(job, folder, checkout), folder))
        return backend, tickets[-1]

    yield submit
    for ticket in tickets:
        backend.cancel(ticket)
        wait_for(lambda ticket=ticket: backend.poll([ticket]), 60)
    assert left(tmp_path / "run") == []


def ended(backend: backends.Backend, ticket: Ticket) -> Outcome:
    wait_for(lambda: backend.poll([ticket]), 60)
    return backend.collect(ticket)


def script(text: str, **changed: Any) -> Job:
    """A job that runs this Python."""
    return stub_jobs.job().model_copy(update={"argv": ("python", "-c", text)} | changed)


def running(ticket: Ticket) -> None:
    wait_for(lambda: list(Path(ticket.job_dir).glob("events.rank*.jsonl")), 60)


# ---------------------------------------------------------------- what a container may reach

LOOK = """
import json, os, resource, socket, urllib.request
def refused(act):
    try:
        act()
    except OSError as error:
        return type(error).__name__
    return None
def write(path):
    open(path, "w").close()
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
disk = os.statvfs("/dev/shm")
json.dump({
    "interfaces": os.listdir("/sys/class/net"),
    "connect": refused(lambda: socket.create_connection(("192.0.2.1", 53), 5)),
    "host": refused(lambda: socket.create_connection((os.environ["HOST_ADDRESS"], int(os.environ["PORT"])), 5)),
    "loopback": refused(lambda: socket.create_server(("127.0.0.1", 0)).close()),
    "root": refused(lambda: write("/etc/mine")),
    "home": refused(lambda: write("/usr/mine")),
    "checkout": refused(lambda: write(os.environ["PYTHONPATH"] + "/mine")),
    "payload": refused(lambda: write("../../payload/mine")),
    "elsewhere": os.path.exists(os.environ["SECRET_PLACE"]),
    "temporary": refused(lambda: write("/tmp/mine")),
    "capabilities": status["CapEff"].strip(), "bounding": status["CapBnd"].strip(),
    "no_new_privileges": status["NoNewPrivs"].strip(),
    "shm_bytes": disk.f_blocks * disk.f_frsize,
    "stack": resource.getrlimit(resource.RLIMIT_STACK)[0],
    "gpus": [name for name in os.listdir("/dev") if name.startswith("nvidia")],
    "secret": "HF_TOKEN" in os.environ, "names": sorted(os.environ),
}, open("seen.json", "w"))
"""


def test_what_a_payload_sees_and_may_do(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    (tmp_path / "secret").write_text("not for payloads")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        env = {"SECRET_PLACE": str(tmp_path / "secret"), "HOST_ADDRESS": "127.0.0.1",
               "PORT": str(listening.getsockname()[1])}  # fmt: skip
        backend, ticket = start(script(LOOK, env=env))
        assert ended(backend, ticket).ok, (Path(ticket.job_dir) / "stderr.log").read_text()
    path = Path(ticket.job_dir) / "seen.json"
    seen = json.loads(path.read_text())
    assert seen["interfaces"] == ["lo"]
    assert (seen["connect"], seen["host"], seen["loopback"]) == ("OSError", "ConnectionRefusedError", None)
    assert (seen["root"], seen["home"], seen["checkout"], seen["payload"]) == ("OSError",) * 4
    assert not seen["elsewhere"]
    assert seen["temporary"] is None
    assert int(seen["capabilities"], 16) == int(seen["bounding"], 16) == 0
    assert seen["no_new_privileges"] == "1"
    assert (seen["shm_bytes"], seen["stack"]) == (16 * 2**30, 64 * 2**20)
    assert (seen["gpus"], seen["secret"]) == ([], False)
    assert (path.stat().st_uid, path.stat().st_gid) == (os.getuid(), os.getgid())


def test_the_log_can_be_read_while_the_job_runs(start: Any) -> None:
    _, ticket = start(script("import time; print('first words', flush=True); time.sleep(600)"))
    log = Path(ticket.job_dir) / "stdout.log"
    wait_for(lambda: log.exists() and "first words" in log.read_text(), 30)
    assert not (Path(ticket.job_dir) / "outcome.json").exists()


# ---------------------------------------------------------------- how it ends


def test_a_container_that_needs_more_memory_than_it_may_is_told_from_one_that_fails(start: Any) -> None:
    hungry = "import time; held = bytearray(400 * 2**20); time.sleep(5)"
    assert ended(*start(script(hungry, id="enough"))).ok
    outcome = ended(*start(script(hungry, id="hungry", host_memory_gib=0.1)))
    assert outcome.host_oom_killed
    assert not outcome.ok
    failed = ended(*start(script("raise SystemExit(3)", id="failed", host_memory_gib=0.1)))
    assert (failed.exit_code, failed.host_oom_killed) == (3, False)


@pytest.mark.parametrize("limits", [{"time_limit_s": 4.0}, {"stall_s": 4.0}], ids=["time limit", "stalled"])
def test_a_container_that_takes_too_long_is_ended_and_removed(start: Any, tmp_path: Path, limits: Any) -> None:
    backend, ticket = start(stub_jobs.job(hang_at_step=2, **limits))
    running(ticket)
    assert len(left(tmp_path / "run")) == 1
    outcome = ended(backend, ticket)
    assert (outcome.timed_out, outcome.stalled) == ("time_limit_s" in limits, "stall_s" in limits)
    assert left(tmp_path / "run") == []
    if outcome.stalled:
        folder = Path(ticket.job_dir)
        stacks = [path.read_text() for path in sorted(folder.glob("stacks.rank*.txt"))]
        assert len(stacks) == 2
        assert all("stub_payload.py" in text for text in stacks)
        assert len(json.loads((folder / "stall.json").read_text())["asked_for_stacks"]) == 2


def test_a_payload_that_hears_no_signal_is_ended_too(start: Any, tmp_path: Path) -> None:
    backend, ticket = start(stub_jobs.job(hang_at_step=1, ignore_sigterm=True))
    running(ticket)
    backend.cancel(ticket)
    assert ended(backend, ticket).interrupted
    assert left(tmp_path / "run") == []


def test_a_killed_supervisor_leaves_a_container_that_the_next_start_removes(start: Any, tmp_path: Path) -> None:
    backend, ticket = start(stub_jobs.job(hang_at_step=1, ignore_sigterm=True))
    running(ticket)
    os.kill(int(ticket.handle["pid"]), signal.SIGKILL)
    wait_for(lambda: backend.poll([ticket]))
    assert len(left(tmp_path / "run")) == 1
    (line,) = backends.get("local").reap(tmp_path / "run")
    assert "lost its supervisor" in line
    assert left(tmp_path / "run") == []
    assert backend.collect(ticket).lost


# ---------------------------------------------------------------- whole runs


@pytest.fixture
def bench(tmp_path: Path, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Runs in this process whose box `docker` starts stubs."""
    box = containers.StubDocker(checkout)
    monkeypatch.setitem(boxes.REGISTRY, "docker", lambda _: box)
    return Bench(tmp_path, box)


@pytest.fixture
def harness(bench: Bench, checkout: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """The same run in a process of its own, at work on its first job."""
    started: list[subprocess.Popen[str]] = []

    def call(behaviour: Any) -> subprocess.Popen[str]:
        stubs = bench.folder / "stubs.json"
        stubs.write_text(json.dumps(behaviour))
        bench.matrix.write_text(FOUR)
        argv = ["run", str(bench.matrix), "--runs", str(bench.runs), "--box", "docker"]
        env = os.environ | {"STUBS": str(stubs), "STUB_CHECKOUT": str(checkout)}
        started.append(
            subprocess.Popen(
                [sys.executable, str(containers.__file__), *argv], env=env, text=True, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                # As from a terminal: what a shell starts in the background ignores Ctrl-C.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        )  # fmt: skip
        wait_for(lambda: any(bench.directory.jobs_dir.glob("*/events.rank0.jsonl")) or started[-1].poll(), 60)
        assert started[-1].poll() is None, started[-1].communicate()
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.communicate()


def test_ctrl_c_leaves_no_container_and_a_second_run_goes_on(bench: Bench, harness: Any) -> None:
    control = harness([("*-full-s64-*", {"step_s": 60})])
    wait_for(lambda: any(bench.directory.jobs_dir.glob("*-full-s64-*/events.rank0.jsonl")), 120)
    before = bench.stamps()
    control.send_signal(signal.SIGINT)
    _, err = control.communicate(timeout=60)
    assert (control.returncode, "finished cases are kept" in err) == (130, True)
    assert left(bench.directory.folder) == []
    result = bench.run(box="docker")
    assert status(result.records) == {"measured": 4}
    assert before
    assert before.items() <= bench.stamps().items()
    assert left(bench.directory.folder) == []
    digests = {one.digest for record in result.records for one in record.provenance.environments}
    assert digests == {containers.image()}


def test_a_killed_control_plane_leaves_no_container(bench: Bench, harness: Any) -> None:
    control = harness(SLOW)
    assert len(left(bench.directory.folder)) == 1
    control.kill()
    wait_for(lambda: left(bench.directory.folder) == [], 60)


def test_a_container_of_a_run_directory_that_is_gone_is_removed_at_its_next_start(bench: Bench) -> None:
    label = f"harness.run={bench.directory.folder.resolve()}"
    containers.docker("container", "create", "--label", label, "--network", "none", containers.image(), "true")
    assert len(left(bench.directory.folder)) == 1
    result = bench.run(box="docker", only="*-lora-s64-*")
    assert left(bench.directory.folder) == []
    assert ["removed the container" in note for note in result.notes] == [True]


def test_an_image_that_the_engine_lacks_is_refused(tmp_path: Path) -> None:
    from fakes import fake_engine

    fake_engine.lock(tmp_path)
    with pytest.raises(HarnessError, match="this Engine does not have the train-cpu image") as caught:
        DockerBox(tmp_path).environment("train")
    assert "harness build train --variant cpu" in str(caught.value.hint)


@pytest.fixture
def own_engine(monkeypatch: pytest.MonkeyPatch, checkout: Path) -> Iterator[Callable[[str], None]]:
    """An Engine that a test may stop and start; it has the stubs' image."""
    if os.geteuid() != 0:
        pytest.skip("an Engine of its own needs root")
    with tempfile.TemporaryDirectory(prefix="engine-", dir="/tmp") as folder, tempfile.TemporaryFile() as image:
        subprocess.run(["docker", "image", "save", containers.image()], stdout=image, check=True)
        image.seek(0)

        def engine(verb: str) -> None:
            subprocess.run([str(ROOT / "tools/engine"), verb, folder], capture_output=True, check=True, timeout=120)

        engine("start")
        try:
            monkeypatch.setenv("DOCKER_HOST", f"unix://{folder}/engine.sock")
            subprocess.run(["docker", "image", "load"], stdin=image, capture_output=True, check=True)
            yield engine
        finally:
            engine("stop")


def test_an_engine_stopped_in_mid_run_loses_no_finished_case(bench: Bench, own_engine: Callable[[str], None]) -> None:
    bench.box.behaviour = [("*-full-*", {"step_s": 60})]
    stopped: list[dict[Path, int]] = []

    def watch(progress: Any) -> None:
        if not stopped and any(bench.directory.jobs_dir.glob("*-full-*/events.rank0.jsonl")):
            stopped.append(bench.stamps())
            own_engine("stop")

    result = bench.run(watch=watch, box="docker")
    (before,) = stopped
    assert len(before) == 2
    assert before.items() <= bench.stamps().items()
    assert status(result.records) == {"measured": 2, "failed": 2}
    failed = [record for record in result.records if record.status == "failed"]
    assert {failure(record) for record in failed} == {"interrupted"}
    said = [record.last.diagnosis.summary for record in failed if record.last and record.last.diagnosis]
    assert all("the Docker Engine did not answer" in sentence for sentence in said), said
    details = [record.last.jobs[-1].outcome.detail for record in failed if record.last]
    assert all("the Docker Engine did not answer at its end" in detail for detail in details), details
    assert bench.working() == []
    own_engine("start")
    bench.box.behaviour = []
    assert status(bench.run(box="docker").records) == {"measured": 4}
    assert before.items() <= bench.stamps().items()
    assert left(bench.directory.folder) == []
