"""Who began it: the rank, host or GPU that the evidence names, or nobody."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from harness.schema import ClaimStatus, Culprit
from harness.triage.facts import Event, Facts
from harness.triage.relevance import NUMBER
from harness.triage.signature import kinds
from harness.triage.vocabulary import MARK

CLEARLY_FIRST_S = 1.0
"""By how much a rank must be ahead of the others before it, and not all, counts as the first."""
MAX_WORLD = 4096
MOST_OF_A_JOB = 3
_SPEAKER = re.compile(r"^(?:\W{0,4}\[(?:rank|default|Rank )#\]:?\s*|RANK #: ?)*")
_PEER = re.compile(r"(?:remote peer|peer) \[?(?P<host>[\w.:-]{1,200}?)\]?(?:<|:\d|\s|$)")

_SELF = ("127.0.0.1", "localhost", "::1")
_NEIGHBOUR = re.compile(
    r"(?:closed by localRank |retrieving ncclUniqueId from \[|RayWorkerProc rank="
    r"|Worker proc VllmWorker-(?=\d{1,6} died))(\d{1,6})"
)
_BARRED = re.compile(r"(?:Ranks? (?=\d{1,6} failed to pass )|missing ranks: \{(?=\d{1,6}\}))(\d{1,6})")


@dataclass(frozen=True)
class Blame:
    """Who, and how sure."""

    culprit: Culprit | None = None
    status: ClaimStatus = "unknown"


NOBODY = Blame()


def for_event(first: Event, same: Sequence[Event], files: Sequence[Facts]) -> Blame:
    """Who began what `first` tells; `same` are all events of its class."""
    kind = kinds()[first.failure_class].culprit
    if kind == "nobody":
        return NOBODY
    spoken = set().union(*(facts.ranks for facts in files)) if files else set()
    alike = _all_alike(same, spoken)
    rank = None if alike else _first_rank(same, spoken)
    if first.failure_class == "nan_loss":
        rank = _first_by_step(same, spoken, files)
    if kind == "none" or (first.signature and first.signature.culprit == "none" and kind == "rank"):
        if rank is None or len(spoken) < 2 or len({one.who.rank for one in same}) > 1:
            return NOBODY
        return Blame(Culprit(rank=rank, host=first.who.host), "supported")
    if kind == "host":
        return _host(same)
    if rank is None and not alike and not _said_by_several(first, same):
        rank = _from_table(first, files)
    gpu = _one({one.gpu for one in same if one.gpu}) if kind == "gpu" or first.gpu else None
    host = _one({one.who.host for one in same if one.who.host})
    if rank is None and gpu is None:
        return NOBODY
    sure: ClaimStatus = "established" if len(spoken) > 1 or (gpu and kind == "gpu") else "supported"
    return Blame(Culprit(rank=rank, host=host, gpu=gpu), sure)


def _said_by_several(first: Event, same: Sequence[Event]) -> bool:
    """Whether nameless speakers say the same: then all fail alike."""
    return sum(one.text == first.text and one.who.rank is None for one in same) > 1


def _first_by_step(same: Sequence[Event], spoken: set[int], files: Sequence[Facts]) -> int | None:
    """The only rank that says it at the lowest step; none where ranks do so together, or others tell no steps."""
    steps: dict[int, int] = {}
    for one in same:
        found = MARK.search(one.text)
        if one.who.rank is None or (not found and len(spoken) > 1):
            continue
        step = int(found["step"] or found["bar"]) if found else 0
        steps[one.who.rank] = min(step, steps.get(one.who.rank, step))
    lowest = [rank for rank, step in steps.items() if step == min(steps.values())]
    compared = set(steps) | {rank for facts in files for rank in facts.marks if rank >= 0}
    return lowest[0] if len(lowest) == 1 and (len(compared) > 1 or len(spoken) < 2) else None


def _all_alike(same: Sequence[Event], spoken: set[int]) -> bool:
    """Whether every rank that speaks says the same sentence: then no rank began it."""
    said: dict[int, set[str]] = {}
    for one in same:
        if one.who.rank is not None:
            said.setdefault(one.who.rank, set()).add(_SPEAKER.sub("", NUMBER.sub("#", one.text)))
    return len(said) > 1 and set(said) >= spoken and bool(set.intersection(*said.values()))


def _one(values: set[str | None]) -> str | None:
    return values.pop() if len(values) == 1 else None


def _host(same: Sequence[Event]) -> Blame:
    host = _one({one.who.host for one in same if one.who.host})
    return Blame(Culprit(host=host), "supported") if host else NOBODY


def _first_rank(same: Sequence[Event], spoken: set[int]) -> int | None:
    """The only rank that reports it, or the one that does so clearly first; none where ranks fail alike."""
    ranks = {one.who.rank for one in same if one.who.rank is not None}
    if len(ranks) < 2:
        return next(iter(ranks), None)
    times: dict[int, float] = {}
    for one in same:
        if one.t is not None and one.who.rank is not None:
            times[one.who.rank] = min(one.t, times.get(one.who.rank, one.t))
    if len(times) < len(ranks):
        return None
    ordered = sorted(times, key=lambda rank: times[rank])
    return ordered[0] if times[ordered[1]] - times[ordered[0]] >= CLEARLY_FIRST_S else None


def _from_table(first: Event, files: Sequence[Facts]) -> int | None:
    """The rank that torchrun saw fail first, where it fits: no rank is named by the lines themselves."""
    tables = [table for facts in files for table in facts.tables if table[5] == facts.attempts]
    return tables[-1][0] if tables and len({table[0] for table in tables}) == 1 else None


def for_lost_peer(events: Sequence[Event], files: Sequence[Facts]) -> Blame:
    """The rank that torchrun saw fail first, else the host that survivors name; never who prints."""
    for facts in files:
        for rank, code, host, _, _, attempt in facts.tables:
            if attempt == facts.attempts and code not in (None, 0, -15, 1, -6):
                return Blame(Culprit(rank=rank, host=host), "established")
    hosts = {found["host"] for one in events if (found := _PEER.search(one.text)) and found["host"] not in _SELF}
    local = {int(found[1]) for one in events if (found := _NEIGHBOUR.search(one.text))}
    if len(hosts) == 1:
        return Blame(Culprit(host=hosts.pop()), "supported")
    if len(local) == 1:
        return Blame(Culprit(rank=local.pop()), "hypothesis")
    ranks = everyone(files)
    speakers = {one.who.rank for one in events}
    if all("TCPStore" in one.text for one in events) and not speakers & {0, None}:
        return Blame(Culprit(rank=0), "hypothesis")  # the store is where rank 0 is
    others = ranks - speakers
    return Blame(Culprit(rank=others.pop()), "hypothesis") if len(ranks) == 2 and len(others) == 1 else NOBODY


def everyone(files: Sequence[Facts]) -> set[int]:
    """All ranks of the job: as many as NCCL says, or torchrun ended and lists as failed, else those that spoke."""
    spoken: set[int] = set().union(*(facts.ranks for facts in files)) if files else set()
    world = max((facts.world or 0 for facts in files), default=0)
    failed: set[int] = set().union(*(facts.failed for facts in files)) if files else set()
    if not world and failed:
        closed: set[str] = set().union(*(facts.closed - facts.listed for facts in files))
        world = len(failed) + len(closed)
    known = set(range(world)) if 1 < world <= MAX_WORLD else set()
    return known if known >= spoken | failed else spoken


def for_timeout(events: Sequence[Event], files: Sequence[Facts]) -> Blame:
    """The rank that stayed behind: fewest collectives completed, the only one without a time-out, or silent first."""
    named = {int(found[1]) for one in events if (found := _BARRED.search(one.text))}
    if len(named) == 1:
        return Blame(Culprit(rank=named.pop()), "established")
    completed = {rank: number for facts in files for rank, number in facts.completed.items()}
    if len(completed) > 1:
        least = min(completed.values())
        behind = [rank for rank, number in completed.items() if number == least]
        if len(behind) == 1 and len(completed) > 2:
            return Blame(Culprit(rank=behind[0]), "supported")
    waiting = {one.who.rank for one in events if one.who.rank is not None and one.failure_class == "coll_timeout"}
    absent = (everyone(files) | _up_to(waiting)) - waiting
    if len(waiting) >= 1 and len(absent) == 1:
        return Blame(Culprit(rank=absent.pop()), "supported")
    rank = silent(files)
    return Blame(Culprit(rank=rank), "supported") if rank is not None else NOBODY


def _up_to(waiting: set[int]) -> set[int]:
    """All ranks from 0 to the highest that waited, where enough did so to know that these are most of the job."""
    return set(range(max(waiting) + 1)) if len(waiting) >= MOST_OF_A_JOB and max(waiting) <= MAX_WORLD else set()


def stopped_early(files: Sequence[Facts]) -> list[int]:
    """Ranks whose marks of progress stop before those of most others, in the last attempt.

    Of two ranks one has to be two steps behind: one step is what a moment makes.
    """
    last: dict[int, tuple[int, int]] = {}
    for facts in files:
        for rank, mark in facts.marks.items():
            if rank >= 0 and mark.attempt == facts.attempts:
                last[rank] = (mark.step, mark.line if len(files) == 1 else 0)
    if len(last) < 2:
        return []
    steps = sorted(step for step, _ in last.values())
    common = steps[-1] - 1 if len(last) == 2 else max(set(steps), key=steps.count)
    # One step ahead is what a moment makes; more, and the mark is of an earlier count that this rank ended with.
    behind = [rank for rank, (step, _) in last.items() if step < common or step > common + 1]
    return sorted(behind) if len(behind) < len(last) / 2 or len(last) == 2 else []


def silent(files: Sequence[Facts]) -> int | None:
    """The one rank that fell silent before the others, if there is exactly one."""
    odd = stopped_early(files)
    if len(odd) != 1:
        return None
    steps = {rank: mark.step for facts in files for rank, mark in facts.marks.items() if rank >= 0}
    return odd[0] if all(steps[odd[0]] < step for rank, step in steps.items() if rank != odd[0]) else None
