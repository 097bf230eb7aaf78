"""Which case to try after one that failed: the next rung of a documented ladder, or why there is none. Pure.

A ladder is data in `ladders/<name>.yaml`; what a rung makes of a case is a small function (`MAKERS`).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue
from ruamel.yaml import YAML

from harness.schema import (
    AnyCase,
    ChainCase,
    Change,
    Diagnosis,
    Frozen,
    LadderAsked,
    LadderEnd,
    PassedOver,
    Rung,
    TrainCase,
    case_id,
)
from harness.triage import probing, rungs
from harness.triage.rungs import Maker, Means, Part, sequences_per_step

FOLDER = Path(__file__).parent / "ladders"
MAKERS: Mapping[str, Maker] = {**rungs.RUNGS, **probing.RUNGS}
"""What each rung makes of a case, by the rung's name; the names of all ladders are apart."""
OF_SERVING = frozenset({"start_server", "bench", "smoke", "stop_server"})
"""Phases of a chain's second half."""


class RungEntry(Frozen):
    """One rung as its ladder's file states it."""

    code: str
    kinds: Literal["train", "serve", "any"] = Field(alias="for")
    """The kind of case that it starts from; `any` where it makes a case of its own, such as a probe."""
    changes: tuple[str, ...] = ()
    times: int | None = None
    keeps_effective_batch: bool | None = None
    helps: tuple[str, ...] = ()
    """Failure classes that it answers; empty for all of the ladder's."""
    cannot_help: dict[str, str] = Field(default_factory=dict)
    why: str
    cost: str


class Ladder(Frozen):
    """One ladder as its file states it."""

    climbs_from: Literal["last", "first"]
    """Whether a rung builds on the case tried last or on the one that failed first."""
    until: Literal["measured", "end"]
    """What ends it before its last rung: a case that ran as asked, or nothing."""
    classes: tuple[str, ...]
    refuses: dict[str, str] = Field(default_factory=dict)
    """Failure classes, or `class/device`, that end it at once, and why."""
    orders: dict[str, tuple[str, ...]]
    rungs: dict[str, RungEntry]

    def order(self, wanted: str) -> tuple[str, ...]:
        """The names of its rungs in the order wanted; a ladder with a single order has no other."""
        return self.orders.get(wanted) or next(iter(self.orders.values()))


@dataclass(frozen=True)
class Tried:
    """A case of the chain so far."""

    case: AnyCase
    rung: Rung | None = None
    """`None` for the first."""
    diagnosis: Diagnosis | None = None
    """`None` where it ran as asked."""
    seconds: float = 0.0
    """What its jobs took."""


@dataclass(frozen=True)
class Next:
    """The case to try, and how it came about."""

    case: AnyCase
    rung: Rung


Obstacle = Callable[[AnyCase], "tuple[str, str] | None"]
"""Why a case cannot run (a rule's name and a sentence), or `None`."""


@functools.cache
def ladders() -> dict[str, Ladder]:
    """All ladders by name."""
    read = YAML(typ="safe", pure=True)
    return {path.stem: Ladder.model_validate(read.load(path)) for path in sorted(FOLDER.glob("*.yaml"))}


def next_rung(tried: Sequence[Tried], asked: LadderAsked, means: Means, obstacle: Obstacle) -> Next | LadderEnd:
    """The case to try after those of `tried` (the first failed of itself, each later one came from a rung), or the end.

    Deterministic, so that a run taken up again climbs on where it was; ends after `asked.tries` cases at the latest.
    """
    name = _ladder_of(tried, asked)
    if isinstance(name, LadderEnd):
        return name
    ladder = ladders()[name]
    if reason := _over(ladder, tried, asked):
        return LadderEnd(ladder=name, reason=reason)
    base = tried[-1] if ladder.climbs_from == "last" else tried[0]
    passed: list[PassedOver] = []
    for rung, entry in _in_order(ladder, asked, base.case):
        made = _climb(rung, entry, base, tried, means)
        why = made if isinstance(made, str) else _refused(made, tried, obstacle)
        if why is None and not isinstance(made, str):
            return Next(made, _rung(name, rung, entry, base.case, made, tuple(passed)))
        passed.append(PassedOver(rung=rung, why=why or ""))
    return LadderEnd(ladder=name, reason="no rung is left that could help", passed_over=tuple(passed))


# ---------------------------------------------------------------- is there a ladder, and is it over


def _ladder_of(tried: Sequence[Tried], asked: LadderAsked) -> str | LadderEnd:
    """The ladder that the chain is on, or that answers its first failure."""
    if tried[-1].rung is not None:
        return tried[-1].rung.ladder
    first = tried[0]
    failure = first.diagnosis.failure_class if first.diagnosis else "no_failure"
    for name, ladder in ((name, ladders()[name]) for name in asked.ladders):
        keys = (failure, f"{failure}/{first.case.device}")
        if refused := next((ladder.refuses[key] for key in keys if key in ladder.refuses), None):
            return LadderEnd(ladder=name, reason=refused)
        if failure in ladder.classes:
            return name
    allowed = " and ".join(asked.ladders)
    return LadderEnd(ladder=asked.ladders[0], reason=f"{failure} is not what the {allowed} ladder answers")


