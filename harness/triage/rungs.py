"""The rungs of the out-of-memory ladder: a case and what the host has -> the case one rung on, or why that is no rung.

Each function has the name of its entry in `ladders/oom.yaml`, which says in what order, for what failure and at what
cost. To add one: a function here, its name in `RUNGS`, its entry there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from harness import catalog
from harness.schema import Diagnosis, ProbeCase, ServeCase, TrainCase
from harness.triage.held import Held
from harness.triage.numbers import FORMS

LEAST_SEQ_LEN = 16
"""Our own floor: below it nothing of a conversation is left."""
LEAST_MODEL_LEN = 256
"""Our own floor, one short question and answer."""
MOST_UTILIZATION, LEAST_UTILIZATION = 0.95, 0.5
"""Of the GPU's memory: vLLM's documentation warns of more; with less, another setting is the mistake."""
BYTES_OF_4_BITS = 0.5
BYTES = {"bf16": 2.0, "fp32": 4.0}
GIB = 2**30

Part = TrainCase | ServeCase | ProbeCase
Maker = Callable[[Any, "Means"], Part | str]
"""A case of the rung's kind -> the case one rung on, or why there is none."""


@dataclass(frozen=True)
class Means:
    """What the host can give to a case."""

    devices: int
    """Of the case's device type: GPUs, or for a CPU case ranks, as many as it has."""
    device_bytes: int | None = None
    """Memory of the smallest GPU."""
    interfaces: tuple[str, ...] = ()
    """Network interfaces of the host that are up and reach others."""
    held: Held | None = None
    """What the case that the rung starts from holds on a GPU whatever its batch, where its payload proved it."""
    diagnosis: Diagnosis | None = None
    """Why the case failed that the rung starts from."""
    ran: Mapping[str, bool] = field(default_factory=dict)
    """By rung climbed so far: did its case run as asked."""


def sequences_per_step(case: TrainCase) -> int:
    """The effective batch."""
    return case.micro_batch * case.grad_accum * case.devices


def weight_bytes(case: TrainCase) -> float:
    """The least that one device holds of the weights, in bytes: from the shape, with everything quantized that may be.

    A lower bound: what it says does not fit does not; what it lets pass may still not fit.
    """
    each = BYTES_OF_4_BITS if catalog.methods()[case.method].quantized else BYTES[case.param_dtype]
    ways = case.devices if case.strategy == "fsdp" else 1
    return catalog.variant(case.variant).parameters * each / ways


def _whatever_the_batch(means: Means) -> str | None:
    """Why no length and no batch of the case fits, `None` where one may."""
    return means.held.too_much if means.held else None


def _too_large(case: TrainCase, means: Means) -> str | None:
    """Why the weights alone of `case` cannot fit on each device, `None` where they may."""
    room = case.memory_cap_gib * GIB if case.memory_cap_gib is not None else means.device_bytes
    if room is None or case.device == "cpu" or weight_bytes(case) <= room:
        return None
    return f"the weights alone would take {weight_bytes(case) / GIB:.1f} GiB of each device's {room / GIB:.1f}"


# ---------------------------------------------------------------- training


