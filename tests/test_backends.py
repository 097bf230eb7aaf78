"""The contract of a backend, held against each of them; a new backend is one line of `SETTINGS`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from fakes import containers, slurm_sites, stub_jobs

from harness import backends, schema
from harness.errors import HarnessError
from harness.schema import Command, Job, Outcome, Ticket

Prepare = Callable[[Job, bool], None]


@dataclass
class Setting:
    """A backend in a run directory of its own."""

    name: str
    run_dir: Path
    prepare: Prepare
    """What has to be done before `job` (to be cancelled or not) can be submitted."""
    command: Callable[[Job, Path], Command] = stub_jobs.command
    """The job in its box."""

    def open(self) -> backends.Backend:
        """A backend as another process would open it."""
        return backends.get(self.name)

    def submit(self, job: Job, backend: backends.Backend, *, cancelled: bool = False) -> Ticket:
        self.prepare(job, cancelled)
        folder = stub_jobs.job_dir(self.run_dir, job)
        return backend.submit(job, self.command(job, folder), folder)

    def run(self, job: Job) -> tuple[Ticket, Outcome]:
        backend = self.open()
        ticket = self.submit(job, backend)
        return ticket, ended(backend, ticket)


def ended(backend: backends.Backend, ticket: Ticket) -> Outcome:
    stub_jobs.wait_for(lambda: backend.poll([ticket]) == {ticket.job_id})
    return backend.collect(ticket)


def _local(folder: Path) -> Setting:
    return Setting("local", folder / "run", lambda job, cancelled: None)


def _containers(folder: Path) -> Setting:
    """The local backend with jobs in containers: not of its own process tree, and the same contract."""
    root = containers.checkout(folder / "checkout")
    return Setting("local", folder / "run", lambda *_: None, lambda job, where: containers.command(job, where, root))


def _replay(folder: Path) -> Setting:
    cassette = folder / "cassette"

    def record(job: Job, cancelled: bool) -> None:
        backend, where = backends.get("local"), stub_jobs.job_dir(cassette, job)
        ticket = backend.submit(job, stub_jobs.command(job, where), where)
        if cancelled:
            backend.cancel(ticket)
        ended(backend, ticket)

    (cassette / "jobs").mkdir(parents=True)
    return Setting(f"replay:{cassette}", folder / "run", record)


def _slurm(folder: Path) -> Setting:
    site = slurm_sites.write(folder / "shared")
    return Setting(f"slurm:{site}", folder / "shared" / "run", lambda job, cancelled: None)


def _fake_slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    slurm_sites.fake(folder, monkeypatch)
    return _slurm(folder)


SETTINGS = [
    pytest.param(_local, id="local"),
    pytest.param(_replay, id="replay"),
    pytest.param(_fake_slurm, id="slurm, fake"),
    pytest.param(_slurm, id="slurm", marks=pytest.mark.slurm),
    pytest.param(_containers, id="local, containers", marks=pytest.mark.docker),
]


@pytest.fixture(params=SETTINGS)
def setting(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    faked = (monkeypatch,) if request.param is _fake_slurm else ()
    made: Setting = request.param(tmp_path, *faked)
    return made


def test_submit_returns_with_the_job_its_files_and_its_ticket_on_disk(setting: Setting) -> None:
    backend, job = setting.open(), stub_jobs.job()
    ticket = setting.submit(job, backend)
    folder = Path(ticket.job_dir)
    assert folder == stub_jobs.job_dir(setting.run_dir, job).resolve()
    assert json.loads((folder / "job.json").read_text()) == job.payload
    assert (folder / "notes/small.txt").read_text() == "laid by the backend\n"
    assert Ticket.model_validate_json((folder / "ticket.json").read_text()) == ticket
    assert (ticket.job_id, ticket.backend) == (job.id, backend.name)
    ended(backend, ticket)


@pytest.mark.parametrize(
    ("stub", "expected"),
    [
        ({}, {"exit_code": 0, "signal": None}),
        ({"exit_code": 3}, {"exit_code": 3, "signal": None}),
        ({"crash_at_step": 2}, {"exit_code": 1, "signal": None}),
    ],
)
def test_the_outcome_says_how_the_job_ended(setting: Setting, stub: dict[str, int], expected: dict[str, int]) -> None:
    _, outcome = setting.run(stub_jobs.job(**stub))
    found = outcome.model_dump()
    assert {name: found[name] for name in expected} == expected
    assert outcome.ok == (expected["exit_code"] == 0)
    assert not any(found[flag] for flag in ("timed_out", "stalled", "interrupted", "lost", "host_oom_killed"))
    assert 0 < outcome.end - outcome.start < 10


def test_run_files_lie_in_the_job_directory_after_collect(setting: Setting) -> None:
    ticket, _ = setting.run(stub_jobs.job(ranks=3, crash_at_step=3))
    folder = Path(ticket.job_dir)
    assert {path.name for path in folder.glob("events.*")} == {f"events.rank{rank}.jsonl" for rank in range(3)}
    assert "illegal memory access" in (folder / "stderr.log").read_text()
    assert schema.Outcome.model_validate_json((folder / "outcome.json").read_text()).exit_code == 1


def test_another_process_collects_the_same_from_the_ticket_on_disk(setting: Setting) -> None:
    ticket, outcome = setting.run(stub_jobs.job(exit_code=5))
    from_disk = Ticket.model_validate_json((Path(ticket.job_dir) / "ticket.json").read_text())
    assert ended(setting.open(), from_disk) == outcome
    assert setting.open().collect(from_disk) == outcome


def test_poll_names_ended_jobs_alone_and_takes_several(setting: Setting) -> None:
    backend = setting.open()
    tickets = [setting.submit(stub_jobs.job(f"job-{number}", steps=2), backend) for number in range(3)]
    assert backend.poll([]) == set()
    assert ended(backend, tickets[1]).ok
    stub_jobs.wait_for(lambda: backend.poll(tickets) == {"job-0", "job-1", "job-2"})
    assert backend.poll(tickets[:1]) == {"job-0"}
    assert all(backend.collect(ticket).ok for ticket in tickets)


def test_a_job_cancelled_from_another_process_ends_as_interrupted(setting: Setting) -> None:
    backend = setting.open()
    ticket = setting.submit(stub_jobs.job(hang_at_step=1), backend, cancelled=True)
    from_disk = Ticket.model_validate_json((Path(ticket.job_dir) / "ticket.json").read_text())
    setting.open().cancel(from_disk)
    outcome = ended(backend, ticket)
    assert outcome.interrupted
    assert not outcome.ok
    assert not outcome.lost


def test_cancelling_an_ended_job_changes_nothing(setting: Setting) -> None:
    ticket, outcome = setting.run(stub_jobs.job())
    setting.open().cancel(ticket)
    assert setting.open().collect(ticket) == outcome


def test_reaping_a_run_in_which_nothing_is_at_work_says_and_changes_nothing(setting: Setting) -> None:
    setting.run(stub_jobs.job())
    before = {path: path.read_bytes() for path in setting.run_dir.rglob("*") if path.is_file()}
    assert setting.open().reap(setting.run_dir) == []
    assert {path: path.read_bytes() for path in setting.run_dir.rglob("*") if path.is_file()} == before
    assert setting.open().reap(setting.run_dir / "never-was") == []


def test_a_directory_is_used_once(setting: Setting) -> None:
    job = stub_jobs.job()
    ticket, _ = setting.run(job)
    folder = Path(ticket.job_dir)
    with pytest.raises(HarnessError, match="started before"):
        setting.open().submit(job, stub_jobs.command(job, folder), folder)


def test_no_token_of_the_control_plane_reaches_a_file(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_not_for_files")
    ticket, _ = setting.run(stub_jobs.job())
    texts = [path.read_bytes() for path in Path(ticket.job_dir).rglob("*") if path.is_file()]
    assert len(texts) > 5
    assert not any(b"hf_not_for_files" in text for text in texts)


def test_an_unknown_backend_is_named_with_the_nearest() -> None:
    with pytest.raises(HarnessError, match="no backend 'locale'") as caught:
        backends.get("locale")
    assert "did you mean 'local'" in caught.value.hint


def test_the_local_backend_takes_no_argument() -> None:
    with pytest.raises(HarnessError, match="takes no argument"):
        backends.get("local:here")


# ---------------------------------------------------------------- what replay alone promises


@pytest.fixture
def recorded(tmp_path: Path) -> Setting:
    return _replay(tmp_path)


def test_replay_plays_the_same_attempt_where_it_was_recorded_else_the_last_that_ended(recorded: Setting) -> None:
    cassette = Path(recorded.name.partition(":")[2])
    for attempt in (1, 2, 10):
        folder = cassette / "jobs" / f"a-job.{attempt}"
        folder.mkdir()
        outcome = Outcome(exit_code=attempt, start=1.0, end=2.0)
        (folder / "outcome.json").write_text(outcome.model_dump_json())
    (cassette / "jobs/a-job.11").mkdir()
    backend, job = recorded.open(), stub_jobs.job()
    played = {}
    for attempt in (2, 7):
        folder = stub_jobs.job_dir(recorded.run_dir, job, attempt)
        ticket = backend.submit(job, stub_jobs.command(job, folder), folder)
        played[attempt] = backend.collect(ticket).exit_code
    assert played == {2: 2, 7: 10}


def test_replay_names_the_nearest_job_where_one_was_not_recorded(recorded: Setting) -> None:
    recorded.prepare(stub_jobs.job("train-tiny-lora"), False)
    job = stub_jobs.job("train-tiny-qlora")
    folder = stub_jobs.job_dir(recorded.run_dir, job)
    with pytest.raises(HarnessError, match="no recording of job train-tiny-qlora") as caught:
        recorded.open().submit(job, stub_jobs.command(job, folder), folder)
    assert "train-tiny-lora" in caught.value.hint
    assert not folder.exists()


def test_replay_wants_a_run_directory(tmp_path: Path) -> None:
    for argument in ("", f":{tmp_path}", ":/nowhere"):
        with pytest.raises(HarnessError) as caught:
            backends.get(f"replay{argument}")
        assert "--backend replay:" in caught.value.hint


def test_replay_leaves_tickets_and_large_files_of_the_recording_behind(recorded: Setting) -> None:
    job = stub_jobs.job()
    recorded.prepare(job, False)
    cassette = stub_jobs.job_dir(Path(recorded.name.partition(":")[2]), job)
    (cassette / "artifacts").mkdir()
    (cassette / "artifacts/model.safetensors").write_bytes(b"large")
    (cassette / "logs").mkdir()
    (cassette / "logs/job.json").write_text("a log that only has the name")
    folder = stub_jobs.job_dir(recorded.run_dir, job)
    ticket = recorded.open().submit(job, stub_jobs.command(job, folder), folder)
    assert ticket.backend == "replay"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    assert not names & {"artifacts", "pids.log", "supervisor.json"}
    assert {"logs/job.json", "events.rank0.jsonl", "outcome.json", "ticket.json"} <= names
