"""From what was found to one diagnosis: cause before consequence.

Order: all measured; ended from outside; what the payload itself proved wrong; the kernel's word; the earliest
initiating error of any rank; initiating lines of the log; what survivors saw; how the job ended; what is missing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.logs import split
from harness.schema import Case, ClaimStatus, Culprit, Diagnosis, Evidence, Nonfinite, Observation, Outcome
from harness.triage import advice
from harness.triage.hits import QUOTE_CHARS, Hit, in_events, in_log
from harness.triage.missing import missing, ranks_of
from harness.triage.signature import signatures
from harness.triage.tables import Failed, launcher_table

MAX_EVIDENCE = 6
SERVER_PHASES = frozenset({"start_server", "bench", "smoke", "stop_server"})
"""Phases whose `error` event only reports what the server's own log explains."""
OF_A_CAP = frozenset({"oom_gpu_load", "oom_gpu_forward", "oom_gpu_backward", "oom_gpu_optimizer", "oom_gpu_save_eval"})
"""Classes that a cap on the GPU's memory can make; their summary names it."""
SIGKILL, SIGTERM, SIGINT, SIGABRT = 9, 15, 2, 6


@dataclass(frozen=True)
class Facts:
    """All that a verdict may look at."""

    case: Case
    outcomes: tuple[Outcome, ...]
    observation: Observation
    missing: tuple[str, ...]
    events: tuple[Hit, ...]
    log: tuple[Hit, ...]
    table: Failed | None
    """What the launcher says failed first."""
    log_text: str

    def any(self, flag: str) -> bool:
        """Whether some outcome has `flag`."""
        return any(getattr(outcome, flag) for outcome in self.outcomes)

    @property
    def signal(self) -> int | None:
        """The signal that ended the job, or its first failed rank."""
        own = next((outcome.signal for outcome in self.outcomes if outcome.signal), None)
        return own or (self.table.signal if self.table else None)


def diagnose(case: Case, outcomes: Sequence[Outcome], observation: Observation, log_text: str) -> Diagnosis | None:
    """Why `case` was not measured as asked; `None` only where all of it was. Never raises on what a log holds.

    `outcomes` in the order of the jobs, `log_text` as `logs.log_text` joins it.
    """
    lacking = tuple(missing(case, observation))
    if not lacking:
        return None
    facts = Facts(
        case=case,
        outcomes=tuple(outcomes),
        observation=observation,
        missing=lacking,
        events=tuple(in_events(observation.errors)),
        log=tuple(in_log(log_text)),
        table=launcher_table(log_text),
        log_text=log_text,
    )
    return next(found for rule in RULES if (found := rule(facts)))


# ---------------------------------------------------------------- the rules, in order


def _interrupted(facts: Facts) -> Diagnosis | None:
    if not facts.any("interrupted"):
        return None
    why = next((f": {outcome.detail}" for outcome in facts.outcomes if outcome.interrupted and outcome.detail), "")
    return _plain(facts, "interrupted", f"The job was ended from outside before it was done{why.rstrip('.')}.",
                  "Give the same command again: it resumes with this case.", "established")  # fmt: skip


def _taken_by_the_scheduler(facts: Facts) -> Diagnosis | None:
    """Ends that a cluster made, which say nothing of the case."""
    found = next((outcome for outcome in facts.outcomes if outcome.node_failed or outcome.preempted
                  or outcome.cancelled), None)  # fmt: skip
    if found is None:
        return None
    if found.node_failed:
        nodes = ", ".join(found.failed_hosts or found.hosts) or "unknown"
        culprit = Culprit(host=found.failed_hosts[0]) if found.failed_hosts else None
        return _plain(facts, "node_failed", f"A node failed under the job: {nodes}.",
                      "Give the same command again: it leaves that node out; tell the site about it.",
                      "established", culprit=culprit, cause="unknown")  # fmt: skip
    if found.preempted:
        return _plain(facts, "preempted", "The scheduler gave the job's place to one of higher priority.",
                      "Give the same command again, or name a QOS or partition that is not preempted.",
                      "established")  # fmt: skip
    return _plain(facts, "cancelled", "A person cancelled the job at the scheduler.",
                  "Ask who did; `harness run --retry-failed` measures the case again.", "established")  # fmt: skip


def _odd_ranks(facts: Facts) -> Diagnosis | None:
    """Ranks with other versions than most: whatever else went wrong, the number would be of no one environment."""
    odd = facts.observation.odd_ranks
    if not odd:
        return None
    first = odd[0]
    where = f"rank {first.rank}" + (f" on {first.host}" if first.host else "")
    what = ", ".join(first.differences) or "other versions of packages beside the main ones"
    others = f", and {len(odd) - 1} more ranks differ" if len(odd) > 1 else ""
    return _plain(facts, "not_as_requested", f"The ranks do not have the same software: {where} has {what}{others}.",
                  f"Use one image or one environment on every host; mend the one of {where}, then run again.",
                  "established", phase="prepare", culprit=Culprit(rank=first.rank, host=first.host),
                  culprit_status="established")  # fmt: skip


