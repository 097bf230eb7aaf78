"""Statistics of a record: what enters them, and how they are made."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest
from fakes import records
from fakes.script import BEGAN
from hypothesis import given
from hypothesis import strategies as st

from harness.schema import Observation, PhaseMemory, RankObservation, Record, Steps, TrainObservation
from harness.summary import TrainSummary, percentile, spread, summarize

SAMPLES = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=60)


# ---------------------------------------------------------------- statistics


@given(SAMPLES, st.floats(0, 100))
def test_a_percentile_is_numpys(samples: list[float], percent: float) -> None:
    assert percentile(samples, percent) == pytest.approx(float(numpy.percentile(samples, percent)))


@given(SAMPLES)
def test_a_spread_is_pandas(samples: list[float]) -> None:
    series, found = pandas.Series(samples), spread(samples)
    assert found.n == len(samples)
    assert (found.min, found.max) == (series.min(), series.max())
    assert found.mean == pytest.approx(series.mean())
    assert found.p50 == pytest.approx(series.median())
    assert found.p95 == pytest.approx(series.quantile(0.95))
    if len(samples) == 1:
        assert found.coefficient_of_variation is None
    else:
        assert found.coefficient_of_variation == pytest.approx(series.std() / series.mean(), abs=1e-9)


def test_no_sample_gives_no_statistic() -> None:
    assert percentile([], 50) is None
    assert spread([]).model_dump(exclude={"n"}) == dict.fromkeys(spread([]).model_dump(exclude={"n"}))


# ---------------------------------------------------------------- training


@functools.cache
def made_up() -> dict[str, Record]:
    """One record of each kind."""
    return records.named()


def rank(number: int, steps: int = 6, *, memory: tuple[PhaseMemory, ...] = (), baseline: int | None = None,
         **columns: Any) -> RankObservation:  # fmt: skip
    """A rank with `steps` steps of 1 s and 100 tokens, but for the columns given."""
    usual = {"step_time_s": 1.0, "tokens": 100, "padded_tokens": 120, "data_wait_s": 0.1, "before_collective_s": 0.5,
             "loss": 2.0, "start": None, "grad_norm": None}  # fmt: skip
    filled: dict[str, Any] = {name: (value,) * steps for name, value in usual.items()}
    series = Steps(step=tuple(range(1, steps + 1)), **(filled | columns))
    return RankObservation(rank=number, steps=series, memory=memory, baseline_rss_bytes=baseline)


def training(*ranks: RankObservation, warmup_steps: int = 2, devices: int | None = None) -> TrainSummary:
    """The summary of a training record with these ranks."""
    count = devices or len(ranks)
    base = made_up()["ddp" if count > 1 else "lora"]
    seen = Observation(ranks=ranks, train=TrainObservation(warmup_steps=warmup_steps))
    case = base.case.model_copy(update={"devices": count})
    attempt = base.attempts[0].model_copy(update={"observation": seen})
    found = summarize(base.model_copy(update={"attempts": (attempt,), "case": case}))
    assert found
    assert found.train
    return found.train


def test_the_warm_up_enters_no_statistic() -> None:
    slow = (900.0, 800.0, 1.0, 1.0, 2.0, 1.0)
    found = training(rank(0, step_time_s=slow, data_wait_s=slow, before_collective_s=slow))
    assert (found.steady_steps, found.warmup_steps, found.step_time_s.n, found.throughput_n) == (4, 2, 4, 4)
    assert found.step_time_s.max == 2.0
    assert found.tokens_per_s == pytest.approx(400 / 5)
    assert found.before_collective_s == {0: 1.0}
    assert found.first_step_s == 900.0


def test_a_step_takes_as_long_as_its_slowest_rank_and_counts_the_tokens_of_all() -> None:
    found = training(rank(0, step_time_s=(1.0,) * 5 + (4.0,)), rank(1, step_time_s=(2.0,) * 6))
    assert (found.step_time_s.min, found.step_time_s.max, found.step_time_s.p50) == (2.0, 4.0, 2.0)
    assert found.tokens_per_s == pytest.approx(4 * 200 / 10)
    assert found.tokens_per_s_per_device == pytest.approx(4 * 100 / 10)
    assert found.padded_tokens_per_s == pytest.approx(4 * 240 / 10)


def on_gpu(record: Record, name: str, **changes: Any) -> TrainSummary:
    """A record's training as if its ranks had run on GPUs of that name, with these changes of its case."""
    case = record.case.model_copy(update={"device": "cuda", **changes})
    ranks = tuple(one.model_copy(update={"device_name": name}) for one in record.attempts[0].observation.ranks)
    seen = record.attempts[0].observation.model_copy(update={"ranks": ranks})
    attempt = record.attempts[0].model_copy(update={"observation": seen})
    found = summarize(record.model_copy(update={"case": case, "attempts": (attempt,)}))
    assert found
    assert found.train
    return found.train


