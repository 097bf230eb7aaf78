"""The figures in the detail of one case: memory by phase, step time and loss over steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.report.drawing import (
    MAX_POINTS,
    MAX_RANKS,
    OKABE_ITO,
    Drawn,
    Figure,
    axis,
    escaped,
    rounded,
    steps_layout,
    style,
    thin,
)
from harness.report.words import GIB, one_line
from harness.schema import RankObservation
from harness.summary import MemoryRow, TrainSummary

MEMORY_KINDS = {"allocated_bytes": "allocated", "reserved_bytes": "reserved", "device_used_bytes": "device used"}


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
    layout = {"barmode": "group", "xaxis": {"type": "category"}, "yaxis": axis("peak, GiB", rangemode="tozero")}
    return Drawn({"data": data, "layout": layout})


def _phase_bars(rank: int, rows: Sequence[MemoryRow], field: str, name: str, index: int) -> dict[str, Any]:
    known = [row for row in rows if getattr(row, field) is not None]
    return {
        "type": "bar", "name": f"rank {rank}, {name}",
        "x": [escaped(one_line(row.phase, 40).replace("_", " ")) for row in known],
        "y": rounded([getattr(row, field) / GIB for row in known]),
        "marker": {"color": OKABE_ITO[rank % len(OKABE_ITO)], "opacity": (1.0, 0.65, 0.35)[index]},
    }  # fmt: skip


def case_steps(ranks: Sequence[RankObservation], warmup_steps: int) -> Drawn | None:
    """Step time of each rank over steps, warm-up shaded."""
    times = [time for rank in ranks for time in rank.steps.step_time_s]
    return _by_step(ranks, "step_time_s", steps_layout(warmup_steps, times))


def case_loss(ranks: Sequence[RankObservation], warmup_steps: int) -> Drawn | None:
    """Loss of each rank over steps, warm-up shaded."""
    return _by_step(ranks, "loss", steps_layout(warmup_steps, ()) | {"yaxis": axis("loss")})


def _by_step(ranks: Sequence[RankObservation], column: str, layout: Figure) -> Drawn | None:
    data = []
    for index, rank in enumerate(ranks[:MAX_RANKS]):
        values = getattr(rank.steps, column)
        if any(value is not None for value in values):
            steps, shown = thin(list(rank.steps.step), list(values))
            data.append({"type": "scatter", "mode": "lines+markers" if len(steps) <= 60 else "lines",
                         "name": f"rank {rank.rank}", "x": steps, "y": rounded(shown),
                         "line": style(index)["line"], "marker": {"size": 5}})  # fmt: skip
    if not data:
        return None
    thinned = max(len(rank.steps.step) for rank in ranks) > MAX_POINTS
    note = "Of each stretch of steps the largest value is drawn; all of them are in the record." if thinned else ""
    return Drawn({"data": data, "layout": layout}, note)
