"""Records of every kind and status, made by the real road: event lines on a disk, observed, diagnosed.

`records(n, seed)` gives many different ones, `named()` one of each kind under a name. Every number is invented.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import observe, triage
from harness.events import EventLog
from harness.schema import (
    Attempt,
    ChainCase,
    Environment,
    Gpu,
    JobRun,
    Outcome,
    Provenance,
    Record,
    ServeCase,
    Skip,
    TrainCase,
    case_id,
)

Case = TrainCase | ServeCase | ChainCase
BEGAN = 1_790_000_000.0
MIB, GIB = 2**20, 2**30
HOSTILE = "<script>alert('log')</script><img src=x onerror=alert(1)> \x1b[31m& {{7*7}} ]]> --> javascript:alert(2)"
LIBRARIES = {"torch": "2.13.0+cpu", "transformers": "5.23.0", "peft": "0.21.2", "trl": "1.16.0", "accelerate": "1.15.0"}


# ---------------------------------------------------------------- cases


def train_case(**changes: Any) -> TrainCase:
    """A tiny LoRA case on one CPU rank, with `changes`."""
    fields: dict[str, Any] = {
        "variant": "tiny-hybrid", "device": "cpu", "method": "lora", "seq_len": 256, "steps": 20, "warmup_steps": 5,
        "lora_targets": ("in_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
        "optimizer": "adamw_torch",
    }  # fmt: skip
    fields |= changes
    if fields["method"] == "full":
        fields |= {"lora_rank": 0, "lora_targets": ()}
    return TrainCase(**fields)


def serve_case(**changes: Any) -> ServeCase:
    """A tiny server on a CPU at concurrency 1, with `changes`."""
    fields: dict[str, Any] = {"variant": "tiny-hybrid", "device": "cpu", "max_model_len": 1024, "max_num_seqs": 8,
                              "enforce_eager": True, "output_len": 32}  # fmt: skip
    return ServeCase(**(fields | changes))


def chain_case(adapter: str, **changes: Any) -> ChainCase:
    """A tiny chain that serves the adapter or the merged model."""
    return ChainCase(train=train_case(**changes), serve=serve_case(adapter=adapter))


# ---------------------------------------------------------------- what a payload writes


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


def _start(script: Script, case: TrainCase | ServeCase, ranks: int) -> None:
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


def _set_up(script: Script, case: TrainCase) -> float:
    """All until the first step; the weights' size in GiB."""
    ranks, cuda = case.devices, case.device == "cuda"
    level = {"lora": 1.0, "qlora": 0.5, "full": 2.2}[case.method] * (20 if cuda else 0.2)
    level /= ranks if case.strategy == "fsdp" else 1
    _start(script, case, ranks)
    for name, duration in (("data", 0.4), ("load", 2.5), ("prepare", 0.8)):
        script.phase(ranks, name, duration)
    script.memory(ranks, "load", level, cuda)
    for rank in range(ranks):
        script.write(rank, "proof", **proof(case))
    script.write(0, "note", text=f"thinking: {'on' if case.thinking else 'off'}, samples: 44")
    return level


def _step(script: Script, case: TrainCase, step: int, slow_rank: int | None = None) -> None:
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


def _train(script: Script, case: TrainCase, slow_rank: int | None = None) -> None:
    """A whole training job but for its end."""
    ranks, cuda = case.devices, case.device == "cuda"
    level = _set_up(script, case)
    script.begin(ranks, "train")
    began = script.clock
    for step in range(1, case.steps + 1):
        _step(script, case, step, slow_rank)
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


def _end(script: Script, ranks: int) -> None:
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


