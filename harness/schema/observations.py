"""What was seen: everything that an attempt's files say."""

from __future__ import annotations

from typing import Literal

from pydantic import JsonValue

from harness.schema.base import Frozen
from harness.schema.probes import ProbeObservation


class PhaseMemory(Frozen):
    """Memory peaks of one rank within one phase; on a CPU only RSS, on a GPU all."""

    phase: str
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    device_used_bytes: int | None = None
    peak_rss_bytes: int | None = None


class Steps(Frozen):
    """Columns of equal length, one entry per optimizer step of one rank, warm-up included; `None` where not known."""

    step: tuple[int, ...] = ()
    start: tuple[float | None, ...] = ()
    """Unix seconds."""
    step_time_s: tuple[float | None, ...] = ()
    data_wait_s: tuple[float | None, ...] = ()
    before_collective_s: tuple[float | None, ...] = ()
    """From the step's start to this rank's first collective: where a slow rank shows."""
    tokens: tuple[int | None, ...] = ()
    """Tokens that count towards the loss or attention, padding left out."""
    padded_tokens: tuple[int | None, ...] = ()
    loss: tuple[float | None, ...] = ()
    """This rank's own; `None` where it was not finite (see `TrainObservation.nonfinite`)."""
    grad_norm: tuple[float | None, ...] = ()


class RankObservation(Frozen):
    """All that one rank said of itself."""

    rank: int
    host: str | None = None
    pid: int | None = None
    device_name: str | None = None
    device_total_bytes: int | None = None
    baseline_rss_bytes: int | None = None
    """RSS after imports, before the model."""
    versions_sha256: str | None = None
    """Of the versions of all that is installed."""
    memory: tuple[PhaseMemory, ...] = ()
    steps: Steps = Steps()
    last_phase: str | None = None
    ended: bool = False
    """It wrote its last line."""


class OddRank(Frozen):
    """A rank that has other versions installed than most ranks."""

    rank: int
    host: str | None = None
    differences: tuple[str, ...] = ()
    """Of what matters for a number, such as `trl 1.15.0 (most ranks: 1.16.0)`; empty where only others differ."""


class Nonfinite(Frozen):
    """The first NaN or infinity."""

    step: int
    rank: int
    what: str


class TrainObservation(Frozen):
    """What a training job measured, apart from its ranks."""

    proof: dict[str, JsonValue] = {}
    """What really ran (events.py, kind `proof`), of rank 0."""
    proof_mismatches: tuple[str, ...] = ()
    """Each way in which what ran differs from what was asked."""
    warmup_steps: int = 0
    phases_s: dict[str, float] = {}
    """Duration of each phase, of rank 0."""
    eval_loss: float | None = None
    checkpoint_bytes: int | None = None
    checkpoint_writer: int | None = None
    reload_ok: bool | None = None
    reload_max_abs_logit_difference: float | None = None
    nonfinite: Nonfinite | None = None
    earlier_cases: int = 0
    """Cases that this process had measured before: after any, the record leaves out what only a fresh process says."""
    merge_s: float | None = None
    merge_peak_rss_bytes: int | None = None


class Latency(Frozen):
    """A distribution over requests or tokens, as the load generator stated it."""

    mean_s: float | None = None
    p50_s: float | None = None
    p95_s: float | None = None
    p99_s: float | None = None


class LoadPoint(Frozen):
    """vLLM's serving benchmark at one load."""

    concurrency: int
    input_len: int
    output_len: int
    requests: int
    completed: int
    failed: int
    duration_s: float
    requests_per_s: float | None = None
    output_tokens: int
    output_tokens_per_s: float | None = None
    total_tokens_per_s: float | None = None
    ttft: Latency = Latency()
    tpot: Latency = Latency()
    itl: Latency = Latency()
    ended: float | None = None
    """Unix seconds; the load began `duration_s` earlier."""


class Smoke(Frozen):
    """One chat request, and what it proves."""

    ok: bool
    latency_s: float | None = None
    generated_tokens: int | None = None
    text: str = ""
    checks: dict[str, bool] = {}
    """Such as `json_well_formed`, `thinking_obeyed`, `tokens_generated`, `adapter_differs_from_base`."""


class ServeObservation(Frozen):
    """What a serving job measured for one case."""

    ready_s: float | None = None
    weights_bytes: int | None = None
    """As the server states it."""
    kv_cache_bytes: int | None = None
    kv_cache_tokens: int | None = None
    peak_rss_bytes: int | None = None
    """The largest sum over the server's processes."""
    load: LoadPoint | None = None
    smoke: Smoke | None = None
    facts: dict[str, JsonValue] = {}
    """The server's argv, versions, parsers and what else it stated."""


class GpuProcess(Frozen):
    """A process that held memory of a GPU while the job ran."""

    pid: int
    name: str | None = None
    own: bool | None = None
    """Of this job; `None` where the sampler cannot see the process."""
    max_bytes: int | None = None


