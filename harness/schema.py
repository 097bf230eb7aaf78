"""The frozen types that pass between modules, and nothing else.

Rules that hold for every type here: unknown fields are refused, numbers are finite, units stand in names, what is
missing is `None` and never zero. A default of a `Case` field is its first-version value and never changes: the id of a
case hashes only the fields that differ from it, so that a field added later renames no case measured before.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter

RECORD_VERSION = 1
PLAN_VERSION = 1
RUN_VERSION = 1

Method = Literal["lora", "qlora", "full"]
Strategy = Literal["none", "ddp", "fsdp"]
Optimizer = Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
DType = Literal["bf16", "fp32"]
DeviceType = Literal["cpu", "cuda"]
EnvironmentName = Literal["train", "serve"]
Status = Literal["measured", "failed", "skipped"]
ClaimStatus = Literal["established", "supported", "hypothesis", "unknown"]
Role = Literal["initiating", "cascade", "teardown", "advice"]

NOT_IDENTITY = frozenset({"time_limit_s", "stall_s"})
"""Fields of a case that decide when to give up on it but not what is measured."""


class Frozen(BaseModel):
    """A value: immutable, no unknown field, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# ---------------------------------------------------------------- what is asked


class CaseBase(Frozen):
    """What training and serving cases share."""

    variant: str
    """A name in the catalog."""
    device: DeviceType = "cuda"
    weights: str = "random"
    """`random`, `hub`, or an absolute path of a saved model."""
    param_dtype: DType = "bf16"
    """Of the parameters: for `full` in fp32 the master weights, for LoRA and QLoRA that of what stays unquantized."""
    thinking: bool = True
    """One policy for data, evaluation and serving: are thinking traces on."""
    seed: int = 42
    repeat: int = Field(0, ge=0)
    """Index of this repetition of an otherwise equal case."""
    time_limit_s: float = Field(3600.0, gt=0)
    stall_s: float = Field(600.0, gt=0)
    """Seconds without an event of any rank after which the case is ended as stalled."""


class TrainCase(CaseBase):
    """One fine-tuning measurement."""

    kind: Literal["train"] = "train"
    method: Method
    seq_len: int = Field(ge=8)
    """Tokens per sample; synthetic samples have exactly this length."""
    micro_batch: int = Field(1, ge=1)
    grad_accum: int = Field(1, ge=1)
    devices: int = Field(1, ge=1)
    """Ranks: one per GPU, or processes on a CPU."""
    strategy: Strategy = "none"
    activation_checkpointing: bool = True
    optimizer: Optimizer = "adamw_torch_fused"
    learning_rate: float = Field(2e-4, gt=0)
    lora_rank: int = Field(16, ge=0)
    """0 for `full`."""
    lora_alpha: int = Field(16, ge=0)
    lora_targets: tuple[str, ...] = ()
    """Module names that get an adapter, resolved from the catalog; empty for `full`."""
    attention: Attention = "sdpa"
    steps: int = Field(20, ge=1)
    """Optimizer steps in all, warm-up included."""
    warmup_steps: int = Field(5, ge=0)
    """First steps that never enter a statistic."""
    data: str = "synthetic"
    """`synthetic`, or an absolute path of a JSONL file with one `messages` conversation per line."""
    memory_cap_gib: float | None = Field(None, ge=1, le=1024)
    """Each GPU behaves like one of this size; what is measured so says what fits, never how fast."""


class ServeCase(CaseBase):
    """One load point on a vLLM server; cases that differ in the load alone share one server start."""

    kind: Literal["serve"] = "serve"
    tensor_parallel: int = Field(1, ge=1)
    max_model_len: int = Field(4096, ge=16)
    max_num_seqs: int = Field(64, ge=1)
    adapter: str = "none"
    """`none`, `adapter` or `merged` (what a chain trained), or an absolute path of a PEFT adapter."""
    enforce_eager: bool = False
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1)
    concurrency: int = Field(1, ge=1)
    input_len: int = Field(128, ge=1)
    output_len: int = Field(128, ge=1)
    requests: int = Field(16, ge=1)

    @property
    def devices(self) -> int:
        """GPUs that the server takes."""
        return self.tensor_parallel


LOAD_FIELDS = frozenset({"concurrency", "input_len", "output_len", "requests", "repeat", *NOT_IDENTITY})
"""Fields of a `ServeCase` that need no other server start."""


class ChainCase(Frozen):
    """Train, save, reload, merge or keep the adapter, serve it, smoke-test it."""

    kind: Literal["chain"] = "chain"
    train: TrainCase
    serve: ServeCase

    @property
    def variant(self) -> str:
        """The variant that both halves use."""
        return self.train.variant

    @property
    def device(self) -> DeviceType:
        """The device type that both halves use."""
        return self.train.device

    @property
    def devices(self) -> int:
        """Devices of the larger half."""
        return max(self.train.devices, self.serve.devices)


