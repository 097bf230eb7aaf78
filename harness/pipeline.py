"""plan -> submit -> collect -> observe -> diagnose -> store -> report: the only place that knows the order."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import harness
from harness import backends, boxes, host, launch, matrix, observe, results, schema, store, triage
from harness.errors import HarnessError
from harness.schema import Attempt, Job, JobRun, Outcome, Plan, Provenance, Record, Ticket

POLL_S = 0.25
MAX_LOST = 2
"""How often one run starts a job again that ended without a word of its own, before that is its result."""
TAIL_BYTES = 65_536

PACKAGE = Path(harness.__file__).parent
Case = schema.TrainCase | schema.ServeCase | schema.ChainCase


@dataclass(frozen=True)
class Options:
    """How to run a matrix on this machine."""

    runs: Path = Path("runs")
    backend: str = "local"
    box: str = "venv"
    only: str | None = None
    """A shell pattern over case ids; the others are left for another time."""
    retry_failed: bool = False
    keep_artifacts: bool = False


@dataclass(frozen=True)
class Running:
    """A job at work, as the live view shows it."""

    job: Job
    started_at: float
    live: observe.Live


@dataclass(frozen=True)
class Progress:
    """Where a run stands."""

    total: int
    records: tuple[Record, ...]
    kept: int
    """Of the records, those that an earlier call had measured."""
    running: tuple[Running, ...]
    seconds_left: float | None
    """An estimate from the mean of the cases done so far."""


@dataclass(frozen=True)
class Result:
    """What a call of `run` leaves behind."""

    run: store.Run
    records: tuple[Record, ...]
    kept: int
    page: Path
    notes: tuple[str, ...]

    @property
    def failed(self) -> tuple[Record, ...]:
        """The cases that failed."""
        return tuple(record for record in self.records if record.status == "failed")


@dataclass
class Work:
    """Cases on their way through their jobs."""

    cases: tuple[Case, ...]
    attempt: int
    jobs: tuple[Job, ...]
    tickets: list[Ticket] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    devices: frozenset[str] = frozenset()
    started_at: float = 0.0

    @property
    def job(self) -> Job:
        """The job that is at work, or the next to start."""
        return self.jobs[min(len(self.outcomes), len(self.jobs) - 1)]

    @property
    def at_work(self) -> Ticket | None:
        """The ticket of the job that has started and not been collected."""
        return self.tickets[-1] if len(self.tickets) > len(self.outcomes) else None

    @property
    def over(self) -> bool:
        """No job of it is left to run."""
        return len(self.outcomes) == len(self.jobs) or bool(self.outcomes and not self.outcomes[-1].ok)


@dataclass
class Session:
    """One call of `run`: what stays the same throughout, and what is done so far."""

    plan: Plan
    run: store.Run
    options: Options
    backend: backends.Backend
    box: boxes.Box
    provenance: Provenance
    cases: tuple[Case, ...]
    """Cases of the plan that this call looks after."""
    free: set[str]
    """Slots: `cpu` for the host as a whole, and the index of each GPU."""
    done: dict[str, Record] = field(default_factory=dict)
    kept: int = 0
    lost: dict[str, int] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)


def run(path: Path, options: Options, watch: Callable[[Progress], None] = lambda _: None) -> Result:
    """Take the matrix at `path` to records and a report; resumes what its run directory already holds."""
    plan = matrix.load(path)
    directory = store.Run(options.runs / plan.name)
    with directory.locked(), _full_disk_explained(directory):
        session = _begin(plan, directory, options)
        notes = session.backend.reap(directory.folder)
        _record_skips(session)
        _work_through(session, _pending(session), watch)
        records = tuple(directory.records())
        page = results.render(directory)
    return Result(directory, records, session.kept, page, tuple(notes))


def pending(path: Path, options: Options) -> tuple[Plan, list[Case]]:
    """The plan, and its cases that `run` would measure now."""
    plan = matrix.load(path)
    directory = store.Run(options.runs / plan.name)
    return plan, [case for case in _chosen(plan, options) if not _stands(directory, case, options)]


def cancel(directory: store.Run) -> list[str]:
    """End a run: its control plane if one is at work on this host, then whatever that left; lines for a person."""
    lines = []
    owner = directory.owner()
    if owner:
        os.kill(owner, signal.SIGINT)
        lines.append(f"asked the harness at work (pid {owner}) to stop")
        _wait_until(lambda: directory.owner() is None, seconds=60)
    lines += backends.get(directory.info().backend).reap(directory.folder)
    return lines or ["nothing of this run was at work"]


def commands(plan: Plan, pattern: str, box_name: str) -> list[dict[str, str]]:
    """The command line of each case whose id matches `pattern`, as text that a shell takes."""
    box = boxes.get(box_name)
    found = []
    for case in plan.cases:
        if fnmatch.fnmatch(schema.case_id(case), pattern):
            found += [_command_text(box, case, job) for job in launch.jobs((case,), 1)]
    if not found:
        raise HarnessError(f"{pattern!r} matches none of the plan's cases", f"`harness plan {plan.source}` lists them")
    return found


def _command_text(box: boxes.Box, case: Case, job: Job) -> dict[str, str]:
    folder = Path("jobs") / f"{job.id}.1"
    command = box.wrap(job, folder, Path("payload"))
    env = " ".join(f"{name}={shlex.quote(value)}" for name, value in sorted(job.env.items()))
    shell = f"cd {shlex.quote(str(folder))} && env {env} {shlex.join(command.argv)}"
    return {"case": schema.case_id(case), "job": job.id, "environment": job.environment, "shell": shell}


# ---------------------------------------------------------------- before the first job


def _begin(plan: Plan, directory: store.Run, options: Options) -> Session:
    box = boxes.get(options.box)
    environments = tuple(box.environment(name) for name in _environments(plan))
    directory.begin(plan, backend=options.backend, box=box.name, environments=environments)
    gpus, driver = host.gpus()
    provenance = Provenance(
        number_kind="replayed" if options.backend == "replay" else "measured",
        harness_version=harness.__version__,
        commit=host.commit(PACKAGE.parent),
        payload_sha256=directory.stage_payload(PACKAGE),
        matrix_sha256=plan.matrix_sha256,
        backend=options.backend,
        environments=environments,
        hosts=(os.uname().nodename,),
        cpu=host.cpu_name(),
        cpu_count=host.cpu_count(),
        memory_bytes=host.memory_bytes(),
        gpus=gpus,
        driver=driver,
        weights="random",
    )
    return Session(
        plan=plan,
        run=directory,
        options=options,
        backend=backends.get(options.backend),
        box=box,
        provenance=provenance,
        cases=tuple(_chosen(plan, options)),
        free={"cpu", *(str(gpu.index) for gpu in gpus)},
    )


def _environments(plan: Plan) -> list[schema.EnvironmentName]:
    """Names of the environments that any job of the plan runs in."""
    kinds = {case.kind for case in plan.cases}
    wanted: dict[schema.EnvironmentName, set[str]] = {"train": {"train", "chain"}, "serve": {"serve", "chain"}}
    return [name for name, users in wanted.items() if kinds & users]


def _chosen(plan: Plan, options: Options) -> list[Case]:
    pattern = options.only
    chosen = [case for case in plan.cases if not pattern or fnmatch.fnmatch(schema.case_id(case), pattern)]
    if pattern and not chosen:
        raise HarnessError(
            f"--only {pattern!r} matches none of the plan's cases", f"`harness plan {plan.source}` lists them"
        )
    return chosen


def _stands(directory: store.Run, case: Case, options: Options) -> bool:
    """Whether the case has a record that this call keeps."""
    record = directory.record(schema.case_id(case))
    kept = ("measured",) if options.retry_failed else ("measured", "failed")
    return record is not None and record.status in kept


def _record_skips(session: Session) -> None:
    for skip in session.plan.skips:
        case_id = schema.case_id(skip.case)
        if skip.rule != "duplicate" and session.run.record(case_id) is None:
            session.run.save(_skipped(skip))


def _skipped(skip: schema.Skip) -> Record:
    return Record(
        case_id=schema.case_id(skip.case),
        case=skip.case,
        status="skipped",
        skip_rule=skip.rule,
        skip_reason=skip.reason,
        finished_at=time.time(),
    )


def _pending(session: Session) -> list[Work]:
    """The work left, in the plan's order; what this host cannot give becomes a skip with its reason."""
    todo: list[Case] = []
    for case in session.cases:
        case_id = schema.case_id(case)
        record = session.run.record(case_id)
        if record is not None and _stands(session.run, case, session.options):
            session.done[case_id] = record
            session.kept += 1
        elif reason := _lacking(session, case):
            _keep(session, _skipped(schema.Skip(case=case, rule="host_lacks_gpus", reason=reason)))
        else:
            todo.append(case)
    return [_work(session, cases) for cases in launch.group(todo)]


