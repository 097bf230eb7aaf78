"""The figures of servers under load and of communication between ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from harness.report.drawing import (
    MAX_LINES,
    Drawn,
    Figure,
    axis,
    escaped,
    groups,
    left_out,
    line_name,
    log_axis,
    medians,
    rounded,
    style,
    styles,
)
from harness.report.entry import Entry, full_label
from harness.report.setups import server_setup, where
from harness.report.words import size as size_text
from harness.schema import LoadPoint
from harness.summary import spread


class _Panel(NamedTuple):
    title: str
    pick: Callable[[LoadPoint], tuple[float | None, float | None]]
    """The middle, and the 95th percentile where there is one."""
    scale: float


_TTFT = _Panel("TTFT, ms", lambda load: (load.ttft.p50_s, load.ttft.p95_s), 1e3)
_TPOT = _Panel("TPOT, ms", lambda load: (load.tpot.p50_s, load.tpot.p95_s), 1e3)
_OUTPUT = _Panel("output tokens/s", lambda load: (load.output_tokens_per_s, None), 1.0)


def _set_up(entry: Entry) -> tuple[str, str]:
    case = entry.serving
    assert case is not None
    return f"{server_setup(case)}, {case.input_len} in, {case.output_len} out", where(entry.record, entry.beside)


def _served(rows: Sequence[Entry]) -> list[Entry]:
    return [row for row in rows if row.case.kind == "serve" and row.serve and row.serve.load]


def _by_load(rows: Sequence[Entry], panel: _Panel, which: int) -> dict[int, list[float]]:
    """The values of a panel by concurrency: the middle (0) or the 95th percentile (1)."""
    points: dict[int, list[float]] = {}
    for row in rows:
        value = panel.pick(row.serve.load)[which] if row.serve and row.serve.load else None
        if value is not None and row.serving:
            points.setdefault(row.serving.concurrency, []).append(value * panel.scale)
    return points


def _panels(layout: Figure, titles: Sequence[str]) -> Figure:
    """`layout` with one upright axis above the other."""
    share, gap = 1 / len(titles), 0.035
    for index, title in enumerate(titles):
        top = 1 - index * (share + gap / 2)
        layout[f"yaxis{index + 1 if index else ''}"] = axis(
            title, domain=[max(0.0, round(top - share + gap, 3)), round(top, 3)], rangemode="tozero"
        )
    return layout


def serving(rows: Sequence[Entry]) -> Drawn | None:
    """Time to first token, time per output token and throughput against concurrency."""
    known = _served(rows)
    found = groups(known, _set_up)
    if not found:
        return None
    shown = dict(list(found.items())[:MAX_LINES])
    panels, looks = (_TTFT, _TPOT, _OUTPUT), styles(list(shown))
    data = [line for index, (name, group) in enumerate(shown.items())
            for line in _load_lines(line_name(name), group, str(index), looks[index], panels)]  # fmt: skip
    loads = sorted({row.serving.concurrency for row in known if row.serving})
    layout: Figure = {"height": 560, "xaxis": axis("requests at once", type="log", tickvals=loads,
                                                   ticktext=[str(load) for load in loads], anchor="y3")}  # fmt: skip
    note = "Solid: median; dotted: 95th percentile. Equal cases are drawn as their median. "
    return Drawn({"data": data, "layout": _panels(layout, [panel.title for panel in panels])},
                 (note + left_out(len(shown), len(found), "group")).strip())  # fmt: skip


def _load_lines(
    name: str, rows: Sequence[Entry], group: str, look: dict[str, Any], panels: Sequence[_Panel]
) -> list[dict[str, Any]]:
    lines = []
    for number, panel in enumerate(panels):
        for which in (0, 1):
            points = medians(_by_load(rows, panel, which))
            if points["x"]:
                dotted = {"dash": "dot", "width": 1.5} if which else {}
                lines.append({
                    "type": "scatter", "mode": "lines" if which else "lines+markers",
                    "name": f"{name}, p95" if which else name,
                    "legendgroup": group, "showlegend": number == 0 and which == 0, "x": points["x"], "y": points["y"],
                    "line": look["line"] | dotted, "marker": look["marker"],
                    "yaxis": f"y{number + 1 if number else ''}",
                })  # fmt: skip
    return lines


def trade_off(rows: Sequence[Entry]) -> Drawn | None:
    """Median latencies over the throughput they were seen at, a line per server, its points named by concurrency."""
    found = {name: group for name, group in groups(_served(rows), _set_up).items()
             if len({row.serving and row.serving.concurrency for row in group}) > 1}  # fmt: skip
    if not found:
        return None
    shown = dict(list(found.items())[:MAX_LINES])
    data = [line for index, (item, look) in enumerate(zip(shown.items(), styles(list(shown)), strict=True))
            for line in _trade_lines(line_name(item[0]), item[1], str(index), look)]  # fmt: skip
    layout: Figure = {"height": 460, "xaxis": axis("output tokens/s, all requests and GPUs of the server",
                                                   rangemode="tozero", anchor="y2")}  # fmt: skip
    note = "Numbers are the requests at once; down and to the right is better. Medians. "
    return Drawn({"data": data, "layout": _panels(layout, [f"{panel.title}, median" for panel in (_TTFT, _TPOT)])},
                 (note + left_out(len(shown), len(found), "group")).strip())  # fmt: skip


def _trade_lines(name: str, rows: Sequence[Entry], group: str, look: dict[str, Any]) -> list[dict[str, Any]]:
    output = _by_load(rows, _OUTPUT, 0)
    lines = []
    for number, panel in enumerate((_TTFT, _TPOT)):
        latency = _by_load(rows, panel, 0)
        loads = [load for load in sorted(output) if load in latency]
        lines.append({
            "type": "scatter", "mode": "lines+markers+text", "name": name, "legendgroup": group, **look,
            "showlegend": number == 0, "x": rounded([spread(output[load]).p50 for load in loads]),
            "y": rounded([spread(latency[load]).p50 for load in loads]), "text": [str(load) for load in loads],
            "textposition": "top center", "cliponaxis": False, "yaxis": f"y{number + 1 if number else ''}",
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
    speeds = log_axis("bus GB/s", [speed for line in data for speed in line["y"]])
    layout = {"xaxis": axis("bytes on each rank", type="log", **ticks), "yaxis": speeds}
    return Drawn({"data": data, "layout": layout}, left_out(len(data), len(known), "probe"))


def _bus_line(row: Entry, index: int) -> dict[str, Any]:
    sizes = [size for size in (row.probe.sizes if row.probe else ()) if size.bus_bytes_per_s]
    speeds = rounded([(size.bus_bytes_per_s or 0) / 1e9 for size in sizes])
    return {"type": "scatter", "mode": "lines+markers", "name": escaped(full_label(row)),
            "x": [size.size_bytes for size in sizes], "y": speeds, **style(index)}  # fmt: skip
