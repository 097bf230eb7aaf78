"""A block of the matrix -> its points: the product of its axes less `exclude`, plus `include`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from harness.matrix import asked, keys
from harness.matrix.keys import Read
from harness.matrix.source import Node, refuse_unknown, shown
from harness.schema import Frozen, ProbeCase, ServeCase, TrainCase

Kind = Literal["train", "serve", "chain", "probe"]
Readers = dict[str, Read]
Point = dict[str, Any]
"""Values by key; in a chain the keys of a half begin with `train.` or `serve.`."""

MAX_POINTS = 100_000
"""A larger product is taken for a mistake: at one minute a case it would run for ten weeks."""

LISTS = ("include", "exclude")
LISTED = ("lora_targets", "sizes")
"""Keys of which one value is a list."""
NOT_EXCLUDABLE = frozenset({"repeat", "time_limit", "stall", "load"}) | keys.SETTINGS


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _under(half: str, found: Readers) -> Readers:
    return {f"{half}.{name}": read for name, read in found.items()}


def _in_chain(found: Readers) -> Readers:
    return {name: read for name, read in found.items() if name not in keys.NOT_IN_CHAIN}


READERS: dict[Kind, Readers] = {
    "train": {**keys.COMMON, **keys.TRAIN_ONLY},
    "serve": {**keys.COMMON, **keys.SERVE_ONLY},
    "chain": {**keys.COMMON, **_under("train", _in_chain(keys.TRAIN_ONLY)), **_under("serve", keys.CHAIN_SERVE_ONLY)},
    "probe": keys.PROBE,
}
REQUIRED: dict[Kind, tuple[str, ...]] = {
    "train": ("variant", "method", "seq_len"),
    "serve": ("variant",),
    "chain": ("variant", "train.method", "train.seq_len"),
    "probe": ("device",),
}
LOADS: dict[Kind, Readers] = {"train": {}, "serve": keys.LOAD, "chain": _under("serve", keys.LOAD), "probe": {}}
EXCLUDABLE: dict[Kind, Readers] = {
    kind: {name: read for name, read in readers.items() if _last(name) not in NOT_EXCLUDABLE} | LOADS[kind]
    for kind, readers in READERS.items()
}
DEFAULTS: Readers = {
    name: read
    for name, read in {**READERS["probe"], **READERS["train"], **READERS["serve"]}.items()
    if name != "adapter"
}
"""Keys that `defaults` takes: those of every block but `adapter`, which means another thing in a chain."""


@dataclass(frozen=True, slots=True)
class Axis:
    """The values of one key, and where they stand."""

    values: Sequence[Any]
    node: Node


Axes = dict[str, Axis]


@dataclass(frozen=True, slots=True)
class Exclusion:
    """A partial point: by key, the values that it takes out."""

    kind: Kind
    values: dict[str, tuple[Any, ...]]
    node: Node

    def hits(self, point: Point) -> bool:
        """Does every key of it agree with `point`, defaults included?"""
        return all(point.get(name, _default(name, self.kind)) in values for name, values in self.values.items())


Expanded = tuple[Point, Exclusion | None]
"""A point, and what takes it out."""


def expand(kind: Kind, block: Node, defaults: dict[str, Node]) -> Iterator[Expanded]:
    """Every point of a block: its product, each with what excludes it, then what it includes."""
    where = f"a {kind} block"
    found = block.mapping(where)
    own = _flat({name: node for name, node in found.items() if name not in LISTS}, READERS[kind], where, LISTS)
    axes = {**_axes(_defaults_for(kind, defaults), READERS[kind]), **_axes(own, READERS[kind])}
    included = [_included(kind, entry, axes) for entry in _entries("include", found)]
    excluded = [_exclusion(kind, entry) for entry in _entries("exclude", found)]
    if own or not included:
        _check(kind, axes, block)
        asked.check_frontier(axes, block)
        yield from _less(_points(axes, block), excluded)
    for more in included:
        yield from ((point, None) for point in _points(more, block))


def _less(points: Iterable[Point], excluded: list[Exclusion]) -> Iterator[Expanded]:
    """Each point with the first exclusion that hits it; HarnessError for an exclusion that hits none."""
    idle = set(range(len(excluded)))
    for point in points:
        hits = [number for number, exclusion in enumerate(excluded) if exclusion.hits(_whole(point))]
        idle.difference_update(hits)
        yield point, excluded[hits[0]] if hits else None
    for number in sorted(idle):
        excluded[number].node.fail("this exclude takes out no point of its block", "mend its values, or leave it out")


def _points(axes: Axes, block: Node) -> Iterator[Point]:
    count = math.prod(len(axis.values) for axis in axes.values())
    if count > MAX_POINTS:
        block.fail(f"this block has {count:,} points; more than {MAX_POINTS:,} are taken for a mistake")
    for values in itertools.product(*(axis.values for axis in axes.values())):
        yield dict(zip(axes, values, strict=True))


# ---------------------------------------------------------------- keys and axes


def _flat(found: dict[str, Node], readers: Readers, where: str, also: tuple[str, ...] = ()) -> dict[str, Node]:
    """Nodes by point key; HarnessError for a key that `readers` does not know."""
    halves = list(dict.fromkeys(name.split(".")[0] for name in readers if "." in name))
    flat: dict[str, Node] = {}
    for name, node in found.items():
        if name in halves:
            inside, known = node.mapping(name), _half(name, readers)
            refuse_unknown(inside, known, f"`{name}:` of {where}")
            flat |= {f"{name}.{key}": value for key, value in inside.items()}
        elif home := next((half for half in halves if f"{half}.{name}" in readers), None):
            node.fail(f"{name!r} stands under `{home}:` in {where}")
        else:
            refuse_unknown({name: node}, [*(key for key in readers if "." not in key), *halves, *also], where)
            flat[name] = node
    return flat


def _half(name: str, readers: Readers) -> list[str]:
    return [key.removeprefix(f"{name}.") for key in readers if key.startswith(f"{name}.")]


def _defaults_for(kind: Kind, defaults: dict[str, Node]) -> dict[str, Node]:
    """Those of `defaults` that a block of this kind takes, by its point keys."""
    return {name: defaults[_last(name)] for name in READERS[kind] if _last(name) in defaults}


def _axes(nodes: dict[str, Node], readers: Readers) -> Axes:
    return {name: _axis(name, node, readers[name]) for name, node in nodes.items()}


def _axis(name: str, node: Node, read: Read) -> Axis:
    if _last(name) == "repeat":
        return Axis(range(read(name, node)), node)
    items = _values(name, node)
    if name in keys.SETTINGS and isinstance(node.value, list):
        node.fail(f"{name}: one value for the whole block, not a list")
    if not items:
        node.fail(f"{name}: an empty list has no value to try")
    values = tuple(read(name, item) for item in items)
    for number, value in enumerate(values):
        if value in values[:number]:
            items[number].fail(f"{name}: {shown(items[number])} stands twice")
    return Axis(values, node)


def _values(name: str, node: Node) -> list[Node]:
    """The values of an axis. A list of module names or sizes is one value; a list of such lists is an axis."""
    if _last(name) in asked.SEARCHED and isinstance(node.value, dict):
        return asked.stretched(name, node)
    one = _last(name) in LISTED and not (node.items() and isinstance(node.items()[0].value, list))
    return [node] if one else node.items()


def _check(kind: Kind, axes: Axes, block: Node) -> None:
    """HarnessError where a point would lack what it needs, or measure nothing."""
    for name in REQUIRED[kind]:
        if name not in axes:
            block.fail(f"a {kind} block needs {name!r}", "give it here or in `defaults`")
    half = "train." if kind == "chain" else ""
    steps, warmup = axes.get(f"{half}steps"), axes.get(f"{half}warmup_steps")
    most = max(warmup.values) if warmup else _default("warmup_steps")
    least = min(steps.values) if steps else _default("steps")
    if kind in ("train", "chain") and most >= least:
        place = (warmup or steps or Axis((), block)).node
        place.fail(
            f"{most} warmup_steps leave nothing of {least} steps to measure", "give more steps, or fewer to warm up"
        )


# ---------------------------------------------------------------- include and exclude


def _entries(name: str, found: dict[str, Node]) -> list[Node]:
    if name in found and not isinstance(found[name].value, list):
        found[name].fail(f"{name} must be a list of points, not {shown(found[name])}")
    return found[name].items() if name in found else []


def _included(kind: Kind, entry: Node, axes: Axes) -> Axes:
    """The axes of one included point: its own values, and the block's where that has one alone."""
    own = _axes(_flat(entry.mapping("a point of include"), READERS[kind], "a point of include"), READERS[kind])
    if "frontier" in own:
        own["frontier"].node.fail("frontier: a point of include is one case; give it to the block")
    whole = {name: axis for name, axis in {**axes, **own}.items() if name != "frontier"}
    for name, axis in whole.items():
        if len(axis.values) > 1 and _last(name) != "repeat":
            axis.node.fail(f"{name}: a point of include has one value") if name in own else (
                entry.fail(f"this point must say which {name!r}: its block lists several")
            )
    _check(kind, whole, entry)
    return whole


def _exclusion(kind: Kind, entry: Node) -> Exclusion:
    readers = EXCLUDABLE[kind]
    found = _flat(entry.mapping("a point of exclude"), readers, "a point of exclude")
    if not found:
        entry.fail("an empty point would exclude everything")
    return Exclusion(kind, {name: tuple(axis.values) for name, axis in _axes(found, readers).items()}, entry)


def _whole(point: Point) -> Point:
    """`point` with the fields of its load beside its other keys."""
    found = dict(point)
    for name in ("load", "serve.load"):
        prefix = name.removesuffix("load")
        found |= {f"{prefix}{key}": value for key, value in point.get(name, {}).items()}
    return found


def _default(name: str, kind: Kind = "train") -> Any:
    """What a case has where the matrix says nothing."""
    types: tuple[type[Frozen], ...] = (ProbeCase,) if kind == "probe" else (TrainCase, ServeCase)
    field = keys.FIELDS.get(name, _last(name))
    return next((one.model_fields[field].default for one in types if field in one.model_fields), None)
