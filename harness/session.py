"""One call of `run` before its first job: what binds it, which cases stand already, and what is left to do."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness import backends, boxes, evidence, host, launch, observe, provenance, schema, store
from harness.errors import HarnessError
from harness.schema import Attempt, Job, Outcome, Plan, Provenance, Record, Ticket

NOT_OF_THE_CASE = frozenset({"interrupted", "storage_full", "node_failed", "preempted", "oom_gpu_contention"})
"""Failure classes that say nothing of the case: the next run measures it again without being asked."""
Case = schema.AnyCase


@dataclass(frozen=True)
class Options:
    """How to run a matrix on this machine."""

    runs: Path = Path("runs")
    backend: str = "local"
    box: str = "venv"
    only: str | None = None
    """Shell patterns over case ids, with commas between them; the others are left for another time."""
    retry_failed: bool = False
    keep_artifacts: bool = False
    have: tuple[Path, ...] = ()
    """Folders whose run directories' records stand for the same cases here: measured, or out of memory."""
    host_memory_gib: float | None = None
    """What a job may use of the host's memory, in a box that can hold it to that."""
    scratch: Path | None = None
    """A folder on a local disk, for cases whose checkpoints go there; `None` is the system's for temporary files."""
    share_process: bool = False
    """Cases of one process key follow each other in one process."""


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
    lost: tuple[Attempt, ...] = ()
    """Earlier attempts of this call that came to no result."""

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
    slots: frozenset[str]
    """`cpu` for the host's processors, and the index of each GPU."""
    free: set[str]
    """The slots that no job has."""
    recorded: store.Run | None = None
    """The run that is replayed."""
    done: dict[str, Record] = field(default_factory=dict)
    kept: set[str] = field(default_factory=set)
    """Ids of the cases that had a record already, here or elsewhere."""
    added: dict[str, tuple[str, schema.Rung | None]] = field(default_factory=dict)
    """Cases that ladders have added: by id, the id of the parent and the rung."""
    began: float = field(default_factory=time.monotonic)

    def keep(self, record: Record) -> None:
        """Write a record for good."""
        self.run.save(record)
        self.done[record.case_id] = record

    def provenance_of(self, case: Case, job_dirs: Sequence[Path] = ()) -> Provenance:
        """Where the case's numbers come from: this host, its jobs' nodes, or what the recorded run says of them."""
        record = self.recorded.record(schema.case_id(case)) if self.recorded else None
        if record and record.provenance:
            return record.provenance.model_copy(update={"number_kind": "replayed", "backend": "replay"})
        held = isinstance(case, schema.TrainCase) and case.memory_cap_gib is not None
        kind = "capped" if held else self.provenance.number_kind
        nodes = host.of_nodes(job_dirs) if self.backend.at_once is not None else {}
        return self.provenance.model_copy(update={"weights": provenance.weights(case), "number_kind": kind, **nodes})


def begin(plan: Plan, directory: store.Run, options: Options) -> Session:
    """Bind the run directory to this plan and these environments; HarnessError where it holds numbers of others."""
    if options.share_process and options.keep_artifacts:
        raise HarnessError("--share-process cannot keep artifacts", "leave out one of it and --keep-artifacts")
    backend = backends.get(options.backend)
    box = _box(options, backend)
    _refuse_pair(options, backend, box)
    recorded = _recorded(options)
    environments = provenance.environments(plan, box, recorded)
    directory.begin(plan, backend=options.backend, box=box.name, environments=environments)
    origin = provenance.of_host(plan, directory, backend.name, environments)
    gpus = provenance.recorded_gpus(recorded) if recorded else origin.gpus
    slots = frozenset({"cpu", *(str(gpu.index) for gpu in gpus)})
    return Session(
        plan=plan,
        run=directory,
        options=options,
        backend=backend,
        box=box,
        provenance=origin,
        cases=tuple(chosen(plan, options)),
        slots=slots,
        free=set(slots),
        recorded=recorded,
    )


def _refuse_pair(options: Options, backend: backends.Backend, box: boxes.Box) -> None:
    """HarnessError where what the options ask for cannot go together."""
    if options.host_memory_gib is not None and box.name not in boxes.MEMORY_LIMITED:
        limited = " or ".join(boxes.MEMORY_LIMITED)
        raise HarnessError(f"the box {box.name} cannot limit a job's memory", f"--host-memory needs --box {limited}")
    if box.name in boxes.SUPERVISED and backend.name in backends.OF_A_SITE:
        why = f"a scheduler that ends a job would leave the container of the box {box.name} at work"
        raise HarnessError(
            f"--box {box.name} does not go with --backend {backend.name}: {why}", "use pyxis or apptainer"
        )


