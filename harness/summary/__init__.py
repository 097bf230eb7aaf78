"""Statistics of a record, derived on reading; the only place where one is made.

Warm-up steps enter none. A step counts across ranks only where every rank has the value, so that a missing value
lowers `n` and moves nothing. A percentile is linear between the two nearest of the sorted samples (numpy's default,
Hyndman and Fan's type 7). A statistic without a sample is `None`, never zero.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from harness.schema import (
    Attempt,
    ChainCase,
    PhaseMemory,
    ProbeCase,
    RankObservation,
    Record,
    ServeCase,
    ServeObservation,
    TrainCase,
    TrainObservation,
)
from harness.summary.energy import GpuSummary, summarize_gpus
from harness.summary.probes import ProbeSummary, summarize_probe
from harness.summary.utilisation import Utilisation, utilisation
from harness.summary.values import Measure, MemoryRow, ServeSummary, Spread, Summary, TrainSummary

__all__ = [
    "Measure",
    "MemoryRow",
    "ProbeSummary",
    "ServeSummary",
    "Spread",
    "Summary",
    "TrainSummary",
    "Utilisation",
    "percentile",
    "spread",
    "summarize",
]


def summarize(record: Record) -> Summary | None:
    """The statistics of the attempt that decided `record`, as far as it got; `None` where nothing was observed."""
    attempt, case = record.last, record.case
    if attempt is None:
        return None
    training = case.train if isinstance(case, ChainCase) else case
    serving = case.serve if isinstance(case, ChainCase) else case
    seen = attempt.observation
    train = _train(training, attempt, seen.train) if isinstance(training, TrainCase) and seen.train else None
    serve = _serve(serving, attempt, seen.serve) if isinstance(serving, ServeCase) and seen.serve else None
    probe = summarize_probe(case, seen.probe) if isinstance(case, ProbeCase) and seen.probe else None
    return Summary(train=train, serve=serve, probe=probe) if train or serve or probe else None


# ---------------------------------------------------------------- samples to numbers


def percentile(samples: Sequence[float], percent: float) -> float | None:
    """The `percent`th percentile, linear between the nearest two of the sorted samples; `None` of no sample."""
    if not samples:
        return None
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def spread(samples: Sequence[float]) -> Spread:
    """The distribution of `samples`."""
    if not samples:
        return Spread()
    mean = statistics.fmean(samples)
    deviation = statistics.stdev(samples) if len(samples) > 1 else None
    return Spread(
        n=len(samples),
        p50=percentile(samples, 50),
        p95=percentile(samples, 95),
        min=min(samples),
        max=max(samples),
        mean=mean,
        coefficient_of_variation=None if deviation is None else _ratio(deviation, mean),
    )


def _ratio(part: float | None, whole: float | None) -> float | None:
    """`part` over `whole` where both are known, `whole` is positive and the result finite."""
    if part is None or whole is None or whole <= 0:
        return None
    found = part / whole
    return found if math.isfinite(found) else None


# ---------------------------------------------------------------- training


def _column(rank: RankObservation, name: str, warmup_steps: int) -> dict[int, float]:
    """A column of one rank by step, the warm-up and missing values left out."""
    steps = rank.steps
    values = zip(steps.step, getattr(steps, name), strict=True)
    return {step: float(value) for step, value in values if step > warmup_steps and value is not None}


def _across(columns: Sequence[dict[int, float]]) -> dict[int, tuple[float, ...]]:
    """By step, the values of all ranks, where all have one."""
    if not columns:
        return {}
    common = set(columns[0]).intersection(*columns[1:])
    return {step: tuple(column[step] for column in columns) for step in sorted(common)}


def _train(case: TrainCase, attempt: Attempt, seen: TrainObservation) -> TrainSummary:
    ranks, warmup = attempt.observation.ranks, seen.warmup_steps
    slowest = {step: max(times) for step, times in _across([_column(r, "step_time_s", warmup) for r in ranks]).items()}
    complete = len(ranks) >= case.devices
    real, throughput_n = _throughput(ranks, "tokens", slowest, warmup) if complete else (None, 0)
    padded, _ = _throughput(ranks, "padded_tokens", slowest, warmup) if complete else (None, 0)
    before, before_n = _medians(ranks, warmup)
    data_wait_share, data_wait_n = _data_wait_share(ranks, warmup)
    measure, rows = _memory(ranks)
    first_step_s, time_to_first_step_s = _first_step(attempt)
    found = TrainSummary(
        ranks=len(ranks),
        steady_steps=len(slowest),
        warmup_steps=warmup,
        step_time_s=spread(list(slowest.values())),
        tokens_per_s=real,
        tokens_per_s_per_device=_ratio(real, case.devices),
        throughput_n=throughput_n,
        padded_tokens_per_s=padded,
        before_collective_s=before,
        before_collective_n=before_n,
        slowest_rank=max(before, key=lambda rank: before[rank]) if len(before) > 1 else None,
        slowest_rank_ratio=_slowest_ratio(list(before.values())),
        data_wait_share=data_wait_share,
        data_wait_n=data_wait_n,
        memory_measure=measure,
        memory=rows,
        peak=max(
            (row for row in rows if row.peak_bytes is not None), key=lambda row: row.peak_bytes or 0, default=None
        ),
        memory_imbalance=_imbalance(rows),
        loss_first=_mean_loss(ranks, first=True),
        loss_last=_mean_loss(ranks, first=False),
        eval_loss=seen.eval_loss,
        first_step_s=first_step_s,
        time_to_first_step_s=time_to_first_step_s,
        checkpoint_bytes=seen.checkpoint_bytes,
        merge_s=seen.merge_s,
        merge_peak_rss_bytes=seen.merge_peak_rss_bytes,
        gpu=_gpus(attempt, "train", case.devices),
        utilisation=utilisation(case, ranks, seen, _ratio(real, case.devices)),
    )
    return found if case.memory_cap_gib is None else _without_speed(found, case.memory_cap_gib)


_SPEED = ("step_time_s", "tokens_per_s", "tokens_per_s_per_device", "throughput_n", "padded_tokens_per_s",
          "before_collective_s", "before_collective_n", "slowest_rank", "slowest_rank_ratio", "data_wait_share",
          "data_wait_n", "first_step_s", "time_to_first_step_s", "merge_s", "utilisation")  # fmt: skip


def _without_speed(found: TrainSummary, cap_gib: float) -> TrainSummary:
    """What a capped GPU may say: what fits, never how fast; a full allocator frees and asks again, at its own pace."""
    card = found.gpu and GpuSummary(**found.gpu.model_dump(include={"gpus", "memory_max_bytes", "memory_max_ordinal"}))
    why = f"memory capped at {cap_gib:g} GiB: says what fits, never how fast"
    return TrainSummary(**found.model_dump(exclude={*_SPEED, "gpu", "no_speed"}), gpu=card, no_speed=why)


def _gpus(attempt: Attempt, role: str, devices: int) -> GpuSummary | None:
    return summarize_gpus([gpu for gpu in attempt.observation.gpus if gpu.role == role], devices)


def _throughput(
    ranks: Sequence[RankObservation], name: str, slowest: dict[int, float], warmup_steps: int
) -> tuple[float | None, int]:
    """Tokens of all ranks per second of the slowest over the steps that have both, and how many those are."""
    tokens = _across([_column(rank, name, warmup_steps) for rank in ranks])
    steps = [step for step in slowest if step in tokens]
    return _ratio(sum(sum(tokens[step]) for step in steps), sum(slowest[step] for step in steps)), len(steps)


def _medians(ranks: Sequence[RankObservation], warmup_steps: int) -> tuple[dict[int, float], int]:
    """Each rank's median time before its first collective over the steps that all have, and how many those are."""
    columns = [_column(rank, "before_collective_s", warmup_steps) for rank in ranks]
    known = [(rank.rank, column) for rank, column in zip(ranks, columns, strict=True) if column]
    across = _across([column for _, column in known])
    samples = zip(*across.values(), strict=True)
    return {rank: statistics.median(values) for (rank, _), values in zip(known, samples, strict=False)}, len(across)