def seq_len(case: TrainCase, means: Means) -> TrainCase | str:
    """Half the length."""
    if never := _whatever_the_batch(means):
        return never
    if case.seq_len < 2 * LEAST_SEQ_LEN:
        return f"seq_len {case.seq_len} is as short as it gets"
    return case.model_copy(update={"seq_len": case.seq_len // 2})


def micro_batch(case: TrainCase, means: Means) -> TrainCase | str:
    """At most half the micro batch, and so much more accumulation that the effective batch stays."""
    if case.micro_batch == 1:
        return "micro_batch is 1 already"
    if never := _whatever_the_batch(means):
        return never
    smaller = next(size for size in range(case.micro_batch // 2, 0, -1) if case.micro_batch % size == 0)
    more = case.grad_accum * case.micro_batch // smaller
    return case.model_copy(update={"micro_batch": smaller, "grad_accum": more})


def grad_accum(case: TrainCase, means: Means) -> str:
    """Never alone."""
    return "it grows with each step down of micro_batch; alone it lowers no peak"


def qlora(case: TrainCase, means: Means) -> TrainCase | str:
    """The frozen base in 4 bits."""
    facts = catalog.methods()[case.method]
    if facts.quantized:
        return "the base is held in 4 bits already"
    if not facts.adapter:
        return "full trains all weights, which 4 bits cannot hold; an adapter would be another experiment"
    made = case.model_copy(update={"method": "qlora"})
    return _too_large(made, means) or made


def adamw_8bit(case: TrainCase, means: Means) -> TrainCase | str:
    """The optimizer's state in 8 bits."""
    if "8bit" in case.optimizer:
        return f"{case.optimizer} holds its state in 8 bits already"
    return case.model_copy(update={"optimizer": "adamw_8bit"})


def fsdp(case: TrainCase, means: Means) -> TrainCase | str:
    """Sharded over the GPUs that the case has, or, where that is one, over all of the host's."""
    if case.device == "cpu":
        return "the ranks of a CPU share one memory; dividing the weights among them frees none of it"
    if case.strategy == "fsdp":
        return f"it is sharded over {case.devices} GPUs already"
    ranks = case.devices if case.devices > 1 else means.devices
    if ranks < 2:
        return "sharding needs two GPUs; this host has one"
    made = case.model_copy(update={"strategy": "fsdp", "devices": ranks, **_shardable(case), **_batch(case, ranks)})
    if weight_bytes(made) >= weight_bytes(case):
        return f"a share of {ranks} in 16 bits is no smaller than the whole in 4 bits, which FSDP2 cannot shard"
    return _too_large(made, means) or made


def _shardable(case: TrainCase) -> dict[str, Any]:
    """In place of what FSDP2 cannot shard: bitsandbytes' 4-bit weights and its optimizers."""
    found: dict[str, Any] = {"method": "lora"} if catalog.methods()[case.method].quantized else {}
    return found | ({"optimizer": "adamw_torch_fused"} if "8bit" in case.optimizer else {})


def _batch(case: TrainCase, ranks: int) -> dict[str, int]:
    """Micro batch and accumulation on so many ranks: the effective batch stays where it divides, and else grows."""
    each = max(1, sequences_per_step(case) // ranks)
    if each * ranks != sequences_per_step(case):
        return {}
    size = next(size for size in range(min(case.micro_batch, each), 0, -1) if each % size == 0)
    return {"micro_batch": size, "grad_accum": each // size}


def cpu_offload(case: TrainCase, means: Means) -> TrainCase | str:
    """Shards kept on the host."""
    if case.strategy != "fsdp" or case.device == "cpu":
        return "only what FSDP2 has sharded over GPUs can wait on the host"
    return "the shards wait on the host already" if case.cpu_offload else case.model_copy(update={"cpu_offload": True})


def activation_checkpointing(case: TrainCase, means: Means) -> TrainCase | str:
    """Activations computed again."""
    if case.activation_checkpointing:
        return "activation checkpointing is on already"
    return _whatever_the_batch(means) or case.model_copy(update={"activation_checkpointing": True})


# ---------------------------------------------------------------- serving


def max_model_len(case: ServeCase, means: Means) -> ServeCase | str:
    """The length that the server itself says would fit, else half of what was asked; no less than the load needs."""
    shorter = max(_named_length(case, means), case.input_len + case.output_len, LEAST_MODEL_LEN)
    if shorter >= case.max_model_len:
        return f"the load's {case.input_len + case.output_len} tokens a request need max_model_len {case.max_model_len}"
    return case.model_copy(update={"max_model_len": shorter})


def _named_length(case: ServeCase, means: Means) -> int:
    quotes = means.diagnosis.evidence if means.diagnosis else ()
    named = [int(found[1]) for quote in quotes if (found := FORMS["fitting_max_model_len"].search(quote.text))]
    return next((length for length in named if length < case.max_model_len), case.max_model_len // 2)


def max_num_seqs(case: ServeCase, means: Means) -> ServeCase | str:
    """Half the sequences at once, but no fewer than the load sends."""
    fewer = max(case.max_num_seqs // 2, case.concurrency)
    if fewer >= case.max_num_seqs:
        return (
            f"the load sends {case.concurrency} requests at once, as many as max_num_seqs {case.max_num_seqs} lets in"
        )
    return case.model_copy(update={"max_num_seqs": fewer})


def enforce_eager(case: ServeCase, means: Means) -> ServeCase | str:
    """No CUDA graphs."""
    return "no graphs are captured already" if case.enforce_eager else case.model_copy(update={"enforce_eager": True})


def utilization_up(case: ServeCase, means: Means) -> ServeCase | str:
    """The most that the server may take."""
    if case.gpu_memory_utilization >= MOST_UTILIZATION:
        return f"gpu_memory_utilization is {case.gpu_memory_utilization:g} already"
    return case.model_copy(update={"gpu_memory_utilization": MOST_UTILIZATION})


def utilization_down(case: ServeCase, means: Means) -> ServeCase | str:
    """A tenth of the GPU less for the server's own pool."""
    lower = round(case.gpu_memory_utilization - 0.1, 2)
    if lower < LEAST_UTILIZATION:
        return f"gpu_memory_utilization is {case.gpu_memory_utilization:g} already"
    return case.model_copy(update={"gpu_memory_utilization": lower})


def tensor_parallel(case: ServeCase, means: Means) -> ServeCase | str:
    """Twice the GPUs."""
    if case.device == "cpu":
        return "a CPU's memory is not divided by more ranks"
    if 2 * case.tensor_parallel > means.devices:
        return f"tensor_parallel {2 * case.tensor_parallel} needs more GPUs than the {means.devices} of this host"
    return case.model_copy(update={"tensor_parallel": 2 * case.tensor_parallel})


RUNGS: Mapping[str, Maker] = {
    made.__name__: made
    for made in (
        seq_len, micro_batch, grad_accum, qlora, adamw_8bit, fsdp, cpu_offload, activation_checkpointing,
        max_model_len, max_num_seqs, enforce_eager, utilization_up, utilization_down, tensor_parallel,
    )
}  # fmt: skip