def _box(options: Options, backend: backends.Backend) -> boxes.Box:
    """The box that the options name, or else the one that the cluster's nodes have."""
    of_site = getattr(backend, "box", None)
    return boxes.get(options.box) if of_site is None or options.box != "venv" else boxes.of_site(*of_site())


def _recorded(options: Options) -> store.Run | None:
    """The run directory that a replay plays."""
    kind, _, folder = options.backend.partition(":")
    return store.Run.existing(Path(folder)) if kind == "replay" else None


def chosen(plan: Plan, options: Options) -> list[Case]:
    """The plan's cases that these options name."""
    pattern = options.only
    cases = [case for case in plan.cases if schema.asked_for(schema.case_id(case), pattern)]
    if pattern and not cases:
        raise HarnessError(
            f"--only {pattern!r} matches none of the plan's cases", f"`harness plan {plan.source}` lists them"
        )
    return cases


def stands(directory: store.Run, case: Case, options: Options) -> bool:
    """Whether the case has a record that this call keeps."""
    record = directory.record(schema.case_id(case))
    if record is None or record.status == "skipped":
        return False
    diagnosis = record.last.diagnosis if record.last else None
    again = options.retry_failed or (diagnosis is not None and diagnosis.failure_class in NOT_OF_THE_CASE)
    return record.status == "measured" or not again


def record_skips(session: Session) -> None:
    """Write a record for each point of the plan that cannot or shall not run."""
    for skip in session.plan.skips:
        case_id = schema.case_id(skip.case)
        if skip.rule != "duplicate" and session.run.record(case_id) is None:
            session.run.save(skipped(skip))


def skipped(skip: schema.Skip) -> Record:
    """The record of a skip."""
    return Record(
        case_id=schema.case_id(skip.case),
        case=skip.case,
        status="skipped",
        skip_rule=skip.rule,
        skip_reason=skip.reason,
        finished_at=time.time(),
    )


def pending_work(session: Session) -> list[Work]:
    """The work left, in the plan's order; what this host cannot give becomes a skip with its reason.

    Cases of a search are left to it (`climb`).
    """
    todo: list[Case] = []
    searched = {name for search in session.plan.frontiers for name in search.case_ids}
    elsewhere = evidence.below(session.options.have)
    here = evidence.Place(session.provenance.environments, session.provenance.gpus, session.provenance.cpu)
    for case in session.cases:
        if record := _standing(session, case, elsewhere, here):
            session.done[record.case_id] = record
            session.kept.add(record.case_id)
        elif why := lacking(session, case):
            session.keep(skipped(schema.Skip(case=case, rule=why[0], reason=why[1])))
        elif schema.case_id(case) not in searched:
            todo.append(case)
    return [work_for(session, cases) for cases in launch.group(todo, session.options.share_process)]


def _standing(session: Session, case: Case, elsewhere: evidence.Found, here: evidence.Place) -> Record | None:
    """The record that stands for the case: this run's own, or a copy of one measured elsewhere."""
    if stands(session.run, case, session.options):
        return session.run.record(schema.case_id(case))
    path = evidence.standing(case, elsewhere, here, failures=not session.options.retry_failed)
    return session.run.adopt(path) if path else None


def unmeasured(plan: Plan, directory: store.Run, options: Options) -> list[Case]:
    """The cases that these options name and that no record stands for, here or elsewhere; starts nothing."""
    cases = [case for case in chosen(plan, options) if not stands(directory, case, options)]
    elsewhere = evidence.below(options.have)
    if not elsewhere:
        return cases
    environments = provenance.environments(plan, _box(options, backends.get(options.backend)), _recorded(options))
    here = evidence.Place(environments, host.gpus()[0], host.cpu_name())
    return [case for case in cases if not evidence.standing(case, elsewhere, here, failures=not options.retry_failed)]


def lacking(session: Session, case: Case) -> tuple[str, str] | None:
    """The rule and the reason why this case cannot run here."""
    if reason := _refused(session.backend, case):
        return "backend_cannot", reason
    if no_disk := _no_disk(session, case):
        return "no_local_disk", f"checkpoints: local needs a local disk apart from the run directory: {no_disk}"
    gpus = len(session.slots) - 1
    if session.backend.at_once is None and case.device == "cuda" and case.devices > gpus:
        return "host_lacks_gpus", f"needs {case.devices} GPU{'s' if case.devices > 1 else ''}; this host shows {gpus}"
    return None