def _serve(script: Script, cases: Sequence[tuple[str, ServeCase]]) -> None:
    """A whole serving job for several load points."""
    first = cases[0][1]
    _start(script, first, 1)
    script.phase(1, "prepare", 1.0)
    script.begin(1, "start_server")
    script.write(0, "server", argv=["vllm", "serve", "artifacts/base", "--port", "8123"], port=8123, pid=5001)
    script.write(0, "alive", what="server starting")
    script.end(1, "start_server", 31.0)
    script.write(0, "ready", ready_s=31.0, weights_bytes=None if first.device == "cpu" else 17 * GIB,
                 kv_cache_bytes=GIB, kv_cache_tokens=58_240, facts={"vllm": "0.32.0+cpu", "eager": True})  # fmt: skip
    for name, case in cases:
        script.phase(1, "bench", 11.0)
        script.write(0, "load_point", **_load_point(case, name))
    script.phase(1, "smoke", 0.8)
    checks = {"json_well_formed": True, "thinking_obeyed": True, "tokens_generated": True}
    if first.adapter != "none":
        checks["adapter_differs_from_base"] = True
    script.write(0, "smoke", case_id=None, ok=True, latency_s=0.42, generated_tokens=24, text="Hello.", checks=checks)
    script.write(0, "server_memory", peak_rss_bytes=3_200 * MIB)
    script.phase(1, "stop_server", 1.5)


# ---------------------------------------------------------------- records


def _outcome(script: Script, **changes: Any) -> Outcome:
    return Outcome(**({"exit_code": 0, "start": BEGAN, "end": script.clock + 1} | changes))


def provenance(case: Case) -> Provenance:
    """Where a record's numbers would come from."""
    cuda = case.device == "cuda"
    gpus = tuple(Gpu(index=i, name="NVIDIA H200", uuid=f"GPU-0000-{i}", total_bytes=141 * GIB) for i in range(2))
    train = Environment(name="train", box="venv", digest="sha256:" + "a1" * 32, pinned=True, python="3.11.2",
                        libraries=LIBRARIES)  # fmt: skip
    serve = Environment(name="serve", box="venv", digest="sha256:" + "b2" * 32, pinned=True, python="3.11.2",
                        libraries={"torch": "2.13.0+cpu", "vllm": "0.32.0+cpu"})  # fmt: skip
    return Provenance(
        number_kind="measured", harness_version="0.1.0", commit="0" * 40, payload_sha256="c3" * 32,
        matrix_sha256="d4" * 32, backend="local", environments=(train, serve), hosts=("node1",), cpu="Xeon",
        cpu_count=2, memory_bytes=8 * GIB, gpus=gpus if cuda else (), driver="580.95.05" if cuda else None,
        weights="random",
    )  # fmt: skip


def _record(case: Case, scripts: Sequence[Script], outcomes: Sequence[Outcome], log: str = "") -> Record:
    """Observe and diagnose what `scripts` wrote, as a run does."""
    for script in scripts:
        script.close()
    folders = [script.folder for script in scripts]
    (folders[-1] / "stderr.log").write_text(log)
    observation = observe.observe(case, folders)
    text = observe.log_text(folders)
    diagnosis = triage.diagnose(case, outcomes, observation, text)
    jobs = tuple(
        JobRun(job_id=folder.name.removesuffix(".1"), dir=f"jobs/{folder.name}", outcome=outcome,
               environment="serve" if isinstance(case, ServeCase) or index else "train")
        for index, (folder, outcome) in enumerate(zip(folders, outcomes, strict=True))
    )  # fmt: skip
    attempt = Attempt(number=1, jobs=jobs, observation=observation, diagnosis=diagnosis,
                      log_tail=observe.tail(text) if diagnosis else "")  # fmt: skip
    return Record(
        case_id=case_id(case), case=case, status="failed" if diagnosis else "measured", attempts=(attempt,),
        provenance=provenance(case), finished_at=outcomes[-1].end,
    )  # fmt: skip


def _script(folder: Path, case: Case, half: str = "", seed: int = 0) -> Script:
    return Script(folder / f"{case_id(case)}{half}.1", seed)


def measured_train(case: TrainCase, folder: Path, seed: int = 0, slow_rank: int | None = None) -> Record:
    """A training case that went well."""
    script = _script(folder, case, seed=seed)
    _train(script, case, slow_rank)
    _end(script, case.devices)
    return _record(case, [script], [_outcome(script)])


def measured_serve(cases: Sequence[ServeCase], folder: Path, seed: int = 0) -> list[Record]:
    """Load points of one server that went well, one record each."""
    found = []
    for case in cases:
        script = _script(folder, case, seed=seed)
        _serve(script, [(case_id(one), one) for one in cases])
        _end(script, 1)
        found.append(_record(case, [script], [_outcome(script)]))
    return found