def _lacking(session: Session, case: Case) -> str | None:
    gpus = len(session.provenance.gpus)
    if case.device == "cuda" and case.devices > gpus:
        return f"needs {case.devices} GPU{'s' if case.devices > 1 else ''}; this host shows {gpus}"
    return None


def _work(session: Session, cases: tuple[Case, ...]) -> Work:
    """The next attempt at these cases, or the last one where its jobs ended and only the record is missing."""
    first = launch.jobs(cases, 1)
    numbers = session.run.attempts(first[0].id)
    latest = numbers[-1] if numbers else 0
    if latest and not session.options.retry_failed:
        finished = Work(cases, latest, launch.jobs(cases, latest))
        if _take_up(session, finished):
            return finished
    return Work(cases, latest + 1, launch.jobs(cases, latest + 1))


def _take_up(session: Session, work: Work) -> bool:
    """Fill in the outcomes that an earlier control plane left; False where the attempt has to be made again."""
    for job in work.jobs:
        ticket = session.run.ticket(job.id, work.attempt)
        outcome = session.run.outcome(job.id, work.attempt)
        if ticket is None or outcome is None or outcome.interrupted or outcome.lost:
            return False
        work.tickets.append(ticket)
        work.outcomes.append(outcome)
        if not outcome.ok:
            return True
    return True


