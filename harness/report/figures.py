"""Each figure is one function rows -> plotly figure, as plotly's own JSON, and one line in a list.

A figure is `{"data": [...], "layout": {...}}` with what is particular to it; fonts, colours and margins are the page's.
`None` where the rows have nothing to draw. Sizes are GiB, times as the axis says.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from harness.report.entry import Entry, full_label, place
from harness.report.words import GIB, TIMES, one_line
from harness.report.words import size as size_text
from harness.schema import LoadPoint, RankObservation
from harness.summary import MemoryRow, TrainSummary, spread

Figure = dict[str, Any]

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C8C", "#B8A800")
"""Okabe and Ito's colours for colour-blind readers; black and pale yellow, unreadable on one of the two
backgrounds, as a grey and a darker yellow."""
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star", "triangle-down")
DASHES = ("solid", "dash", "dot", "dashdot")
MAX_LINES = 16
"""Lines of one figure; the note under it counts those left out."""
MAX_CASES = 24
MAX_POINTS = 240
"""Points of one line in a case's detail; longer series keep the slowest step of each stretch."""
MAX_RANKS = 16
MEMORY_KINDS = {"allocated_bytes": "allocated", "reserved_bytes": "reserved", "device_used_bytes": "device used"}


class Drawn(NamedTuple):
    """A figure, and what its reader should know."""

    figure: Figure
    note: str = ""


def _name(text: str) -> str:
    """Text for plotly, which reads a little HTML in names and labels."""
    return html.escape(text, quote=False)


def _axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, **more}


