"""What a matrix allows beyond its points: ladders after a failure, and a search in place of a measured grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.matrix.source import Node, refuse_unknown, shown
from harness.schema import AnyCase, ChainCase, Frontier, LadderAsked, case_id

Point = dict[str, Any]

LADDERS: dict[str, tuple[str, ...]] = {"off": (), "oom": ("oom",), "nccl": ("nccl",), "both": ("oom", "nccl")}
OF_TRAINING, OF_SERVING = ("seq_len", "micro_batch"), ("max_num_seqs", "max_model_len")
"""Keys that a frontier can search in a block of its kind."""
SEARCHED = OF_TRAINING + OF_SERVING
"""Keys that take a range in place of a list."""
RANGE = ("from", "to", "step")
MAX_RANGE = 10_000
"""A longer range is taken for a mistake."""


def ladder(key: str, node: Node) -> tuple[str, ...]:
    """The ladders that a word allows."""
    if node.value not in LADDERS:
        node.fail(f"{key}: {shown(node)} is not one of {', '.join(LADDERS)}")
    return LADDERS[str(node.value)]


def frontier(keys: Sequence[str], key: str, node: Node) -> str:
    """The key to search, one of `keys`."""
    if node.value not in keys:
        node.fail(f"{key}: {shown(node)} is not one of {', '.join(keys)}")
    return str(node.value)


def stretched(name: str, node: Node) -> list[Node]:
    """The values of a range `{from: 512, to: 8192, step: 512}` as nodes; the last where the step meets it."""
    found = node.mapping(name)
    refuse_unknown(found, RANGE, f"{name}: a range")
    for key in RANGE:
        value = found[key].value if key in found else None
        if type(value) is not int or value < 1:
            found.get(key, node).fail(f"{name}: a range needs `{key}`, a whole number of at least 1")
    first, last, step = (int(found[key].value) for key in RANGE)
    if last < first or (last - first) // step >= MAX_RANGE:
        node.fail(f"{name}: from {first} to {last} by {step} is no range of 1 to {MAX_RANGE:,} values")
    return [Node(value, node.file, node.line) for value in range(first, last + 1, step)]


def check_frontier(axes: Mapping[str, Any], block: Node) -> None:
    """HarnessError where a block's search has nothing to search, or shares its failures with a ladder."""
    if "frontier" not in axes:
        return
    asked = axes["frontier"]
    if asked.values[0] not in axes or len(axes[asked.values[0]].values) < 3:
        asked.node.fail(
            f"frontier: {asked.values[0]} has too few values to search",
            f"give bounds and a step, such as `{asked.values[0]}: {{from: 512, to: 16384, step: 512}}`",
        )
    if "ladder" in axes and "oom" in axes["ladder"].values[0]:
        asked.node.fail(
            "frontier: a case that does not fit is an answer here, no failure to climb from", "write `ladder: off`"
        )


def ladder_asked(point: Point) -> LadderAsked | None:
    """What may be tried after a case of this point failed."""
    if not point.get("ladder"):
        return None
    budgets = {key: point[f"ladder_{key}"] for key in ("order", "tries", "minutes") if f"ladder_{key}" in point}
    return LadderAsked(ladders=point["ladder"], **budgets)


def frontiers(cases: Mapping[str, tuple[AnyCase, Point]]) -> tuple[Frontier, ...]:
    """The searches of a plan: its cases that differ in the searched key alone, by rising value."""
    groups: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name, (case, point) in cases.items():
        if "frontier" in point and not isinstance(case, ChainCase):
            axis = point["frontier"]
            rest = case_id(case.model_copy(update={axis: 1}))
            groups.setdefault((axis, rest), []).append((point[axis], name))
    return tuple(
        Frontier(axis=axis, case_ids=tuple(name for _, name in sorted(found)))
        for (axis, _), found in groups.items()
        if len(found) > 1
    )