def _not_as_requested(facts: Facts) -> Diagnosis | None:
    train = facts.observation.train
    if not train or not train.proof_mismatches:
        return None
    sentence = f"What runs is not what was asked: {train.proof_mismatches[0]}"
    return _plain(facts, "not_as_requested", sentence,
                  f"Ask for what this environment can do, or mend it, then run again: {train.proof_mismatches[0]}",
                  "established", phase="prepare")  # fmt: skip


def _nan_loss(facts: Facts) -> Diagnosis | None:
    found = facts.observation.train.nonfinite if facts.observation.train else None
    if not found:
        return None
    status = _nonfinite_status(facts.observation, found)
    return Diagnosis(
        failure_class="nan_loss",
        phase="eval" if found.what == "eval_loss" else "train",
        summary=f"The {found.what.replace('_', ' ')} was not finite, first at step {found.step} on rank {found.rank}.",
        culprit=_culprit(facts, found.rank if status != "unknown" else None),
        class_status="established",
        culprit_status=status,
        cause_status="unknown",
        evidence=_evidence(facts, [hit for hit in facts.events if hit.failure_class == "nan_loss"]),
        next_step=_next_of("nan_loss", facts),
    )


def _nonfinite_status(observation: Observation, found: Nonfinite) -> ClaimStatus:
    """How sure it is that this rank began it: a gradient norm is that of all ranks, and so is a NaN that all have."""
    others = [rank for rank in observation.ranks if rank.rank != found.rank]
    if found.what != "loss":
        return "unknown" if others else "established"
    losses = [dict(zip(rank.steps.step, rank.steps.loss, strict=True)) for rank in others]
    if any(found.step in loss and loss[found.step] is None for loss in losses):
        return "unknown"
    return "established" if all(found.step in loss for loss in losses) else "supported"


def _host_memory(facts: Facts) -> Diagnosis | None:
    if not facts.any("host_oom_killed"):
        return None
    rank = facts.table.rank if facts.table and facts.table.signal == SIGKILL else None
    return _plain(facts, "oom_host", "The host's kernel ended a process of the job because memory ran out.",
                  _next_of("oom_host", facts), "established", culprit=_culprit(facts, rank))  # fmt: skip


def _initiating_event(facts: Facts) -> Diagnosis | None:
    """The earliest initiating error of any rank; one that only says that the server failed gives way to its log."""
    initiating = [hit for hit in facts.events if hit.role == "initiating"]
    if not initiating:
        return None
    begun = initiating[0]
    if begun.signature is None and (begun.phase is None or begun.phase in SERVER_PHASES):
        return _initiating_line(facts) or _from_hit(facts, begun, initiating)
    return _from_hit(facts, begun, initiating)


def _initiating_line(facts: Facts) -> Diagnosis | None:
    initiating = [hit for hit in facts.log if hit.role == "initiating"]
    return _from_hit(facts, initiating[0], initiating) if initiating else None


def _killed_rank(facts: Facts) -> Diagnosis | None:
    """A rank that a signal ended, with no word of its own: its peers only report that they lost it."""
    if facts.any("timed_out") or facts.any("stalled") or facts.signal in (None, SIGTERM, SIGINT):
        return None
    if facts.signal != SIGKILL:
        return _crash(facts)
    rank = facts.table.rank if facts.table else None
    if ranks_of(facts.case) > 1 and rank is not None:
        sentence = f"Rank {rank} was killed (SIGKILL) and left no reason; the other ranks lost their peer."
        return _plain(facts, "peer_lost", sentence, _next_of("peer_lost", facts), "established",
                      culprit=_culprit(facts, rank), cause="unknown")  # fmt: skip
    sentence = "The process was killed (SIGKILL); most often that is the kernel when the host's memory runs out."
    return _plain(facts, "oom_host", sentence, _next_of("oom_host", facts), "supported",
                  culprit=_culprit(facts, rank), cause="hypothesis")  # fmt: skip


def _crash(facts: Facts) -> Diagnosis:
    sentence = f"The process crashed with signal {facts.signal}."
    return _plain(facts, "app_exception", sentence,
                  "Read the Python stacks at the end of stderr.log: the top frame of the first one crashed.",
                  "established", culprit=_culprit(facts, facts.table.rank if facts.table else None))  # fmt: skip


