"""A sampler's files (`payload/sampler.py`) -> one `GpuSeries` per GPU. Takes files cut at any byte; raises on nothing.

Of ten samples a second a record keeps rows of one second, and of long jobs wider ones: at most `MAX_ROWS` over all
GPUs. The samples themselves stay in the job's directory.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from harness import events
from harness.observe.coerce import Json, count, mapping, real, seconds, text
from harness.schema import GpuProcess, GpuSeries, GpuSteady

MAX_ROWS = 600
"""Rows of all GPUs together that a record keeps: 3,600 values, about 65 kB with one on a line."""
MIN_ROWS = 8
MAX_GPUS = 64
MAX_PROCESSES = 12
MAX_NOTES = 30
MAX_SECOND = 10_000_000
"""Rows of a job last at most that long after its first sample (115 days): beyond it a clock is wrong."""
REASONS = {0x4: "software power cap", 0x8: "hardware slowdown", 0x10: "sync boost", 0x20: "software thermal slowdown",
           0x40: "hardware thermal slowdown", 0x80: "hardware power brake", 0x100: "display clock"}  # fmt: skip
"""`nvmlClocksEventReason*` (nvml.h), all but idle and clocks that somebody set."""
LARGEST = 1e17
"""Beyond this a value is none: an energy counter in mJ reaches 1e14 after a century."""
_FILE = re.compile(r"gpu\.samples\.node(\d{1,5})\.jsonl")


@dataclass(frozen=True)
class Window:
    """The time that is measured, in Unix seconds, and the tokens of all ranks in it."""

    start: float
    end: float
    tokens: int | None = None


@dataclass
class Telemetry:
    """What was read."""

    gpus: tuple[GpuSeries, ...] = ()
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass
class _Mean:
    """Mean, least and largest of what comes by."""

    n: int = 0
    total: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    def add(self, value: float | None) -> None:
        if value is not None:
            self.n, self.total = self.n + 1, self.total + value
            self.low, self.high = min(self.low, value), max(self.high, value)

    def merge(self, other: _Mean) -> None:
        self.n, self.total = self.n + other.n, self.total + other.total
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    @property
    def mean(self) -> float | None:
        return float(f"{self.total / self.n:.5g}") if self.n else None

    @property
    def least(self) -> float | None:
        return self.low if self.n else None

    @property
    def largest(self) -> float | None:
        return self.high if self.n else None


Role = Literal["train", "serve"]
MEASURES = ("memory_used_bytes", "power_w", "sm_clock_mhz", "utilisation")
Row = dict[str, _Mean]


def _row() -> Row:
    return {name: _Mean() for name in MEASURES}


@dataclass
class _Card:
    """One GPU while its file is read."""

    described: Json = field(default_factory=dict)
    rows: dict[int, Row] = field(default_factory=dict)
    all: Row = field(default_factory=_row)
    inside: Row = field(default_factory=_row)
    first: int | None = None
    memory_clock: _Mean = field(default_factory=_Mean)
    energy: list[tuple[float, float]] = field(default_factory=list)
    """Time and joules of the counter, as it grows."""
    power: list[tuple[float, float]] = field(default_factory=list)
    """Time and watts within the window."""
    slow: dict[str, _Mean] = field(default_factory=dict)
    slow_samples: int = 0
    held_back: dict[int, int] = field(default_factory=dict)
    processes: dict[int, GpuProcess] = field(default_factory=dict)
    used_by: dict[int, int] = field(default_factory=dict)
    samples: int = 0


@dataclass
class _Node:
    """One sampler's file while it is read."""

    number: int
    window: Window | None
    columns: list[str] = field(default_factory=list)
    slow_columns: list[str] = field(default_factory=list)
    interval_s: float | None = None
    start: float | None = None
    last: float = -math.inf
    cards: dict[int, _Card] = field(default_factory=dict)
    share: float | None = None
    notes: dict[str, None] = field(default_factory=dict)

    def card(self, ordinal: int) -> _Card | None:
        if ordinal not in self.cards and (ordinal < 0 or len(self.cards) >= MAX_GPUS):
            return None
        return self.cards.setdefault(ordinal, _Card())


