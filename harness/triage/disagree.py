"""Where ranks say different things that ought to be the same: sizes, operations, the collective they waited in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from harness.schema import ClaimStatus
from harness.triage.facts import Facts

MAX_SENTENCES = 2
"""Where more sentences differ between ranks, sizes that differ mean nothing."""
MAX_LINES = 4

Said = Mapping[int, tuple[tuple[str, ...], int, str]]
"""Rank -> the numbers of its sentence, its line, its text."""


def sizes(facts: Facts) -> list[tuple[int, str]]:
    """Lines, with their numbers, in which ranks say one sentence with other sizes; empty where they agree."""
    odd = [said for said in facts.sized.values() if _differs(said)]
    if not 0 < len(odd) <= MAX_SENTENCES:
        return []
    return [(line, text) for _, line, text in list(odd[0].values())[:MAX_LINES]]


def _differs(said: Said) -> bool:
    """Whether ranks say the same sentence with other numbers than their own rank."""
    columns = zip(*(numbers for numbers, _, _ in said.values()), strict=True)
    return any(len(set(column)) > 1 and column != tuple(map(str, said)) for column in columns)


def collectives(files: Sequence[Facts]) -> ClaimStatus | None:
    """How sure it is that ranks asked for different collectives; None where nothing says so."""
    by_number: dict[int, dict[int, tuple[int, str]]] = {}
    for facts in files:
        for rank, (number, elements, operation) in facts.last_work.items():
            by_number.setdefault(number, {})[rank] = (elements, operation)
    if any(len(asked) > 1 and len(set(asked.values())) > 1 for asked in by_number.values()):
        return "supported"
    waited_in = {rank: name for facts in files for rank, name in facts.asked.items()}
    return "hypothesis" if len(set(waited_in.values())) > 1 else None