def test_the_mfu_is_model_flops_times_tokens_over_the_peak() -> None:
    found = on_gpu(made_up()["lora"], "NVIDIA H200")
    used = found.utilisation
    assert used
    assert (used.gpu, used.peak_flops_per_s, used.why_not) == ("h200-sxm", 989.4e12, "")
    assert found.tokens_per_s_per_device
    assert used.mfu == pytest.approx(used.model_flops_per_token * found.tokens_per_s_per_device / 989.4e12)
    assert used.hardware_flops_per_token > used.model_flops_per_token


@pytest.mark.parametrize(
    ("name", "changes", "why_not"),
    [
        ("NVIDIA H200", {"device": "cpu"}, "a CPU has no peak in the catalog"),
        ("Quadro 4000", {}, "the catalog knows no one peak for Quadro 4000"),
    ],
)
def test_there_is_no_mfu_without_a_peak(name: str, changes: dict[str, Any], why_not: str) -> None:
    used = on_gpu(made_up()["lora"], name, **changes).utilisation
    assert used
    assert (used.mfu, used.why_not) == (None, why_not)
    assert used.model_flops_per_token > 0


def test_a_capped_gpu_says_what_fits_and_never_how_fast() -> None:
    free = on_gpu(made_up()["gpu"], "NVIDIA H200")
    capped = on_gpu(made_up()["gpu"], "NVIDIA H200", memory_cap_gib=24.0)
    assert capped.no_speed == "memory capped at 24 GiB: says what fits, never how fast"
    assert capped.memory == free.memory
    assert (capped.peak, capped.loss_last, capped.steady_steps) == (free.peak, free.loss_last, free.steady_steps)
    said = capped.model_dump(exclude_defaults=True)
    assert not [name for name in said if any(word in name for word in ("tokens", "_s", "wait", "collective", "slow"))
                if name not in ("steady_steps", "warmup_steps", "no_speed", "loss_first", "loss_last")]  # fmt: skip
    assert not free.no_speed
    assert free.tokens_per_s


def test_what_one_rank_lacks_lowers_n_and_moves_nothing() -> None:
    holed = (1.0, 1.0, None, 1.0, 1.0, 1.0)
    found = training(rank(0), rank(1, step_time_s=holed, tokens=(100, 100, 100, None, 100, 100)))
    assert (found.steady_steps, found.throughput_n) == (3, 2)
    assert found.tokens_per_s == pytest.approx(200)
    assert found.data_wait_n == 7
    assert found.data_wait_share == pytest.approx(0.1)


def test_ranks_that_left_nothing_leave_no_throughput() -> None:
    found = training(rank(0), devices=2)
    assert found.tokens_per_s is None
    assert found.step_time_s.n == 4


def test_nothing_after_the_warm_up_gives_no_statistic() -> None:
    found = training(rank(0, 2))
    assert (found.steady_steps, found.tokens_per_s, found.step_time_s.p50, found.data_wait_share) == (
        0,
        None,
        None,
        None,
    )
    assert found.loss_first == 2.0


def test_the_slowest_rank_shows_before_its_first_collective() -> None:
    found = training(*(rank(number, before_collective_s=(0.3 if number == 2 else 0.1,) * 6) for number in range(4)))
    assert (found.slowest_rank, found.before_collective_n) == (2, 4)
    assert found.slowest_rank_ratio == pytest.approx(3.0)
    assert training(rank(0)).slowest_rank_ratio is None


def test_losses_are_those_of_the_first_and_last_step_of_all_ranks() -> None:
    found = training(rank(0, loss=(3.0, 2.5, 2.0, 1.5, 1.0, 0.5)), rank(1, loss=(4.0, 2.5, 2.0, 1.5, 2.0, None)))
    assert (found.loss_first, found.loss_last) == (3.5, 1.5)


def test_the_first_step_is_timed_from_the_jobs_start() -> None:
    began = BEGAN
    found = training(rank(0, start=(began + 10, *[None] * 5)), rank(1, start=(began + 12, *[None] * 5)))
    assert found.time_to_first_step_s == pytest.approx(13.0)
    assert training(rank(0)).time_to_first_step_s is None