def _over(ladder: Ladder, tried: Sequence[Tried], asked: LadderAsked) -> str | None:
    """Why the ladder ends here, whatever rungs it has left."""
    last, reruns = tried[-1], tried[1:]
    if last.rung and last.diagnosis is None and ladder.until == "measured":
        return f"it ran with {last.rung.name}"
    if (
        reruns
        and last.diagnosis
        and ladder.climbs_from == "last"
        and last.diagnosis.failure_class not in ladder.classes
    ):
        return f"the rerun failed otherwise: {last.diagnosis.failure_class}"
    if len(reruns) >= asked.tries:
        return f"ladder_tries: {len(reruns)} of {asked.tries} are spent"
    minutes = sum(one.seconds for one in reruns) / 60
    if minutes >= asked.minutes:
        return f"ladder_minutes: {minutes:.0f} of {asked.minutes:g} are spent"
    return None


# ---------------------------------------------------------------- one rung


def part_of(case: AnyCase, diagnosis: Diagnosis | None) -> tuple[Part, str]:
    """The half of a chain that failed and its prefix, or the case itself and none."""
    if not isinstance(case, ChainCase):
        return case, ""
    serving = diagnosis is not None and (diagnosis.failure_class.startswith("serve_") or diagnosis.phase in OF_SERVING)
    return (case.serve, "serve.") if serving else (case.train, "train.")


def _in_order(ladder: Ladder, asked: LadderAsked, case: AnyCase) -> Iterator[tuple[str, RungEntry]]:
    """The rungs for this kind of case."""
    kinds = {"any", *(("train", "serve") if isinstance(case, ChainCase) else (case.kind,))}
    return ((name, entry) for name in ladder.order(asked.order) if (entry := ladder.rungs[name]).kinds in kinds)


def _climb(name: str, entry: RungEntry, base: Tried, tried: Sequence[Tried], means: Means) -> AnyCase | str:
    """The case that the rung makes, or why it makes none here."""
    diagnosis = base.diagnosis
    failure = diagnosis.failure_class if diagnosis else ""
    for key in (failure, diagnosis.phase if diagnosis else None):
        if key in entry.cannot_help:
            return entry.cannot_help[key]
    if entry.helps and failure not in entry.helps:
        return f"it answers {' and '.join(entry.helps)} alone"
    climbed = Counter(one.rung.name for one in tried if one.rung)[name]
    if entry.times is not None and climbed >= entry.times:
        return f"climbed {climbed} times already, which is as often as this ladder allows"
    part, prefix = part_of(base.case, diagnosis)
    if entry.kinds not in ("any", part.kind):
        return f"it was not the {entry.kinds} half that failed"
    ran = {one.rung.name: one.diagnosis is None for one in tried if one.rung}
    made = MAKERS[name](part, replace(means, diagnosis=diagnosis, ran=ran))
    return made if isinstance(made, str) else _whole(base.case, prefix, made)


def _whole(case: AnyCase, prefix: str, part: Part) -> AnyCase:
    """`case` with its half replaced; a part of another kind stands alone."""
    if isinstance(case, ChainCase) and part.kind == prefix.removesuffix("."):
        return ChainCase.model_validate({**case.model_dump(), part.kind: part.model_dump()})
    return type(part).model_validate(part.model_dump())


def _refused(made: AnyCase, tried: Sequence[Tried], obstacle: Obstacle) -> str | None:
    """Why a case that a rung made is not tried."""
    if case_id(made) in {case_id(one.case) for one in tried}:
        return "it was tried already"
    broken = obstacle(made)
    return broken[1] if broken else None


def _rung(
    ladder: str, name: str, entry: RungEntry, base: AnyCase, made: AnyCase, passed: tuple[PassedOver, ...]
) -> Rung:
    return Rung(
        ladder=ladder,
        name=name,
        code=entry.code,
        change=changes(base, made),
        why=entry.why,
        cost=entry.cost,
        keeps_effective_batch=_same_batch(base, made),
        passed_over=passed,
    )


def changes(before: AnyCase, after: AnyCase) -> tuple[Change, ...]:
    """The fields in which two cases differ; of two kinds, that they do."""
    if before.kind != after.kind:
        return (Change(field="case", before=before.kind, after=case_id(after)),)
    one, other = _flat(before), _flat(after)
    return tuple(Change(field=key, before=one[key], after=other[key]) for key in one if one[key] != other[key])


def _flat(case: AnyCase) -> dict[str, JsonValue]:
    if not isinstance(case, ChainCase):
        return case.model_dump(mode="json")
    halves = {"train": case.train.model_dump(mode="json"), "serve": case.serve.model_dump(mode="json")}
    return {f"{half}.{name}": value for half, fields in halves.items() for name, value in fields.items()}


def _same_batch(before: AnyCase, after: AnyCase) -> bool | None:
    one, other = (case.train if isinstance(case, ChainCase) else case for case in (before, after))
    if isinstance(one, TrainCase) and isinstance(other, TrainCase):
        return sequences_per_step(one) == sequences_per_step(other)
    return None
