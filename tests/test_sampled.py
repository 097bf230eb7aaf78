"""GPUs in a record's detail and in the live view."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import pytest
from rich.console import Console

from harness.observe.live import Live, LiveGpu
from harness.report import parts, sampled, tables, terminal
from harness.schema import GpuProcess, GpuSeries, GpuSteady
from harness.summary import ServeSummary, TrainSummary
from harness.summary.energy import GpuSummary

GIB = 2**30


def series(**changes: Any) -> GpuSeries:
    fields: dict[str, Any] = {
        "role": "train", "node": 0, "ordinal": 0, "index": 3, "uuid": "GPU-0", "start": 1000.0, "row_s": 2.0,
        "memory_used_bytes": (GIB, 2 * GIB, None), "power_w": (100.0, None, 300.0), "nvlinks": {"switch": 18},
        "steady": GpuSteady(start=1001.0, duration_s=2.5), "bus": "0000:c8:00.0", "near": {"1": "across NUMA nodes"},
        "processes": (GpuProcess(pid=9, name="other", own=False, max_bytes=GIB),),
    }  # fmt: skip
    return GpuSeries(**(fields | changes))


def test_memory_and_power_are_drawn_over_the_jobs_seconds() -> None:
    drawn = sampled.over_time([series(), series(ordinal=1, start=1010.0)])
    assert drawn
    memory, power, later, _ = drawn.figure["data"]
    assert (memory["x"], memory["y"]) == ([0.0, 2.0, 4.0], [1.0, 2.0, None])
    assert (power["y"], power["yaxis"]) == ([100.0, None, 300.0], "y2")
    assert later["x"] == [10.0, 12.0, 14.0]
    (shade,) = drawn.figure["layout"]["shapes"]
    assert (shade["x0"], shade["x1"]) == (1.0, 3.5)
    assert "covers 2.00 s" in drawn.note


def test_without_measured_time_nothing_is_shaded() -> None:
    drawn = sampled.over_time([series(steady=None)])
    assert drawn
    assert "shapes" not in drawn.figure["layout"]
    assert "shaded" not in drawn.note


def test_more_gpus_than_are_drawn_are_counted() -> None:
    drawn = sampled.over_time([series(ordinal=i) for i in range(20)])
    assert drawn
    assert "The first 16 of 20 GPUs are drawn." in drawn.note


def test_no_sample_draws_nothing() -> None:
    assert sampled.over_time([]) is None
    assert sampled.over_time([series(memory_used_bytes=(), power_w=())]) is None


def test_a_detail_says_where_gpus_sit_and_who_else_was_there() -> None:
    found = {part.title: part for part in sampled.sampled_sections([series()]) if part}
    place, who = found["Where the GPUs sit"].rows[0], found["Processes on the GPUs"].rows[0]
    assert [place[i].text for i in (0, 2, 4, 5)] == [
        "0 (driver's 3)",
        "0000:c8:00.0",
        "18 to switch",
        "1: across NUMA nodes",
    ]
    assert [cell.text for cell in who] == ["0 (driver's 3)", "9", "other", "NO", "1.00"]
    assert all(parts.as_json(part) for part in found.values())


def test_both_halves_of_a_chain_have_their_own() -> None:
    titles = [part.title for part in sampled.sampled_sections([series(), series(role="serve")]) if part]
    assert "Where the GPUs sit, train" in titles
    assert "Where the GPUs sit, serve" in titles


def test_a_cpu_case_has_no_gpu_section() -> None:
    assert [part for part in sampled.sampled_sections([]) if part] == []


@dataclass
class Named:
    id: str


@dataclass
class Running:
    job: Named
    live: Live


@dataclass
class Now:
    running: tuple[Running, ...]
    total: int = 1
    records: tuple[Any, ...] = ()
    kept: frozenset[str] = frozenset()
    seconds_left: float | None = None
    added: int = 0


@pytest.mark.parametrize(("gpu", "text"), [
    (LiveGpu(memory_used_bytes=60 * GIB, power_w=512.4), "60.0 GiB 512 W"),
    (LiveGpu(memory_used_bytes=60 * GIB), "60.0 GiB"),
])  # fmt: skip
def test_the_live_view_shows_memory_and_power(gpu: LiveGpu, text: str) -> None:
    out = Console(file=io.StringIO(), width=120)
    out.print(terminal.progress(Now((Running(Named("job"), Live(phase="train", gpus=(gpu, LiveGpu()))),))))  # type: ignore[arg-type]
    assert f"train, {text}" in out.file.getvalue()  # type: ignore[attr-defined]


def test_joules_per_token_are_a_column_where_they_are_known() -> None:
    gpu = GpuSummary(gpus=2, joules_per_token=1.25, power_mean_w=1200.0, energy_from="counter")
    cell = tables.joules(TrainSummary(ranks=2, steady_steps=5, warmup_steps=1, gpu=gpu))
    assert (cell.text, cell.why) == ("1.25", "1,200 W, all GPUs, by counter")
    assert tables.joules(ServeSummary()).sort is None
