"""What a run does beyond its plan's own cases: the next rung of a ladder after a failure, the next point of a search.

Both follow from the records alone, so that a run taken up again goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from harness import frontier, host, launch, schema, session, store, triage
from harness.matrix.rules import obstacle
from harness.schema import AnyCase, ChainCase, Frontier, LadderEnd, Plan, ProbeCase, Record, TrainCase, case_id
from harness.session import NOT_OF_THE_CASE, Options, Session, Work

MAX_CHAIN = 1000
"""Longer than any ladder: a loop of parents can only come from records changed by hand."""


def begin(session_: Session) -> list[Work]:
    """What searches and ladders go on with at the start of a run, from the records that stand."""
    children = _children(session_)
    cases = [case for search in session_.plan.frontiers if (case := _searched(session_, search))]
    for record in [record for record in session_.done.values() if record.status != "skipped"]:
        tip = _tip(session_, record, children)
        if tip and (case := _climbed(session_, tip)):
            cases.append(case)
    return _works(session_, cases)


def after(session_: Session, cases: Iterable[AnyCase]) -> list[Work]:
    """What follows from the records of `cases`, which were just written."""
    names = [case_id(case) for case in cases]
    touched = [search for search in session_.plan.frontiers if set(names) & set(search.case_ids)]
    found = [case for search in touched if (case := _searched(session_, search))]
    done = [session_.done[name] for name in names if name in session_.done]
    found += [case for record in done if (case := _climbed(session_, record))]
    return _works(session_, found)


def upcoming(plan: Plan, directory: store.Run, cases: Sequence[AnyCase], options: Options) -> list[AnyCase]:
    """Those of the unmeasured `cases` that a run would start with: of each search, one."""
    by_id = {case_id(case): case for case in session.chosen(plan, options)}
    searched = {name for search in plan.frontiers for name in search.case_ids}
    found = [case for case in cases if case_id(case) not in searched]
    for search in plan.frontiers:
        records = {name: record for name in search.case_ids if (record := directory.record(name))}
        grid = [by_id[name] for name in search.case_ids if name in by_id]
        point = frontier.search(search.axis, grid, records).next
        found += [by_id[point.case_id]] if point else []
    return found


def origin(session_: Session, case: AnyCase) -> dict[str, Any]:
    """What the record of `case` says of how it came into the run."""
    name = case_id(case)
    parent, rung = session_.added.get(name, (None, None))
    search = next((one for one in session_.plan.frontiers if name in one.case_ids), None)
    return {"parent": parent, "rung": rung, "frontier": search.axis if search else None}


def _works(session_: Session, cases: Sequence[AnyCase]) -> list[Work]:
    return [session.work_for(session_, together) for together in launch.group(cases)]


# ---------------------------------------------------------------- searches


def _searched(session_: Session, search: Frontier) -> AnyCase | None:
    """The next case of a search; what the search makes needless gets its skip."""
    grid = [case for case in session_.cases if case_id(case) in set(search.case_ids)]
    found = frontier.search(search.axis, grid, _standing(session_, search))
    by_id = {case_id(case): case for case in grid}
    for point, rule, reason in found.idle:
        _skip(session_, by_id[point.case_id], rule, reason, search.axis)
    return by_id[found.next.case_id] if found.next else None


def _standing(session_: Session, search: Frontier) -> dict[str, Record]:
    """The records of this run's cases that count, by id; one made before the search was asked for now belongs to it."""
    found = {name: session_.done[name] for name in search.case_ids if name in session_.done}
    for record in found.values():
        if record.frontier != search.axis:
            session_.keep(record.model_copy(update={"frontier": search.axis}))
    return {name: session_.done[name] for name in found}


def _skip(session_: Session, case: AnyCase, rule: str, reason: str, axis: str) -> None:
    skip = session.skipped(schema.Skip(case=case, rule=rule, reason=reason)).model_copy(update={"frontier": axis})
    before = session_.run.record(skip.case_id)
    if before and (before.status, before.skip_rule, before.skip_reason) == ("skipped", rule, reason):
        session_.done[skip.case_id] = before
    else:
        session_.keep(skip)


# ---------------------------------------------------------------- ladders


def _children(session_: Session) -> dict[str, Record]:
    """The records that ladders have added, by the id of their parent."""
    if not session_.plan.ladders:
        return {}
    return {record.parent: record for record in session_.run.records() if record.parent and _counts(record)}


def _counts(record: Record) -> bool:
    """Whether the record says something of its case, so that it is not to be made again."""
    diagnosis = record.last.diagnosis if record.last else None
    return diagnosis is None or diagnosis.failure_class not in NOT_OF_THE_CASE


def _crowded(record: Record) -> bool:
    """Whether others held the GPU: a ladder answers that too, with no rung but the reason."""
    return bool(record.last and record.last.diagnosis and record.last.diagnosis.failure_class == "oom_gpu_contention")


def _tip(session_: Session, record: Record, children: dict[str, Record]) -> Record | None:
    """The last record of the chain that begins at `record`, all of which this call looks after from now on."""
    for _ in range(MAX_CHAIN):
        child = children.get(record.case_id)
        if child is None:
            return record
        session_.added[child.case_id] = (record.case_id, child.rung)
        session_.done[child.case_id] = child
        session_.kept.add(child.case_id)
        record = child
    return None


