"""The event lines of made-up jobs that go well, in full or in part; every number is invented."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.events import EventLog
from harness.schema import ProbeCase, ServeCase, TrainCase

BEGAN = 1_790_000_000.0
MIB, GIB = 2**20, 2**30
LIBRARIES = {"torch": "2.13.0+cpu", "transformers": "5.23.0", "peft": "0.21.2", "trl": "1.16.0", "accelerate": "1.15.0"}


@dataclass
class Script:
    """How one job goes: writes the events of all its ranks into `folder`."""

    folder: Path
    seed: int
    clock: float = BEGAN
    logs: dict[int, EventLog] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.random = random.Random(self.seed)

    def write(self, rank: int, kind: str, /, **fields: Any) -> None:
        """One line of one rank, at the script's clock."""
        if rank not in self.logs:
            self.logs[rank] = EventLog(str(self.folder), rank)
        self.logs[rank].write(kind, **{"t": self.clock, "m": self.clock - BEGAN, **fields})

    def phase(self, ranks: int, name: str, duration_s: float) -> None:
        """A whole phase of all ranks."""
        self.begin(ranks, name)
        self.end(ranks, name, duration_s)

    def begin(self, ranks: int, name: str) -> None:
        """The beginning of a phase."""
        for rank in range(ranks):
            self.write(rank, "phase", name=name, state="begin")

    def end(self, ranks: int, name: str, duration_s: float) -> None:
        """Its end, `duration_s` later."""
        self.clock += duration_s
        for rank in range(ranks):
            self.write(rank, "phase", name=name, state="end", duration_s=duration_s)

    def memory(self, ranks: int, phase: str, level: float, cuda: bool) -> None:
        """The peak of a phase on each rank; `level` in GiB."""
        for rank in range(ranks):
            peak = int((level + 0.05 * rank + self.random.uniform(0, 0.02)) * GIB)
            on_gpu = {"peak_allocated_bytes": peak, "peak_reserved_bytes": int(peak * 1.12),
                      "device_used_bytes": int(peak * 1.12) + 600 * MIB}  # fmt: skip
            nothing = dict.fromkeys(on_gpu, None)
            rss = peak + 500 * MIB if not cuda else 3 * GIB
            self.write(rank, "memory", phase=phase, **(on_gpu if cuda else nothing), peak_rss_bytes=rss)

    def close(self) -> None:
        """Let go of the files."""
        for log in self.logs.values():
            log._file.close()


def start_ranks(script: Script, case: TrainCase | ServeCase, ranks: int) -> None:
    cuda = case.device == "cuda"
    device = {
        "type": case.device,
        "name": "NVIDIA H200" if cuda else "Xeon",
        "total_bytes": 141 * GIB if cuda else None,
    }
    for rank in range(ranks):
        script.write(rank, "start", rank=rank, world_size=ranks, local_rank=rank, pid=4000 + rank, host="node1",
                     python="3.11.2", libraries=LIBRARIES, device=device, baseline_rss_bytes=500 * MIB)  # fmt: skip
    script.clock += 6