Case = Annotated[TrainCase | ServeCase | ChainCase, Field(discriminator="kind")]
CASE: TypeAdapter[TrainCase | ServeCase | ChainCase] = TypeAdapter(Case)


@cache
def _fields(kind: type[BaseModel]) -> tuple[tuple[str, bool, Any], ...]:
    """Name, is it required, and default of each field that is part of an identity; asked 10,000 times for a plan."""
    fields = kind.model_fields.items()
    return tuple((name, field.is_required(), field.default) for name, field in fields if name not in NOT_IDENTITY)


def _identity(case: BaseModel) -> dict[str, Any]:
    """The fields of `case` that differ from their first-version default, as JSON values."""
    found: dict[str, Any] = {"kind": getattr(case, "kind", None)}
    for name, required, default in _fields(type(case)):
        value = getattr(case, name)
        if isinstance(value, BaseModel):
            found[name] = _identity(value)
        elif required or value != default:
            found[name] = value
    return found


def fingerprint(value: Any) -> str:
    """Eight hex digits of the SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def case_id(case: TrainCase | ServeCase | ChainCase) -> str:
    """A readable slug and a hash of what differs from the first-version defaults; safe as a file name."""
    return f"{_slug(case)}-{fingerprint(_identity(case))}"


def _slug(case: TrainCase | ServeCase | ChainCase) -> str:
    if isinstance(case, ChainCase):
        return f"chain-{case.variant}-{case.train.method}-{case.serve.adapter.split('/')[-1]}"
    if isinstance(case, ServeCase):
        return f"serve-{case.variant}-tp{case.tensor_parallel}-c{case.concurrency}-i{case.input_len}-o{case.output_len}"
    place = f"{case.strategy}{case.devices}" if case.strategy != "none" else "one"
    cap = "" if case.memory_cap_gib is None else f"-cap{case.memory_cap_gib:g}"
    return f"train-{case.variant}-{case.method}-s{case.seq_len}-b{case.micro_batch}-{place}{cap}"


class Skip(Frozen):
    """A planned point that cannot or shall not run, and why."""

    case: Case
    rule: str
    """A stable word for the kind of reason, such as `fsdp_needs_two_devices` or `excluded`."""
    reason: str
    """One sentence that a newcomer understands."""


class Plan(Frozen):
    """A matrix, fully expanded: cases + skips = the product of the axes + includes."""

    version: int = PLAN_VERSION
    name: str
    source: str
    """Path of the matrix file as given."""
    matrix_sha256: str
    cases: tuple[Case, ...]
    skips: tuple[Skip, ...]


# ---------------------------------------------------------------- what is started


class Mount(Frozen):
    """A host path that a job needs besides its own directory."""

    path: str
    writable: bool = False


class Job(Frozen):
    """One process group to start: argv for inside a box, and what it may use.

    `argv[0]` is the bare name `python`; a box puts the interpreter of its environment there. The working directory is
    the job's own directory, which is also the only place it writes to; `payload` is written there as `job.json`.
    """

    id: str
    environment: EnvironmentName
    case_ids: tuple[str, ...]
    argv: tuple[str, ...]
    env: dict[str, str]
    mounts: tuple[Mount, ...] = ()
    device: DeviceType
    devices: int
    time_limit_s: float
    stall_s: float
    files: dict[str, str] = {}
    """Small text files to lay into the job directory before the start, by relative name."""
    payload: dict[str, JsonValue]
    """The content of `job.json`, all that the payload reads."""


class Command(Frozen):
    """A job inside its box: what a backend starts."""

    argv: tuple[str, ...]
    env: dict[str, str]
    """The whole environment, not an addition to one."""
    cwd: str


class Ticket(Frozen):
    """A started job, on disk before `submit` returns."""

    backend: str
    job_id: str
    job_dir: str
    submitted_at: float
    handle: dict[str, str]
    """What the backend needs to find it again: a pid and its start time, a Slurm job id, a container id."""


class Outcome(Frozen):
    """How a job ended, as its backend saw it."""

    exit_code: int | None = None
    """`None` where a signal ended it or nothing is known."""
    signal: int | None = None
    timed_out: bool = False
    stalled: bool = False
    host_oom_killed: bool = False
    interrupted: bool = False
    """Ended from outside: Ctrl-C, `cancel`, or the control plane died."""
    lost: bool = False
    """The supervisor is gone and left no word."""
    start: float
    """Unix seconds."""
    end: float
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Ended by itself with exit code 0."""
        return self.exit_code == 0 and not (self.timed_out or self.stalled or self.interrupted or self.lost)