def measured_chain(case: ChainCase, folder: Path, seed: int = 0) -> Record:
    """A chain that went well."""
    train, serve = _script(folder, case, "-train", seed), _script(folder, case, "-serve", seed)
    _train(train, case.train)
    if case.serve.adapter == "merged":
        train.phase(1, "merge", 1.4)
        train.write(0, "merge", duration_s=1.4, peak_rss_bytes=900 * MIB, path="artifacts/merged")
    _end(train, case.train.devices)
    serve.clock = train.clock + 2
    _serve(serve, [(case_id(case), case.serve)])
    _end(serve, 1)
    return _record(case, [train, serve], [_outcome(train), _outcome(serve, start=train.clock + 2)])


def failed_oom(folder: Path, seed: int = 0) -> Record:
    """GPU memory ran out in the backward pass of rank 1; rank 0 lost its peer."""
    case = train_case(variant="nano-9b-v2", device="cuda", devices=2, strategy="ddp", seq_len=8192, micro_batch=2)
    script = _script(folder, case, seed=seed)
    _set_up(script, case)
    script.begin(2, "train")
    script.clock += 3
    trace = ("Traceback (most recent call last):\n  File \"trainer.py\", line 90, in training_step\n"
             "    self.accelerator.backward(loss)\n  File \"graph.py\", line 9, in _engine_run_backward\n")  # fmt: skip
    message = "CUDA out of memory. Tried to allocate 4.00 GiB. GPU 1 has a total capacity of 139.80 GiB."
    script.write(1, "error", phase="train", type="OutOfMemoryError", message=message, traceback=trace + message)
    script.clock += 2
    lost = "Connection closed by peer [10.0.0.2]:40001"
    script.write(0, "error", phase="train", type="RuntimeError", message=lost, traceback=lost)
    log = f"{trace}torch.OutOfMemoryError: {message}\nRuntimeError: {lost}\n"
    return _record(case, [script], [_outcome(script, exit_code=1)], log)


def failed_nan(folder: Path, seed: int = 0) -> Record:
    """The loss of rank 1 was not a number at step 7."""
    case = train_case(devices=2, strategy="ddp", learning_rate=0.3)
    script = _script(folder, case, seed=seed)
    _set_up(script, case)
    script.begin(2, "train")
    for step in range(1, 7):
        _step(script, case, step)
    script.write(1, "step", step=7, warmup=False, start=script.clock, step_time_s=0.2, data_wait_s=0.01,
                 before_collective_s=0.1, tokens=256, padded_tokens=256, loss=float("nan"), grad_norm=float("nan"),
                 learning_rate=0.3)  # fmt: skip
    script.write(1, "nonfinite", step=7, what="loss")
    script.write(1, "error", phase="train", type="Nonfinite", message="loss is nan at step 7 on rank 1", traceback="")
    return _record(case, [script], [_outcome(script, exit_code=1)], "harness.payload.journal.Nonfinite: loss is nan\n")


def failed_stalled(folder: Path, seed: int = 0) -> Record:
    """Two ranks that fell silent at step 9, rank 1 one step earlier."""
    case = train_case(devices=2, strategy="fsdp", stall_s=60.0, seed=7)
    script = _script(folder, case, seed=seed)
    _set_up(script, case)
    script.begin(2, "train")
    for step in range(1, 9):
        _step(script, case, step)
    script.write(0, "step", step=9, warmup=False, start=script.clock, step_time_s=0.2, tokens=256, loss=1.4)
    script.clock += 61
    return _record(case, [script], [_outcome(script, exit_code=None, signal=15, stalled=True)], "waiting\n")


def failed_hostile(folder: Path, seed: int = 0) -> Record:
    """An exception whose text is out to break a page."""
    case = train_case(seq_len=128)
    script = _script(folder, case, seed=seed)
    _set_up(script, case)
    script.begin(1, "train")
    script.write(0, "note", text=HOSTILE)
    script.write(0, "error", phase="train", type="ValueError", message=HOSTILE, traceback=f"ValueError: {HOSTILE}")
    return _record(case, [script], [_outcome(script, exit_code=1)], f"ValueError: {HOSTILE}\n" * 3)


