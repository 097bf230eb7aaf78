"""A record's GPUs in detail: memory and power over time, where they sit in the host, and who used them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.report.drawing import MAX_RANKS, OKABE_ITO, Drawn
from harness.report.parts import Section, table_section, word
from harness.report.words import GIB, MISSING, Cell, digits, gib, size
from harness.schema import GpuSeries

_PLACE_HEAD = ("GPU", "uuid", "bus", "PCIe", "NVLinks", "PCIe to others", "NUMA node", "near CPUs", "PCIe in, most",
               "PCIe out, most", "memory before, GiB")  # fmt: skip
_PROCESS_HEAD = ("GPU", "pid", "name", "of this job", "memory max, GiB")


def sampled_sections(series: Sequence[GpuSeries]) -> list[Section | None]:
    """What a reader opens who wants to know more than the sums; nothing on a CPU and where telemetry was off."""
    found: list[Section | None] = []
    for role in ("train", "serve"):
        own = [one for one in series if one.role == role]
        drawn = over_time(own)
        of_role = "" if len({one.role for one in series}) < 2 else f", {role}"
        title = f"GPU memory and power over time{of_role}"
        found += [
            Section(title, figure=drawn.figure, note=drawn.note) if drawn else None,
            table_section(f"Where the GPUs sit{of_role}", _PLACE_HEAD, [_place(one) for one in own]),
            table_section(f"Processes on the GPUs{of_role}", _PROCESS_HEAD, _processes(own)),
        ]
    return found


def _label(of: GpuSeries) -> str:
    index = "" if of.index in (None, of.ordinal) else f" (driver's {of.index})"
    return f"{of.ordinal}{index}" if of.node == 0 else f"node {of.node}: {of.ordinal}{index}"


def _place(of: GpuSeries) -> tuple[Cell, ...]:
    links = ", ".join(f"{amount} to {peer}" for peer, amount in of.nvlinks.items())
    near = ", ".join(f"{other}: {level}" for other, level in of.near.items())
    numa = of.numa_node if of.numa_node is not None else MISSING
    return (word(_label(of)), word(of.uuid or MISSING), word(of.bus or MISSING), word(of.pcie or MISSING),
            word(links or "none"), word(near or MISSING), word(numa), word(of.near_cpus or MISSING),
            _per_s(of.pcie_rx_max_bytes_per_s), _per_s(of.pcie_tx_max_bytes_per_s),
            gib(of.memory_first_bytes))  # fmt: skip


def _per_s(value: int | None) -> Cell:
    cell = size(value)
    return cell if value is None else cell._replace(text=f"{cell.text}/s")


def _processes(series: Sequence[GpuSeries]) -> list[tuple[Cell, ...]]:
    own = {True: "yes", False: "NO", None: "not to be seen"}
    return [(word(_label(of)), Cell(str(one.pid)), word(one.name or MISSING), Cell(own[one.own]), gib(one.max_bytes))
            for of in series for one in of.processes]  # fmt: skip


# ---------------------------------------------------------------- over time


def over_time(series: Sequence[GpuSeries]) -> Drawn | None:
    """Memory in use above, power below, a line per GPU over the job's seconds; the measured time is shaded."""
    shown = [one for one in series if one.start is not None and one.memory_used_bytes][:MAX_RANKS]
    if not shown:
        return None
    began = min(one.start or 0.0 for one in shown)
    data = [line for index, one in enumerate(shown) for line in _lines(one, index, (one.start or 0.0) - began)]
    layout: dict[str, Any] = {
        "height": 460,
        "xaxis": {"title": {"text": "seconds since the first sample"}, "anchor": "y2"},
        "yaxis": {"title": {"text": "memory, GiB"}, "domain": [0.56, 1.0], "rangemode": "tozero"},
        "yaxis2": {"title": {"text": "power, W"}, "domain": [0.0, 0.44], "rangemode": "tozero"},
        **_shade(shown[0], began),
    }
    note = f"A point covers {digits(max(one.row_s for one in shown))} s: the largest memory, the mean power in it."
    shaded = " The measured time is shaded." if "shapes" in layout else ""
    left_out = f" The first {len(shown)} of {len(series)} GPUs are drawn." if len(series) > len(shown) else ""
    return Drawn({"data": data, "layout": layout}, note + shaded + left_out)


def _shade(of: GpuSeries, began: float) -> dict[str, Any]:
    """The shape over the measured time, where there is one."""
    steady = of.steady
    if steady is None or steady.start is None:
        return {}
    return {"shapes": [{"type": "rect", "xref": "x", "yref": "paper", "y0": 0, "y1": 1, "line": {"width": 0},
                        "x0": round(steady.start - began, 2), "layer": "below",
                        "x1": round(steady.start + steady.duration_s - began, 2),
                        "fillcolor": "rgba(128,128,128,0.16)"}]}  # fmt: skip


def _lines(of: GpuSeries, index: int, offset_s: float) -> list[dict[str, Any]]:
    x = [round(offset_s + row * of.row_s, 2) for row in range(len(of.memory_used_bytes))]
    memory = [None if value is None else round(value / GIB, 3) for value in of.memory_used_bytes]
    style = {"type": "scatter", "mode": "lines", "x": x, "name": f"GPU {_label(of)}", "legendgroup": str(index),
             "line": {"color": OKABE_ITO[index % len(OKABE_ITO)], "width": 2}}  # fmt: skip
    return [{**style, "y": memory}, {**style, "y": list(of.power_w), "yaxis": "y2", "showlegend": False}]