def _style(index: int) -> dict[str, Any]:
    """Colour, symbol and dash of the `index`th line: no two among the first 32 share all three."""
    dash = DASHES[index // len(OKABE_ITO) % len(DASHES)]
    return {"line": {"color": OKABE_ITO[index % len(OKABE_ITO)], "dash": dash, "width": 2},
            "marker": {"color": OKABE_ITO[index % len(OKABE_ITO)], "symbol": SYMBOLS[index % len(SYMBOLS)],
                       "size": 8}}  # fmt: skip


def _left_out(shown: int, of: int, noun: str) -> str:
    return f"The first {shown} of {of} {noun} are drawn; every case has its own figures in its row." if of > shown \
        else ""  # fmt: skip


def _groups(rows: Sequence[Entry], key: Callable[[Entry], str]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


# ---------------------------------------------------------------- across cases


def _throughput_group(entry: Entry) -> str:
    case = entry.training
    assert case is not None
    batch = f"batch {case.micro_batch} {TIMES} {case.grad_accum}"
    return f"{case.variant} {case.method}, {place(case)}, {batch}, {case.device}"


def throughput(rows: Sequence[Entry]) -> Drawn | None:
    """Tokens per second over the sequence length, a line per method; equal points as median with their range."""
    known = [row for row in rows if row.case.kind == "train" and row.train and row.train.tokens_per_s is not None]
    groups = _groups(known, _throughput_group)
    if not groups:
        return None
    if len({row.training.seq_len for row in known if row.training}) == 1:
        return _throughput_bars(groups)
    data = [_throughput_line(name, group, i) for i, (name, group) in enumerate(list(groups.items())[:MAX_LINES])]
    lengths = sorted({row.training.seq_len for row in known if row.training})
    layout = {"xaxis": _axis("tokens per sample", type="log", tickvals=lengths, ticktext=[f"{x:,}" for x in lengths]),
              "yaxis": _axis("tokens/s, all devices", rangemode="tozero")}  # fmt: skip
    note = _left_out(MAX_LINES, len(groups), "groups of cases")
    return Drawn({"data": data, "layout": layout}, f"Bars span equal cases, where there are several. {note}".strip())


def _throughput_bars(groups: dict[str, list[Entry]]) -> Drawn:
    """A bar per group, where there is one sequence length only."""
    shown = list(groups.items())[:MAX_CASES]
    points = [spread([row.train.tokens_per_s for row in rows if row.train and row.train.tokens_per_s is not None])
              for _, rows in shown]  # fmt: skip
    lengths = {row.training.seq_len for _, rows in shown for row in rows if row.training}
    data = [{"type": "bar", "orientation": "h", "name": "tokens/s", "y": [_name(name) for name, _ in shown],
             "x": _round([point.p50 for point in points]), "marker": {"color": OKABE_ITO[0]}, "width": 0.6,
             "error_x": {"type": "data", "symmetric": False, "thickness": 1.5,
                         "array": _round([(p.max or 0.0) - (p.p50 or 0.0) for p in points]),
                         "arrayminus": _round([(p.p50 or 0.0) - (p.min or 0.0) for p in points])}}]  # fmt: skip
    title = f"tokens/s, all devices, samples of {lengths.pop():,} tokens"
    layout = {"xaxis": _axis(title, rangemode="tozero"), "yaxis": {"autorange": "reversed"},
              "meta": {"wide_labels": True}, "height": 110 + 34 * len(shown)}  # fmt: skip
    return Drawn({"data": data, "layout": layout}, _left_out(MAX_CASES, len(groups), "groups of cases"))


def _throughput_line(name: str, rows: Sequence[Entry], index: int) -> dict[str, Any]:
    by_length: dict[int, list[float]] = {}
    for row in rows:
        if row.training and row.train and row.train.tokens_per_s is not None:
            by_length.setdefault(row.training.seq_len, []).append(row.train.tokens_per_s)
    points = [(length, spread(values)) for length, values in sorted(by_length.items())]
    middle = [point.p50 or 0.0 for _, point in points]
    return {
        "type": "scatter", "mode": "lines+markers", "name": _name(name), **_style(index),
        "x": [length for length, _ in points], "y": _round(middle),
        "error_y": {"type": "data", "symmetric": False, "thickness": 1.5,
                    "array": _round([(p.max or 0.0) - m for (_, p), m in zip(points, middle, strict=True)]),
                    "arrayminus": _round([m - (p.min or 0.0) for (_, p), m in zip(points, middle, strict=True)])},
    }  # fmt: skip


def memory_gpu(rows: Sequence[Entry]) -> Drawn | None:
    """Each rank's peak of allocated GPU memory, a row of bars per case."""
    return _memory_by_case(rows, "allocated_bytes", "peak allocated per rank, GiB")


def memory_cpu(rows: Sequence[Entry]) -> Drawn | None:
    """Each rank's peak growth of resident memory, a row of bars per case."""
    return _memory_by_case(rows, "rss_growth_bytes", "peak growth of resident memory per rank, GiB")


def _memory_by_case(rows: Sequence[Entry], field: str, title: str) -> Drawn | None:
    if field == "rss_growth_bytes":
        rows = [row for row in rows if row.training and row.training.device == "cpu"]
    peaks = {full_label(row): _rank_peaks(row.train, field) for row in rows if row.train}
    known = {name: ranks for name, ranks in peaks.items() if ranks}
    if not known:
        return None
    shown = dict(list(known.items())[:MAX_CASES])
    ranks = sorted({rank for peaks in shown.values() for rank in peaks})[:MAX_RANKS]
    data = [_rank_bars(rank, shown) for rank in ranks]
    height = 100 + (14 + 16 * len(ranks)) * len(shown)
    layout = {"barmode": "group", "xaxis": _axis(title, rangemode="tozero"), "height": height,
              "yaxis": {"autorange": "reversed"}, "meta": {"wide_labels": True}}  # fmt: skip
    return Drawn({"data": data, "layout": layout}, _left_out(MAX_CASES, len(known), "cases"))


def _rank_peaks(train: TrainSummary, field: str) -> dict[int, int]:
    peaks: dict[int, int] = {}
    for row in train.memory:
        value = getattr(row, field)
        if value is not None:
            peaks[row.rank] = max(peaks.get(row.rank, 0), value)
    return peaks


def _rank_bars(rank: int, cases: dict[str, dict[int, int]]) -> dict[str, Any]:
    names = [name for name, ranks in cases.items() if rank in ranks]
    return {
        "type": "bar", "orientation": "h", "name": f"rank {rank}", "y": [_name(name) for name in names],
        "x": _round([cases[name][rank] / GIB for name in names]), "marker": {"color": OKABE_ITO[rank % 8]},
    }  # fmt: skip


def step_times(rows: Sequence[Entry]) -> Drawn | None:
    """The slowest rank's time of each step, a line per case; warm-up shaded where all cases share it."""
    known = [row for row in rows if row.train and row.train.step_time_s.n]
    if not known:
        return None
    data = [_slowest_line(row, index) for index, row in enumerate(known[:MAX_LINES])]
    warmups = {row.train.warmup_steps for row in known[:MAX_LINES] if row.train}
    layout = _steps_layout(warmups.pop() if len(warmups) == 1 else 0, [y for line in data for y in line["y"]])
    return Drawn({"data": data, "layout": layout}, _left_out(MAX_LINES, len(known), "cases"))


def _slowest_line(row: Entry, index: int) -> dict[str, Any]:
    ranks = row.record.last.observation.ranks if row.record.last else ()
    columns = [dict(zip(rank.steps.step, rank.steps.step_time_s, strict=True)) for rank in ranks]
    slowest = {step: max((c[step] or 0.0 for c in columns if step in c), default=0.0) for step in columns[0]}
    steps, times = _thin(list(slowest), list(slowest.values()))
    style = _style(index)
    return {"type": "scatter", "mode": "lines", "name": _name(full_label(row)), "line": style["line"], "x": steps,
            "y": _round([time or None for time in times])}  # fmt: skip


def _log_axis(title: str, values: Sequence[float | None]) -> dict[str, Any]:
    """A logarithmic axis with every label in full, at 1, 2 and 5 of each decade."""
    known = [value for value in values if value]
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    ticks = [factor * 10.0**power for power in range(low, high + 1) for factor in (1, 2, 5)]
    return _axis(title, type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])


def _steps_layout(warmup_steps: int, times: Sequence[float | None]) -> dict[str, Any]:
    axis = _log_axis("step time, s", times) if any(times) else _axis("step time, s")
    layout: Figure = {"xaxis": _axis("optimizer step"), "yaxis": axis}
    if warmup_steps:
        layout["shapes"] = [{"type": "rect", "xref": "x", "yref": "paper", "x0": 0.5, "x1": warmup_steps + 0.5,
                             "y0": 0, "y1": 1, "line": {"width": 0}, "fillcolor": "rgba(128,128,128,0.16)",
                             "layer": "below"}]  # fmt: skip
        layout["annotations"] = [{"xref": "x", "yref": "paper", "x": warmup_steps + 0.5, "y": 1, "xanchor": "right",
                                  "yanchor": "bottom", "showarrow": False, "text": "warm-up"}]  # fmt: skip
    return layout


def _serving_group(entry: Entry) -> str:
    case = entry.serving
    assert case is not None
    model = "" if case.adapter == "none" else f" {one_line(case.adapter.split('/')[-1], 40)}"
    return f"{case.variant}{model}, tp {case.tensor_parallel}, {case.input_len} in, {case.output_len} out"


class _Panel(NamedTuple):
    title: str
    pick: Callable[[LoadPoint], tuple[float | None, float | None]]
    """The middle, and the 95th percentile where there is one."""
    scale: float


_SERVING_PANELS = (
    _Panel("TTFT, ms", lambda load: (load.ttft.p50_s, load.ttft.p95_s), 1e3),
    _Panel("TPOT, ms", lambda load: (load.tpot.p50_s, load.tpot.p95_s), 1e3),
    _Panel("output tokens/s", lambda load: (load.output_tokens_per_s, None), 1.0),
)


def serving(rows: Sequence[Entry]) -> Drawn | None:
    """Time to first token, time per output token and throughput against concurrency."""
    known = [row for row in rows if row.case.kind == "serve" and row.serve and row.serve.load]
    groups = _groups(known, _serving_group)
    if not groups:
        return None
    data = [line for index, (name, group) in enumerate(list(groups.items())[:MAX_LINES])
            for line in _serving_lines(name, group, index)]  # fmt: skip
    loads = sorted({row.serving.concurrency for row in known if row.serving})
    layout: Figure = {"height": 560, "xaxis": _axis("requests at once", type="log", tickvals=loads,
                                                    ticktext=[str(load) for load in loads], anchor="y3")}  # fmt: skip
    for index, (title, _, _) in enumerate(_SERVING_PANELS):
        top = 1 - index * 0.345
        layout[f"yaxis{index + 1 if index else ''}"] = _axis(title, domain=[round(top - 0.31, 3), round(top, 3)],
                                                             rangemode="tozero")  # fmt: skip
    note = "Solid: median; dotted: 95th percentile. Equal cases are drawn as their median. "
    return Drawn({"data": data, "layout": layout}, (note + _left_out(MAX_LINES, len(groups), "groups")).strip())


def _serving_lines(name: str, rows: Sequence[Entry], index: int) -> list[dict[str, Any]]:
    lines, style = [], _style(index)
    for panel, (_, pick, scale) in enumerate(_SERVING_PANELS):
        for which in (0, 1):
            points: dict[int, list[float]] = {}
            for row in rows:
                value = pick(row.serve.load)[which] if row.serve and row.serve.load else None
                if value is not None and row.serving:
                    points.setdefault(row.serving.concurrency, []).append(value * scale)
            if points:
                x = sorted(points)
                lines.append({
                    "type": "scatter", "mode": "lines" if which else "lines+markers", "name": _name(name),
                    "legendgroup": str(index), "showlegend": panel == 0 and which == 0, "x": x,
                    "y": _round([spread(points[at]).p50 for at in x]),
                    "line": style["line"] | ({"dash": "dot", "width": 1.5} if which else {}),
                    "marker": style["marker"], "yaxis": f"y{panel + 1 if panel else ''}",
                })  # fmt: skip
    return lines


def bus_bandwidth(rows: Sequence[Entry]) -> Drawn | None:
    """Bus bandwidth over the size of an all-reduce, a line per probe."""
    known = [row for row in rows if row.probe and any(size.bus_bytes_per_s for size in row.probe.sizes)]
    if not known:
        return None
    data = [_bus_line(row, index) for index, row in enumerate(known[:MAX_LINES])]
    sizes = sorted({size.size_bytes for row in known if row.probe for size in row.probe.sizes})
    ticks = {"tickvals": sizes, "ticktext": [size_text(size).text for size in sizes]}
    layout = {"xaxis": _axis("bytes on each rank", type="log", **ticks), "yaxis": _axis("bus GB/s", type="log")}
    return Drawn({"data": data, "layout": layout}, _left_out(MAX_LINES, len(known), "probes"))


def _bus_line(row: Entry, index: int) -> dict[str, Any]:
    sizes = [size for size in (row.probe.sizes if row.probe else ()) if size.bus_bytes_per_s]
    speeds = _round([(size.bus_bytes_per_s or 0) / 1e9 for size in sizes])
    return {"type": "scatter", "mode": "lines+markers", "name": _name(full_label(row)),
            "x": [size.size_bytes for size in sizes], "y": speeds, **_style(index)}  # fmt: skip


FIGURES: tuple[tuple[str, Callable[[Sequence[Entry]], Drawn | None]], ...] = (
    ("Training throughput over sequence length", throughput),
    ("Peak GPU memory by case and rank", memory_gpu),
    ("Peak CPU memory by case and rank", memory_cpu),
    ("Step time over steps", step_times),
    ("Serving latency and throughput against load", serving),
    ("Bus bandwidth over the size of an all-reduce", bus_bandwidth),
)


# ---------------------------------------------------------------- of one case


def case_memory(train: TrainSummary) -> Drawn | None:
    """Memory by phase: grouped bars, one group of colours per rank; on a GPU all three kinds."""
    fields = dict(MEMORY_KINDS) if train.memory_measure == "allocated" else {"rss_growth_bytes": "resident growth"}
    if train.memory_measure == "rss":
        fields = {"rss_bytes": "resident"}
    data = []
    for rank in sorted({row.rank for row in train.memory})[:MAX_RANKS]:
        rows = [row for row in train.memory if row.rank == rank]
        data += [_phase_bars(rank, rows, field, name, i) for i, (field, name) in enumerate(fields.items())]
    data = [bars for bars in data if bars["x"]]
    if not data:
        return None
    layout = {"barmode": "group", "xaxis": {"type": "category"}, "yaxis": _axis("peak, GiB", rangemode="tozero")}
    return Drawn({"data": data, "layout": layout})


def _phase_bars(rank: int, rows: Sequence[MemoryRow], field: str, name: str, index: int) -> dict[str, Any]:
    known = [row for row in rows if getattr(row, field) is not None]
    return {
        "type": "bar", "name": f"rank {rank}, {name}",
        "x": [_name(one_line(row.phase, 40).replace("_", " ")) for row in known],
        "y": _round([getattr(row, field) / GIB for row in known]),
        "marker": {"color": OKABE_ITO[rank % len(OKABE_ITO)], "opacity": (1.0, 0.65, 0.35)[index]},
    }  # fmt: skip


def case_steps(ranks: Sequence[RankObservation], warmup_steps: int) -> Drawn | None:
    """Step time of each rank over steps, warm-up shaded."""
    times = [time for rank in ranks for time in rank.steps.step_time_s]
    return _by_step(ranks, "step_time_s", _steps_layout(warmup_steps, times))


def case_loss(ranks: Sequence[RankObservation], warmup_steps: int) -> Drawn | None:
    """Loss of each rank over steps, warm-up shaded."""
    return _by_step(ranks, "loss", _steps_layout(warmup_steps, ()) | {"yaxis": _axis("loss")})


def _by_step(ranks: Sequence[RankObservation], column: str, layout: Figure) -> Drawn | None:
    data = []
    for index, rank in enumerate(ranks[:MAX_RANKS]):
        values = getattr(rank.steps, column)
        if any(value is not None for value in values):
            steps, shown = _thin(list(rank.steps.step), list(values))
            data.append({"type": "scatter", "mode": "lines+markers" if len(steps) <= 60 else "lines",
                         "name": f"rank {rank.rank}", "x": steps, "y": _round(shown),
                         "line": _style(index)["line"], "marker": {"size": 5}})  # fmt: skip
    if not data:
        return None
    thinned = max(len(rank.steps.step) for rank in ranks) > MAX_POINTS
    note = "Of each stretch of steps the largest value is drawn; all of them are in the record." if thinned else ""
    return Drawn({"data": data, "layout": layout}, note)


def _thin(steps: list[int], values: list[float | None]) -> tuple[list[int], list[float | None]]:
    """At most `MAX_POINTS` points: of each stretch the largest, so that a spike stays seen."""
    stretch = -(-len(steps) // MAX_POINTS)
    if stretch <= 1:
        return steps, values
    starts = range(0, len(steps), stretch)
    best = [max(range(at, min(at + stretch, len(steps))), key=lambda i: values[i] or float("-inf")) for at in starts]
    return [steps[i] for i in best], [values[i] for i in best]


def _round(values: Sequence[float | None]) -> list[float | None]:
    """Five significant digits: more than a pixel shows, half the bytes."""
    return [None if value is None else float(f"{value:.5g}") for value in values]
