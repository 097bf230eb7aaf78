"""What is asked: cases, their ids, skips and plans."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter

from harness.schema.base import Frozen
from harness.schema.ladders import Frontier, LadderAsked

Method = Literal["lora", "qlora", "full"]
Strategy = Literal["none", "ddp", "fsdp"]
Optimizer = Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
DType = Literal["bf16", "fp32"]
DeviceType = Literal["cpu", "cuda"]

PLAN_VERSION = 1
NOT_IDENTITY = frozenset({"time_limit_s", "stall_s"})
"""Fields of a case that decide when to give up on it but not what is measured."""


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
    nodes: int = Field(1, ge=1)
    """Hosts that the ranks are spread over evenly: `devices / nodes` on each."""
    cpu_offload: bool = False
    """FSDP2 keeps its shards, their gradients and the optimizer's state on the host, and the optimizer runs there."""
    checkpoints: Literal["run", "local"] = "run"
    """Where checkpoints, adapters and merged models are written: into the run directory, or to a local disk."""


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
    cudagraph_max: int | None = Field(None, ge=1)
    """Largest batch that CUDA graphs are captured for; `None` is vLLM's choice: twice max_num_seqs, at most 512."""

    mamba_ssm_cache_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the Mamba states that the server keeps; `None` is what the catalog says of the variant."""

    @property
    def devices(self) -> int:
        """GPUs that the server takes."""
        return self.tensor_parallel

    @property
    def nodes(self) -> int:
        """Hosts that a server takes: one."""
        return 1


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

    @property
    def nodes(self) -> int:
        """Hosts of the larger half."""
        return max(self.train.nodes, self.serve.nodes)


class ProbeCase(Frozen):
    """A short all-reduce over given ranks, interface and P2P setting: is it the network, and how fast is it.

    Over gloo on a CPU and over NCCL on GPUs; no model, so no variant.
    """

    kind: Literal["probe"] = "probe"
    device: DeviceType = "cuda"
    devices: int = Field(2, ge=1)
    """Ranks over all nodes: one per GPU, or processes on a CPU."""
    nodes: int = Field(1, ge=1)
    interface: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:@-]{0,30}$")
    """The network interface that ranks must use; `None` leaves the choice to what a case of that device gets."""
    p2p: bool = True
    """May GPUs of one host copy to each other directly."""
    sizes_bytes: tuple[Annotated[int, Field(ge=4, le=2**34)], ...] = Field(
        (2**10, 2**14, 2**18, 2**22, 2**26), min_length=1, max_length=32
    )
    """Of the reduced buffer on each rank, in fp32: whole multiples of 4."""
    iterations: int = Field(20, ge=1, le=500)
    """Timed all-reduces of each size, after warm-up."""
    debug: bool = False
    """The libraries' own logs as full as they get, and PyTorch's checks of each collective."""
    repeat: int = Field(0, ge=0)
    """Index of this repetition of an otherwise equal case."""
    time_limit_s: float = Field(300.0, gt=0)
    stall_s: float = Field(60.0, gt=0)
    """Seconds without an event of any rank after which the case is ended as stalled."""


AnyCase = TrainCase | ServeCase | ChainCase | ProbeCase
Case = Annotated[AnyCase, Field(discriminator="kind")]
CASE: TypeAdapter[AnyCase] = TypeAdapter(Case)


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


def asked_for(name: str, patterns: str | None) -> bool:
    """Whether the id `name` matches one of `patterns`, shell patterns with commas between them; all do of none."""
    return not patterns or any(fnmatch.fnmatch(name, pattern.strip()) for pattern in patterns.split(","))


def case_id(case: AnyCase) -> str:
    """A readable slug and a hash of what differs from the first-version defaults; safe as a file name."""
    return f"{_slug(case)}-{fingerprint(_identity(case))}"


def _slug(case: AnyCase) -> str:
    if isinstance(case, ProbeCase):
        return _probe_slug(case)
    if isinstance(case, ChainCase):
        return f"chain-{case.variant}-{case.train.method}-{case.serve.adapter.split('/')[-1]}"
    if isinstance(case, ServeCase):
        return f"serve-{case.variant}-tp{case.tensor_parallel}-c{case.concurrency}-i{case.input_len}-o{case.output_len}"
    place = f"{case.strategy}{case.devices}" if case.strategy != "none" else "one"
    cap = "" if case.memory_cap_gib is None else f"-cap{case.memory_cap_gib:g}"
    nodes = "" if case.nodes == 1 else f"-n{case.nodes}"
    local = "-local" if case.checkpoints == "local" else ""
    return f"train-{case.variant}-{case.method}-s{case.seq_len}-b{case.micro_batch}-{place}{nodes}{cap}{local}"


def _probe_slug(case: ProbeCase) -> str:
    backend = "gloo" if case.device == "cpu" else "nccl"
    nodes = f"x{case.nodes}nodes" if case.nodes > 1 else ""
    marks = (case.interface, None if case.p2p else "nop2p", "debug" if case.debug else None)
    return "-".join([f"probe-{backend}{case.devices}{nodes}", *(mark.replace(":", "_") for mark in marks if mark)])


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
    ladders: dict[str, LadderAsked] = {}
    """By case id, what may be tried after the case failed."""
    frontiers: tuple[Frontier, ...] = ()
