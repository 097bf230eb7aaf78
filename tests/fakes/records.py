"""Records of every kind and status, made by the real road: event lines on a disk, observed, diagnosed.

`records(n, seed)` gives many different ones, `named()` one of each kind under a name. Every number is invented.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import observe, triage
from harness.schema import (
    AnyCase,
    Attempt,
    ChainCase,
    Environment,
    Gpu,
    JobRun,
    Outcome,
    ProbeCase,
    Provenance,
    Record,
    ServeCase,
    Skip,
    TrainCase,
    case_id,
)

from .script import (
    BEGAN,
    GIB,
    LIBRARIES,
    MIB,
    Script,
    finish,
    run_probe,
    run_serving,
    run_step,
    run_training,
    set_up_training,
    start_ranks,
)

Case = AnyCase
HOSTILE = "<script>alert('log')</script><img src=x onerror=alert(1)> \x1b[31m& {{7*7}} ]]> --> javascript:alert(2)"


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
    run_training(script, case, slow_rank)
    finish(script, case.devices)
    return _record(case, [script], [_outcome(script)])


def measured_serve(cases: Sequence[ServeCase], folder: Path, seed: int = 0) -> list[Record]:
    """Load points of one server that went well, one record each."""
    found = []
    for case in cases:
        script = _script(folder, case, seed=seed)
        run_serving(script, [(case_id(one), one) for one in cases])
        finish(script, 1)
        found.append(_record(case, [script], [_outcome(script)]))
    return found


def measured_chain(case: ChainCase, folder: Path, seed: int = 0) -> Record:
    """A chain that went well."""
    train, serve = _script(folder, case, "-train", seed), _script(folder, case, "-serve", seed)
    run_training(train, case.train)
    if case.serve.adapter == "merged":
        train.phase(1, "merge", 1.4)
        train.write(0, "merge", duration_s=1.4, peak_rss_bytes=900 * MIB, path="artifacts/merged")
    finish(train, case.train.devices)
    serve.clock = train.clock + 2
    run_serving(serve, [(case_id(case), case.serve)])
    finish(serve, 1)
    return _record(case, [train, serve], [_outcome(train), _outcome(serve, start=train.clock + 2)])


def probe_case(**changes: Any) -> ProbeCase:
    """Two ranks over gloo and two sizes, with `changes`."""
    return ProbeCase(**({"device": "cpu", "sizes_bytes": (1024, 2**20), "iterations": 4} | changes))


def measured_probe(case: ProbeCase, folder: Path, late: int | None = None) -> Record:
    """A probe that went well."""
    script = _script(folder, case)
    run_probe(script, case, late=late)
    return _record(case, [script], [_outcome(script)])


def failed_oom(folder: Path, seed: int = 0) -> Record:
    """GPU memory ran out in the backward pass of rank 1; rank 0 lost its peer."""
    case = train_case(variant="nano-9b-v2", device="cuda", devices=2, strategy="ddp", seq_len=8192, micro_batch=2)
    script = _script(folder, case, seed=seed)
    set_up_training(script, case)
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
    set_up_training(script, case)
    script.begin(2, "train")
    for step in range(1, 7):
        run_step(script, case, step)
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
    set_up_training(script, case)
    script.begin(2, "train")
    for step in range(1, 9):
        run_step(script, case, step)
    script.write(0, "step", step=9, warmup=False, start=script.clock, step_time_s=0.2, tokens=256, loss=1.4)
    script.clock += 61
    return _record(case, [script], [_outcome(script, exit_code=None, signal=15, stalled=True)], "waiting\n")


def failed_hostile(folder: Path, seed: int = 0) -> Record:
    """An exception whose text is out to break a page."""
    case = train_case(seq_len=128)
    script = _script(folder, case, seed=seed)
    set_up_training(script, case)
    script.begin(1, "train")
    script.write(0, "note", text=HOSTILE)
    script.write(0, "error", phase="train", type="ValueError", message=HOSTILE, traceback=f"ValueError: {HOSTILE}")
    return _record(case, [script], [_outcome(script, exit_code=1)], f"ValueError: {HOSTILE}\n" * 3)


def failed_serve(folder: Path, seed: int = 0) -> Record:
    """A server whose cache does not hold one request."""
    case = serve_case(max_model_len=131_072)
    script = _script(folder, case, seed=seed)
    start_ranks(script, case, 1)
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
            "probe": measured_probe(probe_case(), folder),
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
