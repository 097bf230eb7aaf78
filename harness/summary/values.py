"""What the statistics of a record are: the types that `summarize` fills."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from harness.schema import Frozen, LoadPoint, Smoke
from harness.summary.energy import GpuSummary
from harness.summary.probes import ProbeSummary
from harness.summary.utilisation import Utilisation

Measure = Literal["allocated", "rss_growth", "rss"]


class Spread(Frozen):
    """A distribution of samples; all `None` where `n` is 0."""

    n: int = 0
    p50: float | None = None
    p95: float | None = None
    min: float | None = None
    max: float | None = None
    mean: float | None = None
    coefficient_of_variation: float | None = None
    """Sample standard deviation over the mean; needs two samples."""


class MemoryRow(Frozen):
    """The memory peak of one rank in one phase, in bytes."""

    rank: int
    phase: str
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    device_used_bytes: int | None = None
    rss_bytes: int | None = None
    rss_growth_bytes: int | None = None
    """RSS over the rank's baseline after its imports."""
    peak_bytes: int | None = None
    """The one to compare: see `TrainSummary.memory_measure`."""


class TrainSummary(Frozen):
    """Steady state of a training job."""

    ranks: int
    """Ranks that left events."""
    steady_steps: int
    """Steps after the warm-up that every rank timed: `n` of the step time and the throughput."""
    warmup_steps: int
    step_time_s: Spread = Spread()
    """Of the slowest rank in each step."""
    tokens_per_s: float | None = None
    """Real tokens of all ranks over the sum of the slowest rank's step times; `None` where a rank left no events."""
    tokens_per_s_per_device: float | None = None
    throughput_n: int = 0
    """Steps whose time and tokens every rank stated."""
    padded_tokens_per_s: float | None = None
    before_collective_s: dict[int, float] = Field(default_factory=dict)
    """Each rank's median time from a step's start to its first collective."""
    before_collective_n: int = 0
    slowest_rank: int | None = None
    slowest_rank_ratio: float | None = None
    """The largest of these medians over their median; needs two ranks."""
    data_wait_share: float | None = None
    """Time waiting for data over step time, all ranks' steady steps together."""
    data_wait_n: int = 0
    """Steps of single ranks that entered it."""
    memory_measure: Measure | None = None
    """What `peak_bytes` is: `allocated` where a GPU said so, else growth of the RSS, else the RSS itself."""
    memory: tuple[MemoryRow, ...] = ()
    peak: MemoryRow | None = None
    """The row with the largest `peak_bytes`."""
    memory_imbalance: float | None = None
    """The largest over the smallest of the ranks' own peaks; needs two ranks."""
    loss_first: float | None = None
    """Mean over ranks at the first step, warm-up included."""
    loss_last: float | None = None
    eval_loss: float | None = None
    first_step_s: float | None = None
    """The slowest rank's first step, where kernels compile."""
    time_to_first_step_s: float | None = None
    """From the job's start to the end of its first step."""
    checkpoint_bytes: int | None = None
    merge_s: float | None = None
    merge_peak_rss_bytes: int | None = None
    gpu: GpuSummary | None = None
    """Over the steady steps; `None` on a CPU and where telemetry was off."""
    utilisation: Utilisation | None = None
    no_speed: str = ""
    """Why this case has no speed, all fields of which are then empty: its GPU was held to a smaller size."""


class ServeSummary(Frozen):
    """One load point of a server."""

    ready_s: float | None = None
    weights_bytes: int | None = None
    kv_cache_bytes: int | None = None
    kv_cache_tokens: int | None = None
    peak_rss_bytes: int | None = None
    load: LoadPoint | None = None
    """TTFT, TPOT and ITL with p50, p95 and p99, throughput, failed requests, as the load generator stated them."""
    failed_share: float | None = None
    """Failed requests over those asked for."""
    output_tokens_per_s_per_device: float | None = None
    smoke: Smoke | None = None
    gpu: GpuSummary | None = None
    """Over the load; `None` on a CPU and where telemetry was off."""


class Summary(Frozen):
    """What a record's numbers come to."""

    train: TrainSummary | None = None
    serve: ServeSummary | None = None
    probe: ProbeSummary | None = None