def _chain(session_: Session, record: Record) -> list[Record]:
    """The records from the planned case to `record`."""
    chain = [record]
    while chain[0].parent and len(chain) < MAX_CHAIN:
        parent = session_.run.record(chain[0].parent)
        if parent is None:
            break
        chain.insert(0, parent)
    return chain


def _climbed(session_: Session, record: Record) -> AnyCase | None:
    """The case that the ladder of `record` goes on with; the record says why where there is none."""
    chain = _chain(session_, record)
    asked = session_.plan.ladders.get(chain[0].case_id)
    if not asked or chain[0].status != "failed" or not (_counts(record) or _crowded(record)):
        return None
    tried = [_tried(one) for one in chain]
    means = _means(session_, record)
    answer = triage.next_rung(tried, asked, means, lambda case: _obstacle(session_, case))
    if isinstance(answer, triage.Next):
        answer = _elsewhere(session_, record, answer) or answer
    _note_end(session_, record, answer if isinstance(answer, LadderEnd) else None)
    if isinstance(answer, LadderEnd):
        _conclude(session_, chain)
        return None
    session_.added[case_id(answer.case)] = (record.case_id, answer.rung)
    return _within(answer.case, asked.minutes * 60 - sum(one.seconds for one in tried[1:]))


def _obstacle(session_: Session, case: AnyCase) -> tuple[str, str] | None:
    """Why a rung's case cannot run here: by the rules, for want of devices, or because it was never recorded."""
    if session_.recorded and not all(session_.recorded.attempts(job.id) for job in launch.jobs((case,), 1)):
        return "not_recorded", "the recording that is played has no such case"
    site = getattr(session_.backend, "site", None)
    if site and site.scratch and case.nodes == 1 and any(job.local_artifacts for job in launch.jobs((case,), 1)):
        return "on_scratch", "the site's jobs write checkpoints to the node's own disk anyway (scratch)"
    return obstacle(case) or session.lacking(session_, case)


def _tried(record: Record) -> triage.Tried:
    last = record.last
    seconds = sum(job.outcome.end - job.outcome.start for attempt in record.attempts for job in attempt.jobs)
    return triage.Tried(record.case, record.rung, last.diagnosis if last else None, seconds)


def _means(session_: Session, record: Record) -> triage.Means:
    """What there is for a case after `record`; of a backend with devices of its own, as many as the case has."""
    case, where = record.case, record.provenance or session_.provenance
    size = min((gpu.total_bytes for gpu in where.gpus), default=None)
    train = case.train if isinstance(case, ChainCase) else case
    as_it_has = case.device == "cpu" or session_.backend.at_once is not None
    return triage.Means(
        devices=case.devices if as_it_has else len(session_.slots) - 1,
        device_bytes=size,
        interfaces=_interfaces(session_),
        held=triage.held(train, record.last.observation, size)
        if record.last and isinstance(train, TrainCase)
        else None,
    )


def _elsewhere(session_: Session, record: Record, answer: triage.Next) -> LadderEnd | None:
    """The end of a ladder whose next case the run has already, planned or added by another ladder."""
    name = case_id(answer.case)
    mine = (record.case_id, answer.rung)
    standing = session_.run.record(name)
    planned = any(name == case_id(case) for case in session_.plan.cases)
    other = session_.added.get(name, mine)[0] != record.case_id or (standing and standing.parent != record.case_id)
    if not planned and not other:
        return None
    whose = "the matrix plans that case itself" if planned else "another ladder has that case"
    return LadderEnd(
        ladder=answer.rung.ladder,
        reason=f"the next rung is {answer.rung.name}, and {whose}",
        passed_over=answer.rung.passed_over,
        leads_to=name,
    )


def _note_end(session_: Session, record: Record, end: LadderEnd | None) -> None:
    if record.ladder_end != end:
        session_.keep(record.model_copy(update={"ladder_end": end}))


def _conclude(session_: Session, chain: Sequence[Record]) -> None:
    """Add to the diagnosis of the case that failed first what the reruns made to learn of it showed."""
    first = chain[0]
    probes = [
        triage.Probed(one.rung, one.case, one.last.diagnosis)
        for one in chain[1:]
        if one.rung and one.last and one.rung.ladder == "nccl"
    ]
    if first.last is None or first.last.diagnosis is None:
        return
    known = triage.with_evidence(first.last.diagnosis, probes)
    if known != first.last.diagnosis:
        last = first.last.model_copy(update={"diagnosis": known})
        session_.keep(first.model_copy(update={"attempts": (*first.attempts[:-1], last)}))


def _interfaces(session_: Session) -> tuple[str, ...]:
    """Of this host; in a replay those that the recorded probes were pinned to."""
    if session_.recorded is None:
        return host.interfaces()
    cases = [record.case for record in session_.recorded.records() if record.rung]
    return tuple(dict.fromkeys(case.interface for case in cases if isinstance(case, ProbeCase) and case.interface))


def _within(case: AnyCase, seconds: float) -> AnyCase:
    """The case with a time limit that the ladder's budget covers."""
    if isinstance(case, ChainCase):
        return case.model_copy(
            update={"train": _within(case.train, seconds / 2), "serve": _within(case.serve, seconds / 2)}
        )
    return case.model_copy(update={"time_limit_s": min(case.time_limit_s, max(seconds, 1.0))})
