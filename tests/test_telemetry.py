"""Sampler files to GPU series, their share of a record, and what a summary makes of them."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from fakes.records import train_case
from hypothesis import given
from hypothesis import strategies as st

from harness.events import EventLog
from harness.observe import observe, telemetry
from harness.observe.live import peek
from harness.payload import nvml
from harness.schema import GpuSeries, GpuSteady, Observation, TrainCase
from harness.summary import energy

GIB = 2**30
BEGAN = 1_790_000_000.0
Line = dict[str, Any]


def first(gpus: int = 1, node: int = 0) -> Line:
    described = [{"ordinal": i, "index": i + 2, "uuid": f"GPU-{i}", "name": "NVIDIA H200", "total_bytes": 141 * GIB,
                  "power_limit_w": 700.0, "power_source": "instant", "pcie_generation": 4, "pcie_width": 16,
                  "pcie_generation_max": 5, "pcie_width_max": 16, "nvlinks": {"switch": 18}, "near": {}, "numa_node": 1,
                  "near_cpus": "0-15", "bus": "0000:c8:00.0"} for i in range(gpus)]  # fmt: skip
    return {"kind": "gpus", "t": BEGAN, "node": node, "interval_s": 0.1, "columns": nvml.FAST,
            "slow_columns": nvml.SLOW, "gpus": described}  # fmt: skip


def sample(t: float, *rows: list[Any] | None, **slow: list[Any]) -> Line:
    line: Line = {"kind": "sample", "t": BEGAN + t, "gpus": list(rows)}
    return line | ({"slow": {key[1:]: row for key, row in slow.items()}} if slow else {})


def steady_sample(t: float, watts: float = 500.0, gpus: int = 1) -> Line:
    """GPUs that draw `watts` and whose counters agree."""
    return sample(t, *[[60 * GIB, watts, 1980, 3201, 1.0, 1e15 + watts * t * 1000] for _ in range(gpus)])


def write(folder: Path, lines: list[Line], node: int = 0) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"gpu.samples.node{node}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_one(folder: Path, lines: list[Line], window: telemetry.Window | None = None) -> GpuSeries:
    write(folder, lines)
    (one,) = telemetry.read("train", [folder], window).gpus
    return one


# ---------------------------------------------------------------- rows


def test_a_row_is_a_second_with_the_largest_memory_the_mean_power_and_the_least_clock(tmp_path: Path) -> None:
    lines = [first(), *(sample(t, [GIB * m, w, c, 3201, u, None]) for t, m, w, c, u in
             [(0.0, 1, 100, 1980, 0.2), (0.5, 3, 300, 1500, 0.4), (1.2, 2, 200, 1900, 1.0)])]  # fmt: skip
    one = read_one(tmp_path, lines)
    assert one.row_s == 1.0
    assert one.memory_used_bytes == (3 * GIB, 2 * GIB)
    assert one.power_w == (200.0, 200.0)
    assert one.power_max_w == (300.0, 200.0)
    assert one.sm_clock_mhz == (1740.0, 1900.0)
    assert one.sm_clock_min_mhz == (1500.0, 1900.0)
    assert one.utilisation == pytest.approx((0.3, 1.0))
    assert (one.memory_first_bytes, one.memory_max_bytes, one.samples) == (GIB, 3 * GIB, 3)


def test_a_second_without_a_sample_is_a_gap(tmp_path: Path) -> None:
    one = read_one(tmp_path, [first(), steady_sample(0.0), steady_sample(2.5)])
    assert one.power_w == (500.0, None, 500.0)
    assert one.memory_used_bytes == (60 * GIB, None, 60 * GIB)


def test_long_jobs_have_wider_rows_and_say_so(tmp_path: Path) -> None:
    samples = [*(steady_sample(float(t)) for t in range(0, 3000, 3)), steady_sample(2999.0, 650)]
    one = read_one(tmp_path, [first(), *samples])
    assert one.row_s == 5.0
    assert len(one.power_w) == 600
    assert max(watts for watts in one.power_max_w if watts) == 650


def test_the_first_line_places_the_gpu(tmp_path: Path) -> None:
    one = read_one(tmp_path, [first(), steady_sample(0.0)])
    assert (one.ordinal, one.index, one.uuid, one.pcie) == (0, 2, "GPU-0", "gen 4 x16 of gen 5 x16")
    assert (one.nvlinks, one.numa_node, one.near_cpus, one.bus) == ({"switch": 18}, 1, "0-15", "0000:c8:00.0")
    assert (one.power_limit_w, one.power_source, one.total_bytes) == (700.0, "instant", 141 * GIB)


def test_slow_values_give_peaks_and_shares_of_throttling(tmp_path: Path) -> None:
    row = [60 * GIB, 500.0, 1980, 3201, 1.0, None]
    lines = [first(), sample(0.0, row, _0=[60, 0x1, 10, 20, [[7, GIB]]]),
             sample(1.0, row, _0=[71, 0x44, 30, 5, [[7, 2 * GIB]]]),
             {"kind": "process", "gpu": 0, "pid": 7, "name": "python", "own": False}]  # fmt: skip
    one = read_one(tmp_path, lines)
    assert one.throttle == {"software power cap": 0.5, "hardware thermal slowdown": 0.5}
    assert (one.temperature_max_c, one.pcie_rx_max_bytes_per_s, one.pcie_tx_max_bytes_per_s) == (71, 30, 20)
    assert [(p.pid, p.name, p.own, p.max_bytes) for p in one.processes] == [(7, "python", False, 2 * GIB)]


def test_a_lost_gpu_keeps_what_was_seen_of_it(tmp_path: Path) -> None:
    write(tmp_path, [first(2), steady_sample(0.0, gpus=2), sample(1.0, [GIB, 100, 1, 1, 0, 1], None),
                     {"kind": "note", "text": "GPU 3 (GPU-1) is lost: GPU is lost."}])  # fmt: skip
    found = telemetry.read("train", [tmp_path], None)
    assert [one.samples for one in found.gpus] == [2, 1]
    assert found.notes == ("GPU 3 (GPU-1) is lost: GPU is lost.",)


def test_nodes_keep_their_own_ordinals(tmp_path: Path) -> None:
    for node in (1, 0):
        write(tmp_path, [first(node=node), steady_sample(0.0)], node)
    assert [(one.node, one.ordinal) for one in telemetry.read("train", [tmp_path], None).gpus] == [(0, 0), (1, 0)]


# ---------------------------------------------------------------- energy


def window(start: float, end: float, tokens: int | None = None) -> telemetry.Window:
    return telemetry.Window(BEGAN + start, BEGAN + end, tokens)


def test_energy_is_the_counters_difference_between_samples_too(tmp_path: Path) -> None:
    one = read_one(tmp_path, [first(), *(steady_sample(t / 10) for t in range(100))], window(1.23, 7.77, 1000))
    assert one.steady
    assert (one.steady.energy_from, one.steady.tokens) == ("counter", 1000)
    assert one.steady.energy_j == pytest.approx(500 * 6.54, rel=1e-5)
    assert (one.steady.power_mean_w, one.steady.duration_s) == (500.0, pytest.approx(6.54))
    assert one.energy_j == pytest.approx(500 * 9.9)


def test_without_a_counter_energy_is_power_over_time(tmp_path: Path) -> None:
    lines = [sample(t / 10, [GIB, 400.0, 1980, 3201, 1.0, None]) for t in range(100)]
    one = read_one(tmp_path, [first(), *lines], window(1.0, 6.0))
    assert one.steady
    assert one.steady.energy_from == "power"
    assert one.steady.energy_j == pytest.approx(400 * 5.0, rel=0.01)


def test_a_window_beyond_the_samples_has_no_counted_energy(tmp_path: Path) -> None:
    one = read_one(tmp_path, [first(), *(steady_sample(t / 10) for t in range(20))], window(1.0, 60.0))
    assert one.steady
    assert one.steady.energy_j is None


def test_a_counter_that_was_reset_is_not_used(tmp_path: Path) -> None:
    lines = [sample(t / 10, [GIB, 400.0, 1980, 3201, 1.0, 5000 + t if t < 30 else t]) for t in range(100)]
    one = read_one(tmp_path, [first(), *lines], window(1.0, 6.0))
    assert one.steady
    assert one.steady.energy_from == "power"


# ---------------------------------------------------------------- robustness

LINES = b"".join(json.dumps(line).encode() + b"\n" for line in [
    first(2), *(steady_sample(t / 10, gpus=2) for t in range(20)),
    sample(2.0, None, [GIB, 1, 2, 3, 0.5, 6], _1=[50, 4, 1, 2, [[5, 6]]]),
    {"kind": "process", "gpu": 1, "pid": 5, "name": "x", "own": True}, {"kind": "cost", "cpu_s": 0.01, "wall_s": 2.0},
    {"kind": "note", "text": "GPU 1 throttles: x."},
])  # fmt: skip


@given(cut=st.integers(0, len(LINES)))
def test_a_file_cut_at_any_byte_is_read(cut: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "gpu.samples.node0.jsonl").write_bytes(LINES[:cut])
        found = telemetry.read("train", [Path(folder)], window(0.2, 0.9))
    assert len(found.gpus) in (0, 2)
    assert not found.problems
    Observation(gpus=found.gpus).model_dump_json()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just(1e308),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.sampled_from(["0", "1", "ordinal", "x"]), inner),
    max_leaves=20,
)
ANY_LINES = st.fixed_dictionaries(
    {"kind": st.sampled_from(["gpus", "sample", "process", "cost", "note", "?"])},
    optional=dict.fromkeys(("t", "gpus", "slow", "columns", "slow_columns", "gpu", "pid", "own", "name", "text",
                            "cpu_s", "wall_s", "interval_s"), VALUES),
)  # fmt: skip


@given(found=st.lists(ANY_LINES, max_size=8))
def test_any_line_is_taken_or_left(found: list[Line]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), [first(), steady_sample(0.0), *found])
        seen = telemetry.read("serve", [Path(folder)], window(0.0, 1.0))
    Observation.model_validate_json(Observation(gpus=seen.gpus, notes=seen.notes).model_dump_json())


def test_a_clock_that_jumps_makes_no_endless_columns(tmp_path: Path) -> None:
    one = read_one(tmp_path, [first(), *(steady_sample(t) for t in (0.0, 9e9, -50.0, 1.0))])
    assert len(one.power_w) == 2
    assert one.samples == 4


# ---------------------------------------------------------------- in a record


def job(folder: Path, case: TrainCase, ranks: int = 1, steps: int = 20, seconds: int = 40) -> Path:
    folder.mkdir(exist_ok=True)
    write(folder, [first(ranks), *(steady_sample(t / 10, gpus=ranks) for t in range(10 * seconds))])
    for rank in range(ranks):
        log = EventLog(str(folder), rank)
        for step in range(1, steps + 1):
            warmup = step <= case.warmup_steps
            log.write("step", step=step, warmup=warmup, start=BEGAN + step, step_time_s=0.9, tokens=2048)
        log._file.close()
    return folder


def test_the_steady_steps_are_the_window(tmp_path: Path) -> None:
    case = train_case(device="cuda", steps=20, warmup_steps=5, devices=2, strategy="ddp")
    seen = observe(case, [job(tmp_path / "job", case, ranks=2)])
    steady = seen.gpus[1].steady
    assert steady
    assert (steady.start, steady.duration_s, steady.tokens) == (BEGAN + 6, pytest.approx(14.9), 2 * 15 * 2048)
    assert steady.energy_j == pytest.approx(500 * 14.9)


def test_a_record_stays_small_beside_long_series(tmp_path: Path) -> None:
    case = train_case(device="cuda", steps=2000, warmup_steps=5, devices=8, strategy="ddp")
    seen = observe(case, [job(tmp_path / "job", case, ranks=8, steps=2000, seconds=2400)])
    assert len(seen.gpus) == 8
    assert all(one.row_s > 1 for one in seen.gpus)
    assert len(seen.model_dump_json(indent=1)) < 200_000


def test_a_glance_shows_memory_and_power_of_each_gpu(tmp_path: Path) -> None:
    last = sample(10.0, [GIB, 1.5, 0, 0, 0, 0], None)
    write(tmp_path, [first(2), *(steady_sample(t / 10, gpus=2) for t in range(100)), last])
    live = peek(tmp_path)
    assert [(one.memory_used_bytes, one.power_w) for one in live.gpus] == [(GIB, 1.5), (None, None)]


# ---------------------------------------------------------------- recorded on a GPU


def test_samples_of_a_real_h200_give_the_energy_of_its_steady_steps() -> None:
    """Nano 30B, LoRA, 4,096 tokens a step, 15 steady steps; only the GPU's UUID was replaced."""
    steady_steps = telemetry.Window(1795306874.215, 1795306874.215 + 7.875898, 61_440)
    found = telemetry.read("train", [Path(__file__).parent / "cassettes/samples-h200"], steady_steps)
    (one,) = found.gpus
    assert (one.name, one.power_limit_w, one.power_source) == ("NVIDIA H200", 700.0, "instant")
    assert (one.memory_first_bytes, one.memory_max_bytes, one.temperature_max_c) == (0, 67_359_277_056, 54)
    assert [(one.name, one.own) for one in one.processes] == [("python3", True)]
    assert one.throttle == {"software power cap": 0.0526}
    assert any("throttles: software power cap" in note for note in found.notes)
    summary = energy.summarize_gpus(found.gpus, 1)
    assert summary
    assert (summary.energy_j, summary.energy_from) == (4297.3, "counter")
    assert summary.joules_per_token == pytest.approx(0.06994, rel=1e-3)
    assert summary.power_mean_w == pytest.approx(545.6, rel=1e-3)


