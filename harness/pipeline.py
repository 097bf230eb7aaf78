"""plan -> submit -> collect -> observe -> diagnose -> store -> report: the only place that knows the order."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness import backends, boxes, climb, frontier, launch, matrix, observe, results, schema, store, triage
from harness.errors import HarnessError
from harness.schema import Attempt, Job, JobRun, Mount, Plan, Record
from harness.session import (
    Case,
    Options,
    Session,
    Work,
    begin,
    finished,
    next_work,
    pending_work,
    record_skips,
    scratch,
    shares,
    unmeasured,
    work_for,
)

POLL_S = 0.25
SUBMIT_A_ROUND = 3
"""Most jobs given to a scheduler between two looks at it: at a look in 2 s, 1.5 submissions a second."""
MAX_LOST = 2
"""How often one run starts a job again that ended without a word of its own, before that is its result."""
MAX_EARLIER = 8
"""How many attempts before the last one a record names."""


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
    """Cases that this call looks after, those included that ladders have added."""
    added: int
    records: tuple[Record, ...]
    kept: frozenset[str]
    """Ids of the records that no job of this call made."""
    running: tuple[Running, ...]
    seconds_left: float | None
    """An estimate from the mean of the cases done so far."""


@dataclass(frozen=True)
class Result:
    """What a call of `run` leaves behind."""

    run: store.Run
    records: tuple[Record, ...]
    kept: frozenset[str]
    """Ids of the records that no job of this call made."""
    page: Path
    notes: tuple[str, ...]

    @property
    def failed(self) -> tuple[Record, ...]:
        """The cases that failed; what a search found too large is its answer and none of them."""
        return tuple(record for record in self.records if record.status == "failed" and not frontier.is_answer(record))


def run(path: Path, options: Options, watch: Callable[[Progress], None] = lambda _: None) -> Result:
    """Take the matrix at `path` to records and a report; resumes what its run directory already holds."""
    plan = matrix.load(path)
    directory = store.Run(options.runs / plan.name)
    with _full_disk_explained(directory), directory.locked():
        session = begin(plan, directory, options)
        notes = session.backend.adopt(directory.folder)
        record_skips(session)
        _work_through(session, pending_work(session) + climb.begin(session), watch)
        records = tuple(directory.records())
        by_hand = session.backend.by_hand
        notes += session.backend.adopt(directory.folder) if by_hand else []
        page = results.render(directory) if records or not by_hand else directory.folder / "README.md"
    return Result(directory, records, frozenset(session.kept), page, tuple(notes))


def pending(path: Path, options: Options) -> tuple[Plan, list[Case]]:
    """The plan, and its cases that `run` would measure now."""
    plan = matrix.load(path)
    directory = store.Run(options.runs / plan.name)
    return plan, climb.upcoming(plan, directory, unmeasured(plan, directory, options), options)


def cancel(directory: store.Run) -> list[str]:
    """End a run: its control plane if one is at work on this host, then whatever that left; lines for a person."""
    lines = []
    owner = directory.owner()
    if owner:
        os.kill(owner, signal.SIGTERM)  # not SIGINT, which a shell's background process ignores
        lines.append(f"asked the harness at work (pid {owner}) to stop")
        if not _wait_until(lambda: directory.owner() is None, seconds=60):
            raise HarnessError(f"the harness at work (pid {owner}) does not stop", f"`kill -9 {owner}`, then again")
    lines += backends.get(directory.info().backend).reap(directory.folder)
    return lines or ["nothing of this run was at work"]


def commands(plan: Plan, pattern: str, box_name: str) -> list[dict[str, str]]:
    """The command line of each case whose id matches `pattern`, as text that a shell takes."""
    box = boxes.get(box_name)
    found = []
    for case in plan.cases:
        if schema.asked_for(schema.case_id(case), pattern):
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


# ---------------------------------------------------------------- the loop


def _work_through(session: Session, waiting: list[Work], watch: Callable[[Progress], None]) -> None:
    active: list[Work] = []
    try:
        while waiting or active:
            _start_what_fits(session, waiting, active)
            ended = session.backend.poll([work.at_work for work in active if work.at_work])
            for work in [work for work in active if work.over or work.job.id in ended]:
                _advance(session, work, waiting, active)
            if session.backend.by_hand and active and not (ended or waiting):
                break
            watch(_progress(session, active))
            time.sleep(max(POLL_S, session.backend.pause_s) if active else 0)
    finally:
        _end_all(session, active)
    watch(_progress(session, []))


def _start_what_fits(session: Session, waiting: list[Work], active: list[Work]) -> None:
    """Start what has room; first of all what an earlier harness left at work, which has its place already."""
    submitted = 0
    for work in sorted(waiting, key=lambda work: work.at_work is None):
        devices = _slots(session, work, len(active))
        if devices is not None and not (session.backend.at_once and submitted >= SUBMIT_A_ROUND):
            waiting.remove(work)
            active.append(work)
            session.free -= devices
            work.devices, work.started_at = devices, time.time()
            if not work.over and not work.at_work:
                submitted += 1
                _submit(session, work)


def _slots(session: Session, work: Work, active: int) -> frozenset[str] | None:
    """The devices to give a job, `None` while they are taken; a CPU case has the host to itself.

    A backend that has devices of its own gives them itself: it only bounds the number of jobs.
    """
    if session.backend.at_once is not None:
        return frozenset() if active < session.backend.at_once else None
    if work.job.device == "cpu":
        return session.slots if session.free == session.slots else None
    gpus = sorted((slot for slot in session.free if slot != "cpu"), key=int)
    need = max(job.devices for job in work.jobs)
    return frozenset(gpus[:need]) if len(gpus) >= need else None


def _submit(session: Session, work: Work) -> None:
    job = work.job
    if job.device == "cuda" and work.devices:
        chosen = ",".join(sorted(work.devices, key=int)[: job.devices])
        # The driver's order, in which the slots are numbered, is that of the bus; CUDA's own is the fastest first.
        devices = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": chosen}
        job = job.model_copy(update={"env": job.env | devices})
    if session.options.host_memory_gib is not None:
        job = job.model_copy(update={"host_memory_gib": session.options.host_memory_gib})
    folder = session.run.job_dir(job.id, work.attempt)
    folder.mkdir(parents=True, exist_ok=True)
    if job.local_artifacts and session.backend.at_once is None and session.recorded is None:
        session.run.put_artifacts_on(scratch(session.options), job.id, work.attempt)
    elsewhere = [session.run.artifacts_elsewhere(one.id, work.attempt) for one in work.jobs]
    mounts = tuple(Mount(path=str(path), writable=True) for path in elsewhere if path)
    job = job.model_copy(update={"mounts": (*job.mounts, *mounts)})
    command = session.box.wrap(job, folder.resolve(), session.run.payload_root.resolve())
    work.tickets.append(session.backend.submit(job, command, folder.resolve()))


def _advance(session: Session, work: Work, waiting: list[Work], active: list[Work]) -> None:
    """A job ended: start the next of its chain, try again what was lost, or make the records."""
    if work.at_work:
        work.outcomes.append(session.backend.collect(work.at_work))
    if not work.over:
        _submit(session, work)
        return
    active.remove(work)
    session.free |= work.devices
    work, not_begun = _came_to(session, work)
    attempts = [_attempt(session, case, work) for case in work.cases]
    if _again(work, attempts):
        waiting.insert(0, _what_is_left(session, work, attempts, not_begun))
        return
    _keep(session, work, attempts)
    if not_begun:
        waiting.insert(0, work_for(session, not_begun))
    waiting += climb.after(session, work.cases)
    if not session.options.keep_artifacts:
        for job in work.jobs:
            session.run.tidy(job.id, work.attempt)


def _came_to(session: Session, work: Work) -> tuple[Work, tuple[Case, ...]]:
    """The work with the cases that its process came to, and those that need a fresh one; each has its directory."""
    if not shares(work):
        return work, ()
    folder = session.run.job_dir(work.job.id, work.attempt) / "cases"
    begun = tuple(case for case in work.cases if (folder / schema.case_id(case)).is_dir()) or work.cases[:1]
    return replace(work, cases=begun), tuple(case for case in work.cases if case not in begun)


def _again(work: Work, attempts: Sequence[Attempt]) -> bool:
    """Whether the attempt is no result yet: something other than the job itself ended it."""
    last = work.outcomes[-1]
    taken = last.lost or last.interrupted or last.node_failed or last.preempted
    return taken and any(one.diagnosis for one in attempts) and len(work.lost) < MAX_LOST


def _what_is_left(session: Session, work: Work, attempts: Sequence[Attempt], not_begun: tuple[Case, ...]) -> Work:
    """A new attempt at what an ended process leaves; what shared it and came to its end keeps its numbers."""
    of = dict(zip(work.cases, attempts, strict=True))
    left = tuple(case for case in work.cases if of[case].diagnosis or not shares(work))
    done = tuple(case for case in work.cases if case not in left)
    _keep(session, replace(work, cases=done), [of[case] for case in done])
    lost = (*work.lost, _without_numbers(of[left[0]]))
    return next_work(session, left + not_begun, work.attempt, lost)


def _keep(session: Session, work: Work, attempts: Sequence[Attempt]) -> None:
    """Write the records of an attempt; one that failed on a full disk is left to be made again.

    Such a job can often not even say why it failed, its log being on the same disk.
    """
    failed = any(attempt.diagnosis for attempt in attempts)
    try:
        if failed and session.run.disk_full():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        for case, attempt in zip(work.cases, attempts, strict=True):
            session.keep(_record(session, case, work, attempt))
    except OSError:
        if failed:
            for job in work.jobs:
                session.run.disown(job.id, work.attempt)
        raise


def _end_all(session: Session, active: Sequence[Work]) -> None:
    """Leave nothing at work behind, whatever made the loop end; jobs that another harness can adopt go on."""
    if session.backend.outlives:
        return
    open_tickets = [work.at_work for work in active if work.at_work]
    for ticket in open_tickets:
        session.backend.cancel(ticket)
    if open_tickets:
        wanted = {ticket.job_id for ticket in open_tickets}
        _wait_until(lambda: session.backend.poll(open_tickets) >= wanted, seconds=30)


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether it came true in that time."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return met


# ---------------------------------------------------------------- after a job


def _record(session: Session, case: Case, work: Work, attempt: Attempt) -> Record:
    case_id = schema.case_id(case)
    before = session.run.record(case_id)
    earlier = [*(before.attempts if before else ()), *work.lost]
    return Record(
        case_id=case_id,
        case=case,
        status="failed" if attempt.diagnosis else "measured",
        attempts=(*map(_without_numbers, earlier[-MAX_EARLIER:]), attempt),
        provenance=session.provenance_of(case, [session.run.job_dir(job.id, work.attempt) for job in work.jobs]),
        finished_at=time.time(),
        **climb.origin(session, case),
    )


def _without_numbers(attempt: Attempt) -> Attempt:
    """What a record keeps of an attempt that is not its result: how it ended; its files lie in its directory."""
    return attempt.model_copy(update={"observation": schema.Observation(), "log_tail": ""})


def _attempt(session: Session, case: Case, work: Work) -> Attempt:
    folders = [session.run.job_dir(job.id, work.attempt) for job in work.jobs[: len(work.outcomes)]]
    own = [folder / "cases" / schema.case_id(case) for folder in folders] if shares(work) else folders
    observation = observe.observe(case, own)
    log = observe.log_text(folders)
    whole = shares(work) and finished(observation)
    diagnosis = None if whole else triage.diagnose(case, work.outcomes, observation, log)
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


def _progress(session: Session, active: Sequence[Work]) -> Progress:
    running = tuple(
        Running(work.job, work.started_at, observe.peek(session.run.job_dir(work.job.id, work.attempt)))
        for work in active
        if work.at_work
    )
    return Progress(
        total=len(session.cases) + len(session.added),
        added=len(session.added),
        records=tuple(session.done.values()),
        kept=frozenset(session.kept),
        running=running,
        seconds_left=_seconds_left(session),
    )


def _seconds_left(session: Session) -> float | None:
    fresh = len(session.done) - len(session.kept)
    if not fresh:
        return None
    return (time.monotonic() - session.began) / fresh * (len(session.cases) + len(session.added) - len(session.done))


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