def read(role: Role, job_dirs: Iterable[Path], window: Window | None, max_rows: int = MAX_ROWS) -> Telemetry:
    """The GPUs of jobs that train or serve, each over its whole job and, where there is one, over `window`."""
    nodes, problems = [], []
    for path in (path for folder in job_dirs for path in sorted(folder.glob("gpu.samples.node*.jsonl"))):
        match = _FILE.fullmatch(path.name)
        if match:
            node = _Node(int(match[1]), window)
            problems += _read_file(node, path)
            nodes.append(node)
    gpus = [(node, ordinal, card) for node in nodes for ordinal, card in sorted(node.cards.items())]
    rows = max(MIN_ROWS, max_rows // max(1, len(gpus)))
    series = tuple(_series(role, node, ordinal, card, rows) for node, ordinal, card in gpus[:MAX_GPUS])
    notes = tuple({note: None for node in nodes for note in node.notes})[:MAX_NOTES]
    return Telemetry(series, notes, tuple(problems))


def _read_file(node: _Node, path: Path) -> list[str]:
    """Add one file; what could not be read, in one sentence."""
    bad = 0
    try:
        for _, event in events.read(str(path)):
            handle = _KINDS.get(event["kind"]) if event else None
            if event is None or handle is None:
                bad += 1
            else:
                handle(node, event)
    except OSError as error:
        return [f"{path.parent.name}/{path.name}: cannot be read ({error.strerror})"]
    # The last line of a sampler that was killed is cut: no news.
    return [f"{path.parent.name}/{path.name}: {bad} lines are no samples"] if bad > 1 else []


# ---------------------------------------------------------------- one function per kind of line


def _gpus(node: _Node, event: Json) -> None:
    names = [[text(name, 40) or "" for name in event.get(key) or ()] if isinstance(event.get(key), list) else []
             for key in ("columns", "slow_columns")]  # fmt: skip
    node.columns, node.slow_columns = names
    node.interval_s = seconds(event.get("interval_s"))
    described = event.get("gpus")
    for one in described[:MAX_GPUS] if isinstance(described, list) else ():
        ordinal = count(mapping(one).get("ordinal"))
        if ordinal is not None and (card := node.card(ordinal)):
            card.described = mapping(one)


def _sample(node: _Node, event: Json) -> None:
    t, rows = seconds(event.get("t")), event.get("gpus")
    if t is None or not isinstance(rows, list):
        return
    node.start = t if node.start is None else node.start
    node.last = max(node.last, t) if t - node.start <= MAX_SECOND else node.last
    # A clock that was set back or far ahead has no row to go to; its sample still counts for the whole.
    second = math.floor(t - node.start) if 0 <= t - node.start <= MAX_SECOND else None
    for ordinal, values in enumerate(rows):
        card = node.card(ordinal) if isinstance(values, list) else None
        if card:
            _take(node, card, t, second, dict(zip(node.columns, values, strict=False)))
    for ordinal_text, values in mapping(event.get("slow")).items():
        card = node.card(int(ordinal_text)) if ordinal_text.isdecimal() and len(ordinal_text) < 6 else None
        if card and isinstance(values, list):
            _take_slow(card, dict(zip(node.slow_columns, values, strict=False)))


def _amount(value: Any) -> float | None:
    """A finite number from 0 to `LARGEST`."""
    number = real(value)
    return number if number is not None and 0 <= number <= LARGEST else None


def _take(node: _Node, card: _Card, t: float, second: int | None, values: Json) -> None:
    """One GPU's fast values."""
    found = {name: _amount(values.get(name)) for name in MEASURES}
    inside = node.window is not None and node.window.start <= t <= node.window.end
    into = [card.all, *([card.inside] if inside else [])]
    into += [] if second is None else [card.rows.setdefault(second, _row())]
    for row in into:
        for name, value in found.items():
            row[name].add(value)
    card.samples += 1
    card.first = card.first if card.samples > 1 else count(values.get("memory_used_bytes"))
    card.memory_clock.add(_amount(values.get("memory_clock_mhz")))
    if found["power_w"] is not None and inside:
        card.power.append((t, found["power_w"]))
    energy = _amount(values.get("energy_mj"))
    if energy is not None and (not card.energy or t > card.energy[-1][0]):
        card.energy.append((t, energy / 1000))


def _take_slow(card: _Card, values: Json) -> None:
    """One GPU's slow values."""
    for name in ("temperature_c", "pcie_rx_bytes_per_s", "pcie_tx_bytes_per_s"):
        card.slow.setdefault(name, _Mean()).add(_amount(values.get(name)))
    bits = count(values.get("throttle_bits"))
    if bits is not None:
        card.slow_samples += 1
        for bit in REASONS:
            if bits & bit:
                card.held_back[bit] = card.held_back.get(bit, 0) + 1
    processes = values.get("processes")
    for pair in processes[: 4 * MAX_PROCESSES] if isinstance(processes, list) else ():
        pid, used = (count(value) for value in pair) if isinstance(pair, list) and len(pair) == 2 else (None, None)
        if pid is not None and (pid in card.used_by or len(card.used_by) < 4 * MAX_PROCESSES):
            card.used_by[pid] = max(card.used_by.get(pid, 0), used or 0)


def _process(node: _Node, event: Json) -> None:
    ordinal, pid = count(event.get("gpu")), count(event.get("pid"))
    card = node.card(ordinal) if ordinal is not None else None
    if card is not None and pid is not None and len(card.processes) < 4 * MAX_PROCESSES:
        own = event.get("own")
        known = own if isinstance(own, bool) else None
        card.processes[pid] = GpuProcess(pid=pid, name=text(event.get("name"), 80), own=known)


def _cost(node: _Node, event: Json) -> None:
    cpu, wall = seconds(event.get("cpu_s")), seconds(event.get("wall_s"))
    if cpu is not None and wall:
        node.share = float(f"{cpu / wall:.3g}")


def _note(node: _Node, event: Json) -> None:
    found = text(event.get("text"), 300)
    if found and len(node.notes) < MAX_NOTES:
        node.notes[found] = None


_KINDS = {"gpus": _gpus, "sample": _sample, "process": _process, "cost": _cost, "note": _note}


# ---------------------------------------------------------------- what is kept


def _series(role: Role, node: _Node, ordinal: int, card: _Card, max_rows: int) -> GpuSeries:
    span = max(card.rows, default=0) + 1
    row_s = -(-span // max_rows)
    return GpuSeries(
        role=role, node=node.number, ordinal=ordinal, interval_s=_interval_s(node, card), samples=card.samples,
        start=node.start, row_s=float(row_s), **_columns(card.rows, row_s, -(-span // row_s) if card.rows else 0),
        memory_first_bytes=card.first, memory_max_bytes=_whole(card.all["memory_used_bytes"].largest),
        memory_clock_max_mhz=_whole(card.memory_clock.largest),
        temperature_max_c=_whole(_slow(card, "temperature_c")),
        pcie_rx_max_bytes_per_s=_whole(_slow(card, "pcie_rx_bytes_per_s")),
        pcie_tx_max_bytes_per_s=_whole(_slow(card, "pcie_tx_bytes_per_s")),
        throttle={REASONS[bit]: round(n / card.slow_samples, 4) for bit, n in sorted(card.held_back.items())},
        energy_j=round(card.energy[-1][1] - card.energy[0][1], 3) if len(card.energy) > 1 else None,
        steady=_steady(node.window, card), processes=_processes(card), sampler_core_share=node.share,
        **_described(card.described),
    )  # fmt: skip


def _interval_s(node: _Node, card: _Card) -> float | None:
    """Mean seconds between two samples; what was meant where there are fewer than two."""
    if node.start is None or card.samples < 2 or node.last <= node.start:
        return node.interval_s
    return float(f"{(node.last - node.start) / (card.samples - 1):.3g}")


def _columns(rows: dict[int, Row], row_s: int, amount: int) -> dict[str, Any]:
    """The columns, `amount` rows of `row_s` seconds each."""
    wide = [_row() for _ in range(amount)]
    for second, row in rows.items():
        for name in MEASURES:
            wide[second // row_s][name].merge(row[name])
    return {
        "memory_used_bytes": tuple(_whole(row["memory_used_bytes"].largest) for row in wide),
        "power_w": tuple(row["power_w"].mean for row in wide),
        "power_max_w": tuple(row["power_w"].largest for row in wide),
        "sm_clock_mhz": tuple(row["sm_clock_mhz"].mean for row in wide),
        "sm_clock_min_mhz": tuple(row["sm_clock_mhz"].least for row in wide),
        "utilisation": tuple(row["utilisation"].mean for row in wide),
    }


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _slow(card: _Card, name: str) -> float | None:
    return card.slow[name].largest if name in card.slow else None


def _described(said: Json) -> dict[str, Any]:
    """The fields of a `GpuSeries` that the first line states."""
    links = {text(name, 40) or "": n for name, value in list(mapping(said.get("nvlinks")).items())[:16]
             if (n := count(value)) is not None}  # fmt: skip
    near = {text(name, 8) or "": level for name, value in list(mapping(said.get("near")).items())[:MAX_GPUS]
            if (level := text(value, 40))}  # fmt: skip
    return {
        "index": count(said.get("index")), "uuid": text(said.get("uuid"), 100), "name": text(said.get("name"), 100),
        "total_bytes": count(said.get("total_bytes")), "power_limit_w": seconds(said.get("power_limit_w")),
        "power_source": text(said.get("power_source"), 20), "bus": text(said.get("bus"), 40),
        "numa_node": count(said.get("numa_node")), "near_cpus": text(said.get("near_cpus"), 200), "pcie": _pcie(said),
        "nvlinks": links, "near": near,
    }  # fmt: skip


def _pcie(said: Json) -> str | None:
    names = ("pcie_generation", "pcie_width")
    now, most = ([count(said.get(name + suffix)) for name in names] for suffix in ("", "_max"))
    if None in now:
        return None
    shown = "gen {} x{}".format(*now)
    return shown if None in most or now == most else "{} of gen {} x{}".format(shown, *most)


def _processes(card: _Card) -> tuple[GpuProcess, ...]:
    """Who held memory, those of others first, then the largest."""
    found = [card.processes.get(pid, GpuProcess(pid=pid)).model_copy(update={"max_bytes": used or None})
             for pid, used in card.used_by.items()]  # fmt: skip
    found.sort(key=lambda one: (one.own is not False, -(one.max_bytes or 0)))
    return tuple(found[:MAX_PROCESSES])


# ---------------------------------------------------------------- energy


def _steady(window: Window | None, card: _Card) -> GpuSteady | None:
    if window is None or window.end <= window.start or not card.samples:
        return None
    counted = _counted_j(card.energy, window)
    integrated = _integrated_j(card.power, window) if counted is None else None
    energy = counted if counted is not None else integrated
    power, clock = card.inside["power_w"], card.inside["sm_clock_mhz"]
    return GpuSteady(
        start=window.start, duration_s=round(window.end - window.start, 6), tokens=window.tokens,
        energy_j=None if energy is None else float(f"{energy:.6g}"),
        energy_from=None if energy is None else "power" if counted is None else "counter",
        power_mean_w=power.mean, power_max_w=power.largest, sm_clock_mean_mhz=clock.mean,
        sm_clock_min_mhz=clock.least, utilisation_mean=card.inside["utilisation"].mean, samples=power.n,
    )  # fmt: skip


def _counted_j(points: Sequence[tuple[float, float]], window: Window) -> float | None:
    """Joules between the window's ends by the counter, linear between two samples; needs one beyond each end."""
    start, end = (_at(points, when) for when in (window.start, window.end))
    if start is None or end is None or any(b[1] < a[1] for a, b in pairwise(points)):
        return None  # a counter that fell was reset in between
    return end - start if end > start else None


def _at(points: Sequence[tuple[float, float]], when: float) -> float | None:
    """The counter at a time within the samples."""
    after = bisect_left(points, when, key=lambda point: point[0])
    if after == len(points) or (after == 0 and points[0][0] > when):
        return None
    (t1, e1), (t0, e0) = points[after], points[max(0, after - 1)]
    return e1 if t1 == t0 else e0 + (e1 - e0) * (when - t0) / (t1 - t0)


def _integrated_j(points: Sequence[tuple[float, float]], window: Window) -> float | None:
    """Joules by the trapezoids under the sampled power, scaled to the whole window; needs most of it sampled."""
    pairs = list(pairwise(points))
    covered = math.fsum(b[0] - a[0] for a, b in pairs)
    if covered < 0.5 * (window.end - window.start):
        return None
    energy = math.fsum((a[1] + b[1]) / 2 * (b[0] - a[0]) for a, b in pairs)
    return energy * (window.end - window.start) / covered