def _consequence(facts: Facts) -> Diagnosis | None:
    """What survivors saw, where nothing tells how it began; what ends a job from outside makes such lines too."""
    ended_from_outside = facts.any("timed_out") or facts.any("stalled") or facts.any("lost")
    cascades = [hit for hit in (*facts.events, *facts.log) if hit.role == "cascade"]
    if ended_from_outside:
        cascades = [hit for hit in cascades if hit.failure_class == "coll_timeout"]
    return _from_hit(facts, cascades[0], cascades) if cascades else None


def _stalled(facts: Facts) -> Diagnosis | None:
    if not facts.any("stalled"):
        return None
    rank = _silent_rank(facts.observation)
    phase = _phase(facts)
    sentence = f"No rank gave a sign of life in phase {phase or 'start'} until the stall limit ended the job."
    return _plain(facts, "stalled", sentence,
                  "Compare stacks.rank*.txt: one that differs holds the others up; raise stall_s if it is slow.",
                  "established", phase=phase, culprit=_culprit(facts, rank), culprit_status="hypothesis")  # fmt: skip


def _timed_out(facts: Facts) -> Diagnosis | None:
    if not facts.any("timed_out"):
        return None
    done = max((max(rank.steps.step, default=0) for rank in facts.observation.ranks), default=0)
    next_step = advice.fill("Raise time_limit_s: {time_limit_s} -> {double_time_limit_s}, or ask for fewer steps.",
                            advice.values(facts.case, facts.observation))  # fmt: skip
    return _plain(facts, "terminated_external", f"The time limit ended the job after {done} steps.",
                  next_step or "Raise time_limit_s.", "established", phase=_phase(facts))  # fmt: skip


def _lost(facts: Facts) -> Diagnosis | None:
    if not facts.any("lost"):
        return None
    return _plain(facts, "lost", "The job and what watched over it vanished without a word.",
                  "Give the same command again; if it recurs, look at the host's memory and its kernel log.",
                  "established", phase=_phase(facts))  # fmt: skip


def _terminated(facts: Facts) -> Diagnosis | None:
    teardown = [hit for hit in (*facts.events, *facts.log) if hit.role == "teardown"]
    if teardown:
        return _from_hit(facts, teardown[0], teardown)
    if facts.signal not in (SIGTERM, SIGINT):
        return None
    return _plain(facts, "terminated_external", f"The job was ended from outside by signal {facts.signal}.",
                  _next_of("terminated_external", facts), "established", phase=_phase(facts))  # fmt: skip


def _traceback(facts: Facts) -> Diagnosis | None:
    """An exception that only the log shows, and no signature knows."""
    lines = [line for line in split(facts.log_text) if line.text.strip()]
    for index, line in enumerate(lines):
        if "Traceback (most recent call last)" in line.text:
            raised = next((one for one in lines[index + 1 :] if _EXCEPTION.search(one.text[:QUOTE_CHARS])), line)
            text = raised.text.strip()[:QUOTE_CHARS]
            evidence = (Evidence(file=raised.file, line=raised.number, text=text, role="initiating"),)
            return _plain(facts, "app_exception", f"An exception ended the job: {text[:200]}",
                          f"Read the traceback that ends at {raised.file}:{raised.number}.", "supported",
                          phase=_phase(facts), evidence=evidence)  # fmt: skip
    return None


_EXCEPTION = re.compile(r"(?:^|[\s\]:])[A-Za-z_][\w.]{0,100}(?:Error|Exception|Interrupt|Exit|Warning)\b(?::|$)")


def _incomplete(facts: Facts) -> Diagnosis:
    """It ended by itself, but not all that was asked is there."""
    ok = bool(facts.outcomes) and all(outcome.ok for outcome in facts.outcomes)
    if ok or facts.observation.serve or (facts.observation.train and facts.observation.train.reload_ok is False):
        sentence = f"Not all that was asked was measured: {'; '.join(facts.missing[:3])}."
        return _plain(facts, "not_as_requested", sentence, _first_missing(facts), "established", phase=_phase(facts))
    codes = ", ".join(str(outcome.exit_code) for outcome in facts.outcomes) or "unknown"
    sentence = f"The job ended with exit code {codes} and said nothing of the reason: {'; '.join(facts.missing[:3])}."
    return _plain(facts, "unknown", sentence, "Read the end of stderr.log; then run the case alone with --only.",
                  "unknown", phase=_phase(facts))  # fmt: skip


def _first_missing(facts: Facts) -> str:
    return f"Look in the job's events and logs for the first thing that is missing: {facts.missing[0]}."


RULES: tuple[Callable[[Facts], Diagnosis | None], ...] = (
    _interrupted, _taken_by_the_scheduler, _odd_ranks, _not_as_requested, _nan_loss, _host_memory, _initiating_event,
    _initiating_line, _killed_rank, _consequence, _stalled, _timed_out, _lost, _terminated, _traceback, _incomplete,
)  # fmt: skip