def failed_serve(folder: Path, seed: int = 0) -> Record:
    """A server whose cache does not hold one request."""
    case = serve_case(max_model_len=131_072)
    script = _script(folder, case, seed=seed)
    _start(script, case, 1)
    script.begin(1, "start_server")
    script.clock += 20
    said = "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`."
    script.write(0, "error", phase="start_server", type="ServerDied", traceback="",
                 message=f"the vLLM server ended with exit code 1: {said}")  # fmt: skip
    return _record(case, [script], [_outcome(script, exit_code=1)], f"(EngineCore pid=77) {said}\n")


def skipped(case: Case, rule: str = "fsdp_needs_two_devices",
            reason: str = "FSDP shards over at least 2 devices, and the case has 1.") -> Record:  # fmt: skip
    """A planned point that cannot run."""
    skip = Skip(case=case, rule=rule, reason=reason)
    return Record(case_id=case_id(case), case=case, status="skipped", skip_rule=skip.rule, skip_reason=skip.reason,
                  finished_at=BEGAN)  # fmt: skip


def named(seed: int = 0) -> dict[str, Record]:
    """One record of each kind and status."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        loads = [serve_case(concurrency=number) for number in (1, 4, 8)]
        served = measured_serve(loads, folder, seed)
        return {
            "lora": measured_train(train_case(), folder, seed),
            "fsdp": measured_train(train_case(devices=2, strategy="fsdp"), folder, seed, slow_rank=1),
            "ddp": measured_train(train_case(devices=2, strategy="ddp"), folder, seed),
            "qlora": measured_train(train_case(method="qlora"), folder, seed),
            "full": measured_train(train_case(method="full", param_dtype="fp32"), folder, seed),
            "moe": measured_train(train_case(variant="tiny-moe"), folder, seed),
            "gpu": measured_train(train_case(variant="nano-9b-v2", device="cuda", devices=2, strategy="ddp"), folder),
            "serve_1": served[0],
            "serve_4": served[1],
            "serve_8": served[2],
            "chain_adapter": measured_chain(chain_case("adapter"), folder, seed),
            "chain_merged": measured_chain(chain_case("merged"), folder, seed),
            "failed_oom": failed_oom(folder, seed),
            "failed_nan": failed_nan(folder, seed),
            "failed_stalled": failed_stalled(folder, seed),
            "failed_hostile": failed_hostile(folder, seed),
            "failed_serve": failed_serve(folder, seed),
            "skipped": skipped(train_case(strategy="fsdp")),
        }


_MAKERS: tuple[Callable[[random.Random, int, Path], Record], ...] = (
    lambda r, i, folder: measured_train(train_case(seq_len=2 ** r.randint(6, 12), micro_batch=r.randint(1, 4), seed=i),
                                        folder, i),
    lambda r, i, folder: measured_train(train_case(method=r.choice(["qlora", "full"]), seed=i), folder, i),
    lambda r, i, folder: measured_train(train_case(devices=2, strategy=r.choice(["ddp", "fsdp"]), seed=i), folder, i,
                                        slow_rank=r.choice([None, 1])),
    lambda r, i, folder: measured_serve([serve_case(concurrency=2 ** r.randint(0, 5), seed=i)], folder, i)[0],
    lambda r, i, folder: measured_chain(chain_case(r.choice(["adapter", "merged"]), seed=i), folder, i),
    lambda r, i, folder: skipped(train_case(strategy="fsdp", seed=i)),
)  # fmt: skip


def records(n: int, seed: int) -> list[Record]:
    """`n` records with different ids, most of them measured; the same for the same `seed`."""
    found: dict[str, Record] = {}
    for record in list(named(seed).values())[:n]:
        found[record.case_id] = record
    chosen = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        index = 0
        while len(found) < n:
            index += 1
            record = chosen.choice(_MAKERS)(chosen, 1000 + index, Path(name) / str(index))
            found[record.case_id] = record
    return list(found.values())
