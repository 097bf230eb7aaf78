"""What a ladder or a search adds to a plan: what was asked for, each rung climbed, and why it ended."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, JsonValue

from harness.schema.base import Frozen

LadderOrder = Literal["seed000", "seed003"]


class LadderAsked(Frozen):
    """What a matrix allows after a case failed; no part of the case's identity."""

    ladders: tuple[str, ...]
    """Names of the ladders that may be climbed, `oom` and `nccl`."""
    order: LadderOrder = "seed000"
    """Whose documented order the rungs follow, where a ladder has several."""
    tries: int = Field(8, ge=1)
    """Reruns of one ladder, at most."""
    minutes: float = Field(240.0, gt=0)
    """What all reruns of one ladder may take together."""


class Change(Frozen):
    """One field that a rung changed."""

    field: str
    """Of the case; in a chain with `train.` or `serve.` in front. `case` where the rung makes one of another kind."""
    before: JsonValue
    after: JsonValue


class PassedOver(Frozen):
    """A rung that was not climbed."""

    rung: str
    why: str


class Rung(Frozen):
    """How a case came from its parent."""

    ladder: str
    name: str
    code: str
    """The seeds' number of it, such as O1 or N2."""
    change: tuple[Change, ...]
    why: str
    cost: str
    keeps_effective_batch: bool | None = None
    """Sequences per optimizer step are those of the parent; `None` where the case trains nothing."""
    passed_over: tuple[PassedOver, ...] = ()
    """Rungs before it in the ladder's order, and why they were left out."""


class LadderEnd(Frozen):
    """Why no further rung follows."""

    ladder: str
    reason: str
    passed_over: tuple[PassedOver, ...] = ()
    leads_to: str | None = None
    """Id of the case that the next rung would make, where the run has it already."""


class Frontier(Frozen):
    """A search for the largest value of one field that fits, in place of a measured grid."""

    axis: str
    case_ids: tuple[str, ...]
    """The grid's cases, by rising value of `axis`, equal in all else."""