def proof(case: TrainCase, mismatches: Sequence[str] = ()) -> dict[str, Any]:
    """What a payload proves of a set-up case."""
    trainable = 3_300_000 if case.method == "full" else 98_304
    return {
        "trainable_parameters": trainable, "total_parameters": 3_398_304,
        "parameters_by_layer_type": {"mamba": 1_400_000, "mlp": 1_100_000, "attention": 400_000, "embedding": 498_304},
        "trainable_by_layer_type": {"mamba": trainable // 2, "mlp": trainable // 4, "attention": trainable // 4},
        "bytes_by_dtype_and_class": {"bfloat16": {"Linear": 5_000_000}, "uint8": {"Linear4bit": 1_000_000}},
        "sharding": {"world_size": case.devices, "dtensor_parameters": 64 if case.strategy == "fsdp" else 0},
        "kernels": "torch reference", "attention": case.attention, "loss_path": "trl fused head",
        "adapter": {"rank": case.lora_rank, "targets": list(case.lora_targets)}, "optimizer": case.optimizer,
        "activation_checkpointing": case.activation_checkpointing, "mismatches": list(mismatches),
    }  # fmt: skip


def set_up_training(script: Script, case: TrainCase) -> float:
    """All until the first step; the weights' size in GiB."""
    ranks, cuda = case.devices, case.device == "cuda"
    level = {"lora": 1.0, "qlora": 0.5, "full": 2.2}[case.method] * (20 if cuda else 0.2)
    level /= ranks if case.strategy == "fsdp" else 1
    start_ranks(script, case, ranks)
    for name, duration in (("data", 0.4), ("load", 2.5), ("prepare", 0.8)):
        script.phase(ranks, name, duration)
    script.memory(ranks, "load", level, cuda)
    for rank in range(ranks):
        script.write(rank, "proof", **proof(case))
    script.write(0, "note", text=f"thinking: {'on' if case.thinking else 'off'}, samples: 44")
    return level


def run_step(script: Script, case: TrainCase, step: int, slow_rank: int | None = None) -> None:
    tokens = case.seq_len * case.micro_batch * case.grad_accum
    base = tokens / 4000 + (4.0 if step == 1 else 0.0)
    took = base * script.random.uniform(1, 1.08) + (0.4 * base if slow_rank is not None else 0)
    for rank in range(case.devices):
        own = base * 0.3 * script.random.uniform(1, 1.1) + (0.4 * base if rank == slow_rank else 0)
        script.write(rank, "step", step=step, warmup=step <= case.warmup_steps, start=script.clock,
                     step_time_s=took * script.random.uniform(1, 1.004), data_wait_s=0.01 * took,
                     before_collective_s=own, tokens=tokens - (17 if case.data != "synthetic" else 0),
                     padded_tokens=tokens, loss=2.6 * 0.93**step + 0.02 * rank,
                     grad_norm=1.4 * 0.98**step, learning_rate=case.learning_rate)  # fmt: skip
    script.clock += took


def run_training(script: Script, case: TrainCase, slow_rank: int | None = None) -> None:
    """A whole training job but for its end."""
    ranks, cuda = case.devices, case.device == "cuda"
    level = set_up_training(script, case)
    script.begin(ranks, "train")
    began = script.clock
    for step in range(1, case.steps + 1):
        run_step(script, case, step, slow_rank)
        if step == 1:
            grown = level * (1.3 + case.seq_len / 2048)
            for phase, factor in (("first_forward", 0.9), ("backward", 1.0), ("optimizer_step", 0.8)):
                script.memory(ranks, phase, grown * factor, cuda)
    script.end(ranks, "train", script.clock - began)
    script.phase(ranks, "eval", 0.7)
    script.write(0, "eval", loss=0.71, duration_s=0.7)
    script.memory(ranks, "eval", level * 1.2, cuda)
    script.phase(ranks, "save", 0.3)
    script.write(0, "save", bytes=412_000, files=6, writer_rank=0, duration_s=0.3)
    script.memory(ranks, "save", level * 1.05, cuda)
    script.phase(ranks, "reload", 1.1)
    script.write(0, "reload", ok=True, max_abs_logit_difference=0.0, checks={"files": True, "logits": True})


def finish(script: Script, ranks: int) -> None:
    for rank in range(ranks):
        script.write(rank, "end", ok=True)


def _latency(middle: float) -> dict[str, float]:
    return {"mean_s": middle * 1.05, "p50_s": middle, "p95_s": middle * 1.6, "p99_s": middle * 2.1}


def _load_point(case: ServeCase, name: str) -> dict[str, Any]:
    tpot = 0.012 * (1 + 0.2 * case.concurrency)
    duration = case.requests / case.concurrency * case.output_len * tpot
    tokens = case.requests * case.output_len
    return {
        "case_id": name, "concurrency": case.concurrency, "input_len": case.input_len, "output_len": case.output_len,
        "requests": case.requests, "completed": case.requests, "failed": 0, "duration_s": duration,
        "requests_per_s": case.requests / duration, "output_tokens": tokens, "output_tokens_per_s": tokens / duration,
        "total_tokens_per_s": (tokens + case.requests * case.input_len) / duration,
        "ttft": _latency(0.05 * case.concurrency), "tpot": _latency(tpot), "itl": _latency(tpot * 1.02),
    }  # fmt: skip


def run_serving(script: Script, cases: Sequence[tuple[str, ServeCase]]) -> None:
    """A whole serving job for several load points."""
    first = cases[0][1]
    start_ranks(script, first, 1)
    script.phase(1, "prepare", 1.0)
    script.begin(1, "start_server")
    script.write(0, "server", argv=["vllm", "serve", "artifacts/base", "--port", "8123"], port=8123, pid=5001)
    script.write(0, "alive", what="server starting")
    script.end(1, "start_server", 31.0)
    script.write(0, "ready", ready_s=31.0, weights_bytes=None if first.device == "cpu" else 17 * GIB,
                 kv_cache_bytes=GIB, kv_cache_tokens=58_240, facts={"vllm": "0.32.0+cpu", "eager": True})  # fmt: skip
    script.phase(1, "smoke", 0.8)
    checks = {"json_well_formed": True, "thinking_obeyed": True, "tokens_generated": True}
    if first.adapter != "none":
        checks["adapter_differs_from_base"] = True
    script.write(0, "smoke", case_id=None, ok=True, latency_s=0.42, generated_tokens=24, text="Hello.", checks=checks)
    for name, case in cases:
        script.phase(1, "bench", 11.0)
        script.write(0, "load_point", **_load_point(case, name))
    script.write(0, "server_memory", peak_rss_bytes=3_200 * MIB)
    script.phase(1, "stop_server", 1.5)


# ---------------------------------------------------------------- probes


def run_probe(script: Script, case: ProbeCase, *, wrong: bool = False, late: int | None = None) -> None:
    """The lines of a probe of which every all-reduce takes 1 ms per KiB-power, on rank 1 a little less."""
    for rank in range(case.devices):
        script.write(rank, "start", rank=rank, world_size=case.devices, host="node1", pid=100 + rank,
                     libraries={"torch": "2.13.0"}, device={"type": "cpu", "name": "Xeon"})  # fmt: skip
        script.write(rank, "proof", backend="gloo", interfaces=["lo"], environment={}, mismatches=[])
        found = 4.0 if wrong and rank == 1 else 3.0
        script.write(rank, "check", name="all_reduce_sum", ok=found == 3.0, found=found, expected=3.0)
        work = 0.02 if rank == late else 0.01
        script.write(rank, "arrival", warmup=5, work_s=[work] * 4, wait_s=[0.03 - work] * 4)
        for size in case.sizes_bytes:
            times = [size * 1e-9 * (iteration + 1) - rank * 1e-10 for iteration in range(case.iterations)]
            script.write(rank, "collective", operation="all_reduce", size_bytes=size, warmup=5, timer="host clock",
                         time_s=times)  # fmt: skip
        script.write(rank, "end", ok=True)