class GpuSteady(Frozen):
    """One GPU over the time that is measured: the steady steps, or the load that a server was put under."""

    duration_s: float
    start: float | None = None
    """Unix seconds."""
    tokens: int | None = None
    """Real tokens of all ranks in that time; for a server the generated ones."""
    energy_j: float | None = None
    energy_from: Literal["counter", "power"] | None = None
    """`counter`: the GPU's own energy counter at both ends; `power`: the sampled power over time."""
    power_mean_w: float | None = None
    power_max_w: float | None = None
    sm_clock_mean_mhz: float | None = None
    sm_clock_min_mhz: float | None = None
    utilisation_mean: float | None = None
    """NVML's share of time with a kernel running, 0 to 1."""
    samples: int = 0


class GpuSeries(Frozen):
    """What the sampler saw of one GPU, from before the model was loaded to the job's end; a number is over all that."""

    role: Literal["train", "serve"]
    """Of the job that used it."""
    node: int
    ordinal: int
    """CUDA's number of it within the job, which on one node is its rank."""
    index: int | None = None
    """The driver's number of it on that host."""
    uuid: str | None = None
    name: str | None = None
    total_bytes: int | None = None
    power_limit_w: float | None = None
    power_source: str | None = None
    """`instant`, or `average` over a second where the driver states no other."""
    bus: str | None = None
    numa_node: int | None = None
    near_cpus: str | None = None
    pcie: str | None = None
    """Generation and width in use and, where that is less, the largest: `gen 5 x16`."""
    nvlinks: dict[str, int] = {}
    """Active NVLinks by what is at their other end."""
    near: dict[str, str] = {}
    """By ordinal of another GPU of the job, the nearest thing on the PCIe side that they share."""
    interval_s: float | None = None
    """Mean time between two samples."""
    samples: int = 0
    start: float | None = None
    """Unix seconds of the first row of the columns."""
    row_s: float = 1.0
    """Seconds that one row covers; more than 1 where a long job had more rows than a record keeps."""
    memory_used_bytes: tuple[int | None, ...] = ()
    """The largest within each row, of all processes."""
    power_w: tuple[float | None, ...] = ()
    """The mean within each row."""
    power_max_w: tuple[float | None, ...] = ()
    sm_clock_mhz: tuple[float | None, ...] = ()
    """The mean within each row."""
    sm_clock_min_mhz: tuple[float | None, ...] = ()
    utilisation: tuple[float | None, ...] = ()
    """The mean within each row, 0 to 1."""
    memory_first_bytes: int | None = None
    """In use at the first sample, before this job used the GPU."""
    memory_max_bytes: int | None = None
    memory_clock_max_mhz: int | None = None
    temperature_max_c: int | None = None
    pcie_rx_max_bytes_per_s: int | None = None
    pcie_tx_max_bytes_per_s: int | None = None
    throttle: dict[str, float] = {}
    """By reason, the share of the samples, once a second, in which the GPU was held back."""
    energy_j: float | None = None
    """From the first sample to the last, by the GPU's counter."""
    steady: GpuSteady | None = None
    processes: tuple[GpuProcess, ...] = ()
    sampler_core_share: float | None = None
    """Processor time that sampling this node took, as a share of one core."""


class NcclLink(Frozen):
    """How two ranks talk."""

    source: int
    target: int
    transport: str
    """As NCCL writes it, without the network device's number: `P2P/CUMEM`, `SHM/direct/direct`, `NET/IB/GDRDMA`."""
    channels: int


class NcclChoice(Frozen):
    """What NCCL chose for a collective of one size (subsystem TUNING)."""

    collective: str
    size_bytes: int
    algorithm: str
    protocol: str
    channels: int


class NcclFacts(Frozen):
    """What NCCL's own log says of how the ranks are connected."""

    version: str | None = None
    ranks: int | None = None
    """Ranks of the largest communicator."""
    nodes: int | None = None
    transports: dict[str, int] = {}
    """Connections, each a channel from one rank to another, by transport."""
    links: tuple[NcclLink, ...] = ()
    network: str | None = None
    """What connects nodes: `Socket`, `IB` or a plugin's name; chosen even where one node needs none."""
    interfaces: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    """Kinds of the best paths that NCCL found within a node, of its ring: `NVL` is NVLink, `PHB` crosses the host."""
    algorithms: tuple[str, ...] = ()
    """Those that were connected: `ring`, `tree`, `nvls`, `collnet`."""
    choices: tuple[NcclChoice, ...] = ()
    """As it chose them first; empty where its log was not asked for them."""
    environment: dict[str, str] = {}
    """NCCL's variables that it says it obeys."""
    warnings: tuple[str, ...] = ()
    files: int = 0
    """Log files read, one for each process."""


class Observation(Frozen):
    """What the files of an attempt's jobs say; made from whatever was written, however little."""

    ranks: tuple[RankObservation, ...] = ()
    train: TrainObservation | None = None
    serve: ServeObservation | None = None
    probe: ProbeObservation | None = None
    errors: tuple[dict[str, JsonValue], ...] = ()
    """The payload's `error` events as written: rank, phase, type, message, traceback."""
    notes: tuple[str, ...] = ()
    libraries: dict[str, str] = {}
    odd_ranks: tuple[OddRank, ...] = ()
    """Ranks whose installed versions are not those of most ranks."""
    problems: tuple[str, ...] = ()
    """What could not be read, with file and line."""
    gpus: tuple[GpuSeries, ...] = ()
    """By node and ordinal; empty on a CPU and where telemetry was off."""
    nccl: NcclFacts | None = None
