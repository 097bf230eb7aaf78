"""Matrix text + catalog -> Plan: every case fully resolved, every impossible point a skip with its reason.

A matrix is YAML 1.2 with the keys `version`, `name`, `defaults`, and blocks under `train`, `serve`, `chain` and
`probe`. Each block is the product of its keys' values, less `exclude`, plus `include`. Cases + skips = the product +
includes.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from harness import catalog
from harness.matrix import asked, keys
from harness.matrix.blocks import DEFAULTS, Exclusion, Kind, Point, expand
from harness.matrix.rules import obstacle
from harness.matrix.source import Node, read, refuse_unknown, shown
from harness.schema import AnyCase, ChainCase, Plan, ProbeCase, ServeCase, Skip, TrainCase, case_id

__all__ = ["MATRIX_VERSION", "load"]

MATRIX_VERSION = 1
KINDS: tuple[Kind, ...] = get_args(Kind)
TOP = ("version", "name", "defaults", *KINDS)

Case = AnyCase


def load(path: Path) -> Plan:
    """The plan of the matrix in `path`; one HarnessError with file, line, key and nearest key for the first mistake."""
    document, content = read(path)
    top = document.mapping("a matrix")
    _check_version(document, top)
    refuse_unknown(top, TOP, "a matrix")
    name = _name(document, top)
    cases, skips = _sorted_out(_all_points(document, top))
    allowed = {name: asked.ladder_asked(point) for name, (_, point) in cases.items()}
    return Plan(
        name=name,
        source=str(path),
        matrix_sha256=hashlib.sha256(content).hexdigest(),
        cases=tuple(case for case, _ in cases.values()),
        skips=tuple(skips),
        ladders={name: found for name, found in allowed.items() if found},
        frontiers=asked.frontiers(cases),
    )


def _check_version(document: Node, top: dict[str, Node]) -> None:
    if "version" not in top:
        document.fail("the key 'version' is missing", f"begin the matrix with `version: {MATRIX_VERSION}`")
    node = top["version"]
    if type(node.value) is not int or node.value < 1:
        node.fail(f"version must be {MATRIX_VERSION}, not {shown(node)}")
    if node.value > MATRIX_VERSION:
        node.fail(
            f"version {node.value} is newer than this harness, which reads {MATRIX_VERSION}", "upgrade the harness"
        )


def _name(document: Node, top: dict[str, Node]) -> str:
    """The matrix's name, which becomes that of its run directory."""
    if "name" not in top:
        document.fail("the key 'name' is missing", "give the run a name, such as `name: my-first`")
    node = top["name"]
    if not isinstance(node.value, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", node.value):
        node.fail(f"name must be up to 64 letters, digits, dots, dashes and underscores, not {shown(node)}")
    return node.value


def _all_points(document: Node, top: dict[str, Node]) -> Iterator[tuple[Kind, Point, Exclusion | None]]:
    """Every point of every block, in the order of the file within each kind."""
    defaults = _defaults(top)
    blocks = [(kind, block) for kind in KINDS if kind in top for block in top[kind].items()]
    if not blocks:
        document.fail("a matrix needs at least one block under train, serve, chain or probe")
    for kind, block in blocks:
        for point, exclusion in expand(kind, block, defaults):
            yield kind, point, exclusion


def _defaults(top: dict[str, Node]) -> dict[str, Node]:
    if "defaults" not in top:
        return {}
    found = top["defaults"].mapping("defaults")
    refuse_unknown(found, DEFAULTS, "defaults")
    return found


def _sorted_out(
    points: Iterator[tuple[Kind, Point, Exclusion | None]],
) -> tuple[dict[str, tuple[Case, Point]], list[Skip]]:
    """Cases by id with their points, and skips; a point whose case stands in the plan already is a skip of its own."""
    cases: dict[str, tuple[Case, Point]] = {}
    skips: list[Skip] = []
    seen: set[str] = set()
    for kind, point, exclusion in points:
        case = _case(kind, point)
        if exclusion:
            reason = f"The matrix excludes it (line {exclusion.node.line})."
            skips.append(Skip(case=case, rule="excluded", reason=reason))
            continue
        name = case_id(case)
        if name in seen:
            skips.append(_duplicate(case, name))
        elif broken := obstacle(case):
            skips.append(Skip(case=case, rule=broken[0], reason=broken[1]))
        else:
            cases[name] = case, point
        seen.add(name)
    return cases, [_unless_planned(skip, set(cases)) for skip in skips]


def _unless_planned(skip: Skip, cases: set[str]) -> Skip:
    """An excluded point that another point plans all the same is a duplicate of that."""
    again = skip.rule == "excluded" and case_id(skip.case) in cases
    return _duplicate(skip.case, case_id(skip.case)) if again else skip


def _duplicate(case: Case, name: str) -> Skip:
    train = case.train if isinstance(case, ChainCase) else case
    why = " (full ignores lora_rank, lora_alpha and lora_targets)" if getattr(train, "method", "") == "full" else ""
    return Skip(case=case, rule="duplicate", reason=f"Another point gives the same case, {name}{why}.")


# ---------------------------------------------------------------- points -> cases


def _case(kind: Kind, point: Point) -> Case:
    if kind == "train":
        return TrainCase(**_train_fields(point))
    if kind == "serve":
        return ServeCase(**_serve_fields(point))
    if kind == "probe":
        return ProbeCase(**_fields(point))
    shared = {name: value for name, value in point.items() if "." not in name}
    train = {name.removeprefix("train."): value for name, value in point.items() if name.startswith("train.")}
    serve = {name.removeprefix("serve."): value for name, value in point.items() if name.startswith("serve.")}
    return ChainCase(
        train=TrainCase(**_train_fields({**shared, **train})),
        serve=ServeCase(**_serve_fields({"adapter": "adapter", **shared, **serve})),
    )


def _fields(point: Point) -> dict[str, Any]:
    return {keys.FIELDS.get(name, name): value for name, value in point.items() if name not in keys.SETTINGS}


def _train_fields(point: Point) -> dict[str, Any]:
    """The fields of a training case, LoRA's from the catalog, or none where the method trains no adapter."""
    fields = _fields(point)
    if not catalog.methods()[fields["method"]].adapter:
        return fields | {"lora_rank": 0, "lora_alpha": 0, "lora_targets": ()}
    return {"lora_targets": catalog.variant(fields["variant"]).lora_targets, **fields}


def _serve_fields(point: Point) -> dict[str, Any]:
    fields = _fields(point)
    load = fields.pop("load", {})
    return {**fields, **load}