def _slowest_ratio(medians: Sequence[float]) -> float | None:
    return _ratio(max(medians), statistics.median(medians)) if len(medians) > 1 else None


def _data_wait_share(ranks: Sequence[RankObservation], warmup_steps: int) -> tuple[float | None, int]:
    waits, times, n = 0.0, 0.0, 0
    for rank in ranks:
        wait, time = (_column(rank, name, warmup_steps) for name in ("data_wait_s", "step_time_s"))
        both = wait.keys() & time.keys()
        waits += math.fsum(wait[step] for step in both)
        times += math.fsum(time[step] for step in both)
        n += len(both)
    return _ratio(waits, times), n


def _mean_loss(ranks: Sequence[RankObservation], *, first: bool) -> float | None:
    """The mean over ranks at the first or last step for which every rank has a finite loss."""
    across = _across([_column(rank, "loss", 0) for rank in ranks])
    if not across:
        return None
    return statistics.fmean(across[min(across) if first else max(across)])


def _first_step(attempt: Attempt) -> tuple[float | None, float | None]:
    """Duration of the slowest rank's first step, and seconds from the job's start to the end of it."""
    firsts = [_first_of(rank) for rank in attempt.observation.ranks]
    durations = [duration for _, duration in firsts if duration is not None]
    ends = [start + duration for start, duration in firsts if start is not None and duration is not None]
    if not firsts or len(durations) < len(firsts):
        return None, None
    began = attempt.jobs[0].outcome.start if attempt.jobs else None
    waited = max(ends) - began if began is not None and len(ends) == len(firsts) else None
    return max(durations), waited if waited is None or waited >= 0 else None