# ---------------------------------------------------------------- memory


def test_on_a_gpu_the_peak_is_what_was_allocated_and_all_three_are_shown() -> None:
    rows = (
        PhaseMemory(phase="load", peak_allocated_bytes=10, peak_reserved_bytes=90, device_used_bytes=95),
        PhaseMemory(phase="backward", peak_allocated_bytes=40, peak_reserved_bytes=60, device_used_bytes=99),
    )
    found = training(rank(0, memory=rows), rank(1, memory=(rows[0].model_copy(update={"peak_allocated_bytes": 5}),)))
    assert found.memory_measure == "allocated"
    assert found.peak
    assert (found.peak.rank, found.peak.phase, found.peak.peak_bytes, found.peak.reserved_bytes) == (
        0,
        "backward",
        40,
        60,
    )
    assert [(row.rank, row.phase) for row in found.memory] == [(0, "load"), (0, "backward"), (1, "load")]
    assert found.memory_imbalance == pytest.approx(2.0)


def test_on_a_cpu_the_peak_is_growth_over_the_baseline() -> None:
    memory = (PhaseMemory(phase="load", peak_rss_bytes=700), PhaseMemory(phase="eval", peak_rss_bytes=450))
    found = training(rank(0, memory=memory, baseline=500))
    assert found.memory_measure == "rss_growth"
    assert [(row.rss_bytes, row.rss_growth_bytes) for row in found.memory] == [(700, 200), (450, 0)]
    assert found.memory_imbalance is None
    unknown = training(rank(0, memory=memory), rank(1, memory=memory, baseline=1))
    assert unknown.memory_measure == "rss"
    assert unknown.peak
    assert unknown.peak.peak_bytes == 700


# ---------------------------------------------------------------- records


@pytest.fixture(scope="module")
def named() -> dict[str, Record]:
    return made_up()


def test_every_observed_record_has_a_summary(named: dict[str, Record]) -> None:
    for name, record in named.items():
        found = summarize(record)
        assert (found is None) == (name == "skipped"), name
        if found:
            assert (found.train is not None) == (record.case.kind in ("train", "chain"))
            assert (found.serve is not None) == (record.case.kind in ("serve", "chain"))


def test_a_failed_record_keeps_what_it_measured(named: dict[str, Record]) -> None:
    found = summarize(named["failed_stalled"])
    assert found
    assert found.train
    assert found.train.steady_steps == 3
    assert found.train.slowest_rank is not None


def test_a_served_record_carries_what_the_load_generator_said(named: dict[str, Record]) -> None:
    found = summarize(named["serve_4"])
    assert found
    assert found.serve
    assert found.serve.load
    assert found.serve.load.ttft.p99_s == pytest.approx(0.42)
    assert found.serve.failed_share == 0.0
    assert found.serve.ready_s == 31.0


COLUMN = st.one_of(st.none(), st.floats(0, 1e12))


@given(st.lists(st.tuples(COLUMN, COLUMN, COLUMN, COLUMN), max_size=8), st.integers(0, 3), st.integers(1, 3))
def test_any_observation_has_finite_statistics(rows: list[Any], warmup_steps: int, count: int) -> None:
    times, waits, before, losses = zip(*rows, strict=True) if rows else ((), (), (), ())
    ranks = [rank(number, len(rows), step_time_s=times, data_wait_s=waits, before_collective_s=before, loss=losses)
             for number in range(count)]  # fmt: skip
    found = training(*ranks, warmup_steps=warmup_steps)
    for value in found.model_dump().values():
        assert not isinstance(value, float) or math.isfinite(value)
    known = [time for time in times[warmup_steps:] if time is not None]
    assert found.steady_steps == len(known)


def test_statistics_of_made_up_runs_agree_with_pandas(tmp_path: Path) -> None:
    record = records.measured_train(records.train_case(devices=2, strategy="ddp", steps=40), tmp_path, seed=3)
    frame = pandas.concat(
        pandas.DataFrame(seen.steps.model_dump()).assign(rank=seen.rank)
        for seen in record.attempts[0].observation.ranks
    )
    steady = frame[frame.step > 5].groupby("step").agg({"step_time_s": "max", "tokens": "sum"})
    found = summarize(record)
    assert found
    assert found.train
    assert found.train.step_time_s.p95 == pytest.approx(steady.step_time_s.quantile(0.95))
    assert found.train.tokens_per_s == pytest.approx(steady.tokens.sum() / steady.step_time_s.sum())