# ---------------------------------------------------------------- the loop


def _work_through(session: Session, waiting: list[Work], watch: Callable[[Progress], None]) -> None:
    active: list[Work] = []
    try:
        while waiting or active:
            _start_what_fits(session, waiting, active)
            ended = session.backend.poll([work.at_work for work in active if work.at_work])
            for work in [work for work in active if work.over or work.job.id in ended]:
                _advance(session, work, waiting, active)
            watch(_progress(session, active))
            time.sleep(POLL_S if active else 0)
    finally:
        _end_all(session, active)
    watch(_progress(session, []))


def _start_what_fits(session: Session, waiting: list[Work], active: list[Work]) -> None:
    for work in list(waiting):
        devices = _slots(session, work)
        if devices is not None:
            waiting.remove(work)
            active.append(work)
            session.free -= devices
            work.devices, work.started_at = devices, time.time()
            if not work.over:
                _submit(session, work)


def _slots(session: Session, work: Work) -> frozenset[str] | None:
    """The devices to give a job, `None` while they are taken; a CPU case has the host to itself."""
    if work.job.device == "cpu":
        return frozenset({"cpu"}) if "cpu" in session.free else None
    gpus = sorted((slot for slot in session.free if slot != "cpu"), key=int)
    need = max(job.devices for job in work.jobs)
    return frozenset(gpus[:need]) if len(gpus) >= need else None


def _submit(session: Session, work: Work) -> None:
    job = work.job
    if job.device == "cuda":
        chosen = ",".join(sorted(work.devices, key=int)[: job.devices])
        job = job.model_copy(update={"env": job.env | {"CUDA_VISIBLE_DEVICES": chosen}})
    folder = session.run.job_dir(job.id, work.attempt)
    folder.mkdir(parents=True, exist_ok=True)
    command = session.box.wrap(job, folder.resolve(), session.run.payload_root.resolve())
    work.tickets.append(session.backend.submit(job, command, folder.resolve()))