# ---------------------------------------------------------------- parts of a diagnosis


def _plain(
    facts: Facts, failure_class: str, summary: str, next_step: str, status: ClaimStatus, *, phase: str | None = None,
    culprit: Culprit | None = None, culprit_status: ClaimStatus = "supported", cause: ClaimStatus | None = None,
    evidence: tuple[Evidence, ...] | None = None,
) -> Diagnosis:  # fmt: skip
    """A diagnosis that rests on how the job ended or on what it lacks."""
    return Diagnosis(
        failure_class=failure_class,
        phase=phase or _phase(facts),
        summary=summary,
        culprit=culprit,
        class_status=status,
        culprit_status=culprit_status if culprit else "unknown",
        cause_status=cause or ("unknown" if failure_class in ("stalled", "lost", "unknown") else status),
        evidence=_evidence(facts, facts.events) if evidence is None else evidence,
        next_step=next_step,
    )


def _from_hit(facts: Facts, hit: Hit, same_role: Sequence[Hit]) -> Diagnosis:
    """A diagnosis that rests on one hit; the others stand beside it as evidence."""
    known = advice.values(facts.case, facts.observation)
    rank = _blamed(facts, hit, same_role)
    status: ClaimStatus = "established" if hit.structured else "supported"
    others = [other for other in (*facts.events, *facts.log) if other is not hit and other.structured != hit.structured]
    return Diagnosis(
        failure_class=hit.failure_class,
        phase=hit.phase or _phase(facts),
        summary=_summary(hit, known),
        culprit=_culprit(facts, rank),
        class_status=status,
        culprit_status=status if rank is not None else "unknown",
        cause_status="supported" if hit.signature and hit.role == "initiating" else "unknown",
        evidence=_evidence(facts, [hit, *others]),
        next_step=advice.first(hit.signature.next, known) if hit.signature else _show_frame(hit),
    )


def _summary(hit: Hit, known: dict[str, object]) -> str:
    if hit.signature:
        sentence = advice.fill(hit.signature.summary, known) or hit.signature.summary
        capped = hit.failure_class in OF_A_CAP and "memory_cap_gib" in known
        return f"{sentence.removesuffix('.')}, with memory_cap_gib {known['memory_cap_gib']}." if capped else sentence
    return f"{hit.kind or 'An error'} in phase {hit.phase or 'unknown'}: {hit.evidence.text[:200]}"


def _show_frame(hit: Hit) -> str:
    return f"Read the traceback in {hit.evidence.file}, line {hit.evidence.line}: its last frame raised."


def _blamed(facts: Facts, hit: Hit, same_role: Sequence[Hit]) -> int | None:
    """The rank that began it: none where all report the same, where it is no rank's doing, or where none is named."""
    if hit.rank is None or hit.role != "initiating" or (hit.signature and hit.signature.culprit == "none"):
        return None
    if not ranks_of(facts.case) or hit.phase in SERVER_PHASES:
        return None
    ranks = Counter(other.rank for other in same_role if other.failure_class == hit.failure_class)
    world = len(facts.observation.ranks)
    return None if world > 1 and len(ranks) >= world else hit.rank


def _culprit(facts: Facts, rank: int | None) -> Culprit | None:
    return None if rank is None else Culprit(rank=rank, host=_host(facts, rank))


def _host(facts: Facts, rank: int) -> str | None:
    return next((one.host for one in facts.observation.ranks if one.rank == rank), None)


def _silent_rank(observation: Observation) -> int | None:
    """The one rank whose steps stop before all others', if there is one."""
    last = sorted((max(rank.steps.step, default=0), rank.rank) for rank in observation.ranks)
    return last[0][1] if len(last) > 1 and last[0][0] < last[1][0] else None


def _phase(facts: Facts) -> str | None:
    """The phase in which the events end."""
    if facts.events:
        return facts.events[0].phase
    phases = [rank.last_phase for rank in facts.observation.ranks if rank.last_phase and not rank.ended]
    return phases[0] if phases else None


def _evidence(facts: Facts, hits: Sequence[Hit]) -> tuple[Evidence, ...]:
    """The lines behind a verdict: those of `hits`, then what the launcher says failed first."""
    table = (facts.table.evidence,) if facts.table else ()
    return (*(hit.evidence for hit in hits[: MAX_EVIDENCE - 1]), *table)


def _next_of(failure_class: str, facts: Facts) -> str:
    """The next step that the first signature of a class names."""
    found = next(one for one in signatures() if one.failure_class == failure_class)
    return advice.first(found.next, advice.values(facts.case, facts.observation))