# ---------------------------------------------------------------- what was seen


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
    memory: tuple[PhaseMemory, ...] = ()
    steps: Steps = Steps()
    last_phase: str | None = None
    ended: bool = False
    """It wrote its last line."""


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
    errors: tuple[dict[str, JsonValue], ...] = ()
    """The payload's `error` events as written: rank, phase, type, message, traceback."""
    notes: tuple[str, ...] = ()
    libraries: dict[str, str] = {}
    problems: tuple[str, ...] = ()
    """What could not be read, with file and line."""
    gpus: tuple[GpuSeries, ...] = ()
    """By node and ordinal; empty on a CPU and where telemetry was off."""
    nccl: NcclFacts | None = None


class Culprit(Frozen):
    """Where a failure began."""

    rank: int | None = None
    host: str | None = None
    gpu: str | None = None


class Evidence(Frozen):
    """A line that stands in a log."""

    file: str
    line: int
    text: str
    role: Role


class Diagnosis(Frozen):
    """What failed, who is to blame, and what to change first."""

    failure_class: str
    phase: str | None = None
    summary: str
    """One sentence."""
    culprit: Culprit | None = None
    class_status: ClaimStatus = "unknown"
    culprit_status: ClaimStatus = "unknown"
    cause_status: ClaimStatus = "unknown"
    evidence: tuple[Evidence, ...] = ()
    next_step: str = ""


class TimelineEvent(Frozen):
    """One thing that a log tells, in the order in which it happened."""

    time: str | None = None
    """`MM-DD HH:MM:SS` as the log says it, or nothing."""
    rank: int | None = None
    host: str | None = None
    failure_class: str
    role: Role
    file: str
    line: int
    text: str


class NextStep(Frozen):
    """What to change first."""

    step: str
    rung: str | None = None
    """The rung of the out-of-memory (O1..O6) or communication (N1..N4) ladder; none outside both."""
    why: str = ""
    cost: str = ""


class LogVerdict(Frozen):
    """What logs of any origin tell: what failed, who began it, the lines that show it, what to change first."""

    failure_class: str
    summary: str
    culprit: Culprit | None = None
    class_status: ClaimStatus = "unknown"
    culprit_status: ClaimStatus = "unknown"
    cause_status: ClaimStatus = "unknown"
    evidence: tuple[Evidence, ...] = ()
    next: NextStep
    timeline: tuple[TimelineEvent, ...] = ()
    attempts: int = 1
    earlier: tuple[str, ...] = ()
    """Classes of what failed in earlier attempts that the logs also hold."""
    files: int = 0
    notes: tuple[str, ...] = ()
    """What was left out or not read, and why."""


# ---------------------------------------------------------------- what is kept


class Environment(Frozen):
    """Where a job's libraries came from."""

    name: EnvironmentName
    box: str
    digest: str
    """`sha256:...` of what is installed, or of the image."""
    pinned: bool
    """False for the `found` box: shown as unpinned."""
    python: str
    libraries: dict[str, str]
    """Versions of what matters for a number."""


class Gpu(Frozen):
    """One GPU as its driver names it."""

    index: int
    name: str
    uuid: str
    total_bytes: int


class Provenance(Frozen):
    """Where a record's numbers come from."""

    number_kind: Literal["measured", "capped", "replayed", "predicted"]
    harness_version: str
    commit: str | None
    """Of the harness; ends in `+dirty` where the tree differed."""
    payload_sha256: str
    matrix_sha256: str
    backend: str
    environments: tuple[Environment, ...]
    hosts: tuple[str, ...]
    cpu: str
    cpu_count: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    weights: str
    """`random`, `hub@<commit>`, or `path`."""


class JobRun(Frozen):
    """One job of an attempt."""

    job_id: str
    environment: EnvironmentName
    dir: str
    """Relative to the run directory."""
    outcome: Outcome


class Attempt(Frozen):
    """One try at a case."""

    number: int
    jobs: tuple[JobRun, ...]
    observation: Observation
    diagnosis: Diagnosis | None = None
    """`None` exactly where the attempt measured what was asked."""
    log_tail: str = ""
    """Last lines of the job's output where it failed; scrubbed, and hostile to whoever renders it."""


class Record(Frozen):
    """The one result of a planned case."""

    version: int = RECORD_VERSION
    case_id: str
    case: Case
    status: Status
    skip_rule: str | None = None
    skip_reason: str | None = None
    attempts: tuple[Attempt, ...] = ()
    parent: str | None = None
    """Id of the case that a ladder or a search made this one from."""
    provenance: Provenance | None = None
    finished_at: float
    """Unix seconds."""

    @property
    def last(self) -> Attempt | None:
        """The attempt that decided the status."""
        return self.attempts[-1] if self.attempts else None