def _first_of(rank: RankObservation) -> tuple[float | None, float | None]:
    """Start and duration of step 1."""
    steps = rank.steps
    if not steps.step or steps.step[0] != 1:
        return None, None
    return steps.start[0], steps.step_time_s[0]


# ---------------------------------------------------------------- memory


def _memory(ranks: Sequence[RankObservation]) -> tuple[Measure | None, tuple[MemoryRow, ...]]:
    """A row per rank and phase, and what their `peak_bytes` are: one measure for all, so that they compare."""
    pairs = [(rank, phase) for rank in ranks for phase in rank.memory]
    measure = _measure(pairs)
    return measure, tuple(_memory_row(rank, phase, measure) for rank, phase in pairs)


def _measure(pairs: Iterable[tuple[RankObservation, PhaseMemory]]) -> Measure | None:
    stated = [(phase.peak_allocated_bytes, phase.peak_rss_bytes, rank.baseline_rss_bytes) for rank, phase in pairs]
    if any(allocated is not None for allocated, _, _ in stated):
        return "allocated"
    with_rss = [baseline for _, rss, baseline in stated if rss is not None]
    if not with_rss:
        return None
    return "rss" if None in with_rss else "rss_growth"


def _memory_row(rank: RankObservation, phase: PhaseMemory, measure: Measure | None) -> MemoryRow:
    rss, baseline = phase.peak_rss_bytes, rank.baseline_rss_bytes
    growth = None if rss is None or baseline is None else max(0, rss - baseline)
    peaks = {"allocated": phase.peak_allocated_bytes, "rss": rss, "rss_growth": growth}
    return MemoryRow(
        rank=rank.rank,
        phase=phase.phase,
        allocated_bytes=phase.peak_allocated_bytes,
        reserved_bytes=phase.peak_reserved_bytes,
        device_used_bytes=phase.device_used_bytes,
        rss_bytes=rss,
        rss_growth_bytes=growth,
        peak_bytes=peaks[measure] if measure else None,
    )


def _imbalance(rows: Sequence[MemoryRow]) -> float | None:
    """Over the phases that every rank has: one that only a rank saw says nothing of balance."""
    known = [row for row in rows if row.peak_bytes is not None]
    phases = [{row.phase for row in known if row.rank == rank} for rank in {row.rank for row in known}]
    common = set.intersection(*phases) if phases else set()
    peaks: dict[int, int] = {}
    for row in known:
        if row.phase in common:
            peaks[row.rank] = max(peaks.get(row.rank, 0), row.peak_bytes or 0)
    return _ratio(max(peaks.values()), min(peaks.values())) if len(peaks) > 1 else None


# ---------------------------------------------------------------- serving


def _serve(case: ServeCase, attempt: Attempt, seen: ServeObservation) -> ServeSummary:
    load = seen.load
    return ServeSummary(
        ready_s=seen.ready_s,
        weights_bytes=seen.weights_bytes,
        kv_cache_bytes=seen.kv_cache_bytes,
        kv_cache_tokens=seen.kv_cache_tokens,
        peak_rss_bytes=seen.peak_rss_bytes,
        load=load,
        failed_share=_ratio(load.failed, load.requests) if load else None,
        output_tokens_per_s_per_device=_ratio(load.output_tokens_per_s, case.devices) if load else None,
        smoke=seen.smoke,
        gpu=_gpus(attempt, "serve", case.devices),
    )