def _advance(session: Session, work: Work, waiting: list[Work], active: list[Work]) -> None:
    """A job ended: start the next of its chain, try again what was lost, or make the records."""
    if work.at_work:
        work.outcomes.append(session.backend.collect(work.at_work))
    last = work.outcomes[-1]
    if not work.over:
        _submit(session, work)
        return
    active.remove(work)
    session.free |= work.devices
    if (last.lost or last.interrupted) and _may_retry(session, work):
        waiting.insert(0, Work(work.cases, work.attempt + 1, launch.jobs(work.cases, work.attempt + 1)))
        return
    for case in work.cases:
        _keep(session, _record(session, case, work))
    if not session.options.keep_artifacts:
        for job in work.jobs:
            session.run.tidy(job.id, work.attempt)


def _may_retry(session: Session, work: Work) -> bool:
    job_id = work.jobs[0].id
    session.lost[job_id] = session.lost.get(job_id, 0) + 1
    return session.lost[job_id] <= MAX_LOST


def _end_all(session: Session, active: Sequence[Work]) -> None:
    """Leave nothing at work behind, whatever made the loop end."""
    open_tickets = [work.at_work for work in active if work.at_work]
    for ticket in open_tickets:
        session.backend.cancel(ticket)
    if open_tickets:
        wanted = {ticket.job_id for ticket in open_tickets}
        _wait_until(lambda: session.backend.poll(open_tickets) >= wanted, seconds=30)


def _wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)


# ---------------------------------------------------------------- after a job


def _record(session: Session, case: Case, work: Work) -> Record:
    attempt = _attempt(session, case, work)
    return Record(
        case_id=schema.case_id(case),
        case=case,
        status="failed" if attempt.diagnosis else "measured",
        attempts=(attempt,),
        provenance=session.provenance.model_copy(update={"weights": _weights(case)}),
        finished_at=time.time(),
    )


def _weights(case: Case) -> str:
    weights = case.train.weights if isinstance(case, schema.ChainCase) else case.weights
    return weights if weights in ("random", "hub") else "path"


def _attempt(session: Session, case: Case, work: Work) -> Attempt:
    folders = [session.run.job_dir(job.id, work.attempt) for job in work.jobs[: len(work.outcomes)]]
    observation = observe.observe(case, folders)
    log = observe.log_text(folders)
    diagnosis = triage.diagnose(case, work.outcomes, observation, log)
    return Attempt(
        number=work.attempt,
        jobs=tuple(_job_run(session, work, index) for index in range(len(work.outcomes))),
        observation=observation,
        diagnosis=diagnosis,
        log_tail=observe.tail(log) if diagnosis else "",
    )


def _job_run(session: Session, work: Work, index: int) -> JobRun:
    job = work.jobs[index]
    folder = session.run.job_dir(job.id, work.attempt).relative_to(session.run.folder)
    return JobRun(job_id=job.id, environment=job.environment, dir=str(folder), outcome=work.outcomes[index])


def _keep(session: Session, record: Record) -> None:
    session.run.save(record)
    session.done[record.case_id] = record


def _progress(session: Session, active: Sequence[Work]) -> Progress:
    running = tuple(
        Running(work.job, work.started_at, observe.peek(session.run.job_dir(work.job.id, work.attempt)))
        for work in active
        if work.at_work
    )
    return Progress(
        total=len(session.cases),
        records=tuple(session.done.values()),
        kept=session.kept,
        running=running,
        seconds_left=_seconds_left(session),
    )


def _seconds_left(session: Session) -> float | None:
    fresh = len(session.done) - session.kept
    if not fresh:
        return None
    return (time.monotonic() - session.began) / fresh * (len(session.cases) - len(session.done))


@contextlib.contextmanager
def _full_disk_explained(directory: store.Run) -> Iterator[None]:
    """Turns a full disk into a message; all finished cases keep their records."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise HarnessError(
            f"the disk that holds {directory.folder} is full",
            "free some space and give the same command again: finished cases are kept, the rest is measured",
        ) from None