# ---------------------------------------------------------------- summary


def series(**changes: Any) -> GpuSeries:
    steady = GpuSteady(duration_s=10.0, tokens=10_000, energy_j=6000.0, energy_from="counter", power_max_w=700.0)
    fields: dict[str, Any] = {"role": "train", "node": 0, "ordinal": 0, "steady": steady, "memory_max_bytes": 60 * GIB}
    return GpuSeries(**(fields | changes))


def test_joules_per_token_is_the_energy_of_all_gpus_over_the_tokens_of_all_ranks() -> None:
    found = energy.summarize_gpus([series(), series(ordinal=1, memory_max_bytes=70 * GIB)], 2)
    assert found
    assert (found.energy_j, found.joules_per_token, found.power_mean_w) == (12_000.0, 1.2, 1200.0)
    assert (found.memory_max_bytes, found.memory_max_ordinal, found.energy_from) == (70 * GIB, 1, "counter")


def test_a_gpu_without_energy_leaves_the_sum_unknown() -> None:
    part = GpuSteady(duration_s=10.0, tokens=10_000)
    found = energy.summarize_gpus([series(), series(ordinal=1, steady=part)], 2)
    assert found
    assert (found.energy_j, found.joules_per_token, found.power_max_w) == (None, None, 700.0)


def test_fewer_gpus_sampled_than_used_leave_the_sum_unknown() -> None:
    found = energy.summarize_gpus([series()], 2)
    assert found
    assert (found.gpus, found.joules_per_token, found.energy_j) == (1, None, None)


def test_no_gpu_has_no_summary() -> None:
    assert energy.summarize_gpus([], 0) is None


def test_the_worst_throttling_of_a_single_gpu_counts() -> None:
    found = energy.summarize_gpus([series(throttle={"a": 0.1}), series(ordinal=1, throttle={"a": 0.4, "b": 0.2})], 2)
    assert found
    assert found.throttle == {"a": 0.4, "b": 0.2}