def scratch(options: Options) -> Path:
    """The folder for checkpoints on a local disk."""
    return options.scratch or Path(tempfile.gettempdir())


def _no_disk(session: Session, case: Case) -> str | None:
    """Why this host has no local disk for the checkpoints of a case that wants one; a cluster's nodes have theirs."""
    here = session.backend.at_once is None and session.recorded is None
    wanted = here and any(job.local_artifacts for job in launch.jobs((case,), 1))
    return host.apart(scratch(session.options), session.run.folder) if wanted else None


def _refused(backend: backends.Backend, case: Case) -> str | None:
    return next((reason for job in launch.jobs((case,), 1) if (reason := backend.lacking(job))), None)


def narrowed(plan: Plan, backend_name: str) -> Plan:
    """The plan as that backend can run it: what it cannot give becomes a skip with the reason."""
    backend = backends.get(backend_name)
    reasons = {schema.case_id(case): _refused(backend, case) for case in plan.cases}
    cases = tuple(case for case in plan.cases if not reasons[schema.case_id(case)])
    skips = tuple(schema.Skip(case=case, rule="backend_cannot", reason=reason)
                  for case in plan.cases if (reason := reasons[schema.case_id(case)]))  # fmt: skip
    return plan.model_copy(update={"cases": cases, "skips": (*plan.skips, *skips)})


def work_for(session: Session, cases: tuple[Case, ...]) -> Work:
    """The next attempt at these cases, or the last one where its jobs ended and only the record is missing."""
    latest = max(session.run.attempts(launch.jobs(cases, 1)[0].id), default=0)
    if latest and not any(_decided(session, case) for case in cases):
        finished = Work(cases, latest, launch.jobs(cases, latest))
        if _take_up(session, finished):
            return finished
    return next_work(session, cases, latest)


def next_work(session: Session, cases: tuple[Case, ...], latest: int, lost: tuple[Attempt, ...] = ()) -> Work:
    """A new attempt after the one numbered `latest`; what earlier ones left that is large goes."""
    if not session.options.keep_artifacts:
        for job in launch.jobs(cases, 1):
            for number in session.run.attempts(job.id):
                session.run.tidy(job.id, number)
    return Work(cases, latest + 1, launch.jobs(cases, latest + 1), lost=lost)


def _decided(session: Session, case: Case) -> bool:
    """Whether a record says what came of the latest attempt at the case."""
    record = session.run.record(schema.case_id(case))
    return record is not None and record.last is not None


def _take_up(session: Session, work: Work) -> bool:
    """Fill in the outcomes that an earlier control plane left; False where the attempt has to be made again."""
    for job in work.jobs:
        ticket = session.run.ticket(job.id, work.attempt)
        outcome = session.run.outcome(job.id, work.attempt)
        if session.backend.outlives and outcome is None and (ticket is not None or work.outcomes):
            work.tickets += [ticket] if ticket else []  # still at work, or the next job of a chain never began
            return ticket is None or _asked_the_same(session, job, work.attempt)
        if ticket is None or outcome is None:
            return False
        if (outcome.interrupted or outcome.lost) and not _some_finished(session, work):
            return False
        if outcome.node_failed or outcome.preempted:
            return False
        if not _asked_the_same(session, job, work.attempt):
            return False  # a server that was started for other load points
        work.tickets.append(ticket)
        work.outcomes.append(outcome)
        if not outcome.ok:
            return True
    return True


def shares(work: Work) -> bool:
    """Whether its training cases share a process, and each has a directory of its own in the job's."""
    return "cases" in work.job.payload and work.job.payload["role"] == "train"


def finished(seen: schema.Observation) -> bool:
    """Whether a case of a shared process came to its own end, whatever became of the process after it."""
    return any(rank.ended for rank in seen.ranks) and not seen.errors


def _some_finished(session: Session, work: Work) -> bool:
    """Whether some cases of a process that was ended from outside came to their end before."""
    folder = session.run.job_dir(work.job.id, work.attempt) / "cases"
    return shares(work) and any(finished(observe.observe(case, [folder / schema.case_id(case)])) for case in work.cases)


def _asked_the_same(session: Session, job: Job, attempt: int) -> bool:
    return set(job.case_ids) <= session.run.cases_of(job.id, attempt)
