"""What is asked: cases, their ids, skips and plans."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter

from harness.schema.base import Frozen

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
