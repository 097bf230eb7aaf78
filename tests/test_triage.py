"""A failed case gets the class of what began it, evidence that stands in its log, and a next step.

The log lines here are of our own wording around what a library prints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fakes import records
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from harness import observe
from harness.events import EventLog
from harness.logs import split
from harness.schema import Case, Diagnosis, Observation, Outcome, Record, case_id
from harness.triage import diagnose
from harness.triage.advice import fill
from harness.triage.hits import in_log
from harness.triage.signature import signatures

CASE = records.train_case(devices=2, strategy="ddp", micro_batch=2)
SERVE = records.serve_case()
FAILED = Outcome(exit_code=1, start=1.0, end=2.0)
TAXONOMY = {
    "oom_gpu_load", "oom_gpu_forward", "oom_gpu_backward", "oom_gpu_optimizer", "oom_gpu_save_eval",
    "oom_gpu_contention", "oom_host", "serve_kv_cache", "serve_oom_profile", "coll_timeout", "peer_lost",
    "port_in_use", "dep_missing_abi", "quant_setup", "peft_config", "model_unsupported", "shard_dtype",
    "ckpt_load_mismatch", "data_format", "storage_full", "hub_access", "app_exception", "nan_loss",
    "terminated_external", "unknown", "not_as_requested", "stalled", "interrupted", "lost", "no_failure",
    "nccl_bootstrap_net", "nccl_shm", "nccl_ib", "nccl_invalid_usage", "nccl_unhandled", "rdzv_timeout",
    "coll_mismatch", "cuda_illegal", "hw_gpu_fault", "driver_runtime", "parallel_config",
}  # fmt: skip

TRACE = "Traceback (most recent call last):\n"
OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 96.00 MiB. GPU 0 has a total capacity of 9.00 GiB"


def frames(*names: str) -> str:
    """A traceback through functions of these names."""
    return TRACE + "".join(f'  File "some/{name}.py", line 7, in {name}\n    {name}(x)\n' for name in names)


FOLDER = Path(__file__).parent / "signatures"
YAML_FILES: dict[str, dict[str, list[dict[str, str]]]] = {
    name: YAML(typ="safe").load(FOLDER / f"{name}.yaml") for name in ("logs", "events")
}
ANY_LOGS = [FOLDER / f"{name}.yaml" for name in ("any", "hosts", "devices", "setup")]
LOGS = [(name, log["hits"], log["misses"]) for name, logs in YAML_FILES["logs"].items() for log in logs]
EVENTS = [(name, event) for name, events in YAML_FILES["events"].items() for event in events]


def error(rank: int = 0, t: float = 100.0, **fields: str) -> dict[str, Any]:
    """An `error` event as an observation holds it."""
    return {"rank": rank, "t": t, "phase": None, "type": "", "message": "", "traceback": "", "line": 9 + rank,
            "file": f"j.1/events.rank{rank}.jsonl", **fields}  # fmt: skip


def failed(case: Case, *errors: dict[str, Any], log: str = "", outcome: Outcome = FAILED) -> Diagnosis:
    """The diagnosis of a job that left these errors and this log."""
    found = diagnose(case, [outcome], Observation(errors=errors), log)
    assert found
    return found


# ---------------------------------------------------------------- signatures


@pytest.mark.parametrize(("expected", "hits", "misses"), LOGS)
def test_a_log_that_hits_and_one_that_must_not(expected: str, hits: str, misses: str) -> None:
    case = SERVE if expected.startswith("serve_") else CASE
    found = failed(case, log=hits)
    assert found.failure_class == expected
    assert found.class_status == "supported"
    assert failed(case, log=misses).failure_class != expected


@pytest.mark.parametrize(("expected", "event"), EVENTS)
def test_an_error_event_is_enough(expected: str, event: dict[str, str]) -> None:
    case = SERVE if event["phase"] in ("start_server", "smoke") else CASE
    found = failed(case, error(rank=1, **event))
    assert found.failure_class == expected
    assert found.phase == event["phase"]
    assert found.class_status == "established"
    assert found.evidence[0].line == 10


def test_every_signature_has_a_log_or_an_event_that_hits_it() -> None:
    hit = {hit.signature for _, log, _ in LOGS for hit in in_log(log)}
    text = [value for _, event in EVENTS for value in event.values()]
    said = "\n".join(path.read_text() for path in ANY_LOGS)
    for signature in signatures():
        found = signature in hit or any(signature.pattern.search(value) for value in (*text, said))
        assert found, signature


def test_every_class_is_of_the_taxonomy_and_every_next_step_can_be_said() -> None:
    for signature in signatures():
        assert signature.failure_class in TAXONOMY
        assert fill(signature.next[-1], {"variant": "x"}), f"{signature.failure_class}: the last resort needs a value"
        assert fill(signature.summary, {"variant": "x"})


def test_healthy_noise_is_no_signature() -> None:
    noise = """
Using the `WANDB_DISABLED` environment variable is deprecated
/x/torch/nn/parallel/distributed.py:2: UserWarning: find_unused_parameters=True was specified in DDP constructor
[x] `scan` is falling back to its reference PyTorch implementation because `mamba_ssm` is not installed.
(EngineCore pid=7) INFO 01-01 [core.py:1] Initializing a V1 LLM engine (v0.32.0) with config: trust_remote_code=False
The fast path is not available because one of `(selective_state_update, causal_conv1d_fn)` is None.
[W] Warning: WARNING: destroy_process_group() was not called before program exit
WARNING 01-01 [cpu.py:3] Failed to import from vllm._C with ModuleNotFoundError("No module named 'vllm._C'")
INFO 01-01 [kv_cache_utils.py:9] GPU KV cache size: 58,240 tokens
INFO:     127.0.0.1:4000 - "POST /v1/completions HTTP/1.1" 200 OK
resource_tracker: There appear to be 1 leaked shared_memory objects to clean up at shutdown
{'loss': '2.31', 'grad_norm': '0.9', 'learning_rate': '0.0002'}
"""
    assert in_log(noise) == []


# ---------------------------------------------------------------- cause before consequence


def test_the_earliest_initiating_error_wins_over_what_came_of_it() -> None:
    cause = error(1, 105.0, phase="train", type="OutOfMemoryError", message=OOM, traceback=frames("run_backward"))
    early_end = error(0, 101.0, phase="train", type="RuntimeError", message="Connection closed by peer [10.0.0.2]:1")
    found = failed(CASE, early_end, cause, log="W: Sending process 7 closing signal SIGTERM\nBroken pipe")
    assert found.failure_class == "oom_gpu_backward"
    assert found.culprit
    assert found.culprit.rank == 1


def test_an_unknown_error_that_came_first_beats_a_known_one() -> None:
    first = error(1, 100.0, phase="train", type="KeyError", message="'labels'")
    later = error(0, 102.0, phase="train", type="OutOfMemoryError", message=OOM)
    found = failed(CASE, later, first)
    assert (found.failure_class, found.culprit and found.culprit.rank) == ("app_exception", 1)


def test_what_all_ranks_say_has_no_culprit(tmp_path: Path) -> None:
    for rank in (0, 1):
        log = EventLog(str(tmp_path), rank)
        log.write("start", rank=rank)
        log.write("error", phase="train", type="KeyError", message="'labels'", traceback="")
        log._file.close()
    found = diagnose(CASE, [FAILED], observe.observe(CASE, [tmp_path]), "")
    assert found
    assert (found.failure_class, found.culprit, found.culprit_status) == ("app_exception", None, "unknown")


def test_a_set_up_that_suits_no_rank_has_no_culprit() -> None:
    assert failed(CASE, error(1, phase="prepare", type="TargetError", message="none")).culprit is None


def test_a_dying_server_gives_way_to_what_its_log_says() -> None:
    died = error(phase="start_server", type="ServerDied", message="the vLLM server ended with exit code 1")
    said = "(EngineCore) ValueError: No available memory for the cache blocks."
    log = f"==> j.1/server.log:5 <==\n(EngineCore) INFO fine\n{said}"
    found = failed(SERVE, died, log=log)
    assert found.failure_class == "serve_kv_cache"
    assert (found.evidence[0].file, found.evidence[0].line) == ("j.1/server.log", 6)
    assert found.next_step == "Lower max_model_len: 1024 -> 512."
    assert failed(SERVE, died).failure_class == "app_exception"


TABLE = """==> j.1/stderr.log:1 <==
harness.payload.train FAILED
Root Cause (first observed failure):
[0]:
  time      : 2026-01-01_00:00:00
  host      : node1
  rank      : 1 (local_rank: 1)
  exitcode  : {code} (pid: 4001)
"""


def test_a_killed_rank_is_named_by_the_launchers_table_and_not_by_its_survivor() -> None:
    survivor = error(0, phase="train", type="RuntimeError", message="[gloo] Connection closed by peer [127.0.0.1]:1")
    found = failed(CASE, survivor, log=TABLE.format(code=-9))
    assert found.failure_class == "peer_lost"
    assert found.culprit
    assert found.culprit.rank == 1
    assert ("j.1/stderr.log", 7) in [(line.file, line.line) for line in found.evidence]


def test_a_single_killed_process_is_only_likely_the_hosts_memory() -> None:
    found = failed(records.train_case(), outcome=Outcome(signal=9, start=1.0, end=2.0))
    assert (found.failure_class, found.class_status, found.cause_status) == ("oom_host", "supported", "hypothesis")
    known = failed(records.train_case(), outcome=Outcome(signal=9, host_oom_killed=True, start=1.0, end=2.0))
    assert (known.failure_class, known.class_status) == ("oom_host", "established")


def test_a_crash_is_the_applications() -> None:
    assert failed(CASE, log=TABLE.format(code=-11)).failure_class == "app_exception"
    assert failed(CASE, log=TABLE.format(code=-15)).failure_class == "terminated_external"


def test_an_exception_that_only_the_log_shows() -> None:
    log = f"==> j.1/stderr.log:3 <==\nstart\n{frames('step')}mypackage.OddError: no idea\n"
    found = failed(CASE, log=log)
    assert found.failure_class == "app_exception"
    assert found.evidence[0].text == "mypackage.OddError: no idea"
    assert (found.evidence[0].file, found.evidence[0].line) == ("j.1/stderr.log", 7)


def test_the_source_line_of_a_traceback_is_no_evidence() -> None:
    source = '    raise ValueError("No available memory for the cache blocks.")'
    log = f"{TRACE}{source}\nValueError: No available memory for the cache blocks."
    assert [line.line for line in failed(SERVE, log=log).evidence] == [3]
    assert failed(SERVE, log=f"{TRACE}{source}\nKeyError: 1").failure_class == "app_exception"


# ---------------------------------------------------------------- how it ended


@pytest.mark.parametrize(
    ("flag", "expected"),
    [("interrupted", "interrupted"), ("stalled", "stalled"), ("timed_out", "terminated_external"), ("lost", "lost")],
)
def test_how_the_job_ended_decides_where_nothing_began_it(flag: str, expected: str) -> None:
    outcome = Outcome(**{"signal": 15, "start": 1.0, "end": 2.0, flag: True})
    torn_down = error(0, phase="train", type="RuntimeError", message="Connection closed by peer [127.0.0.1]:1")
    assert failed(CASE, torn_down, outcome=outcome).failure_class == expected
    cause = error(1, phase="train", type="OutOfMemoryError", message=OOM, traceback=frames("run_backward"))
    assert failed(CASE, cause, outcome=outcome).failure_class == (
        "interrupted" if flag == "interrupted" else "oom_gpu_backward"
    )


def test_a_time_limit_names_the_next_one() -> None:
    found = failed(CASE, outcome=Outcome(signal=15, timed_out=True, start=1.0, end=2.0))
    assert "3600 -> 7200" in found.next_step


@pytest.fixture(scope="module")
def named() -> dict[str, Record]:
    return records.named()


def test_all_that_was_asked_was_measured_and_only_then_is_there_no_diagnosis(named: dict[str, Record]) -> None:
    for name, record in named.items():
        if record.last:
            assert (record.last.diagnosis is None) == (not name.startswith("failed")), name
            assert record.status == ("failed" if record.last.diagnosis else "measured")


def test_what_is_measured_stays_so_however_the_process_ended(named: dict[str, Record]) -> None:
    record = named["serve_4"]
    assert record.last
    for outcome in (FAILED, Outcome(signal=9, start=1.0, end=2.0)):
        assert diagnose(record.case, [outcome], record.last.observation, OOM) is None


@pytest.mark.parametrize(
    ("name", "part", "change"),
    [
        ("lora", "train", {"eval_loss": None}),
        ("lora", "train", {"checkpoint_bytes": None}),
        ("lora", "train", {"reload_ok": None}),
        ("lora", "train", {"reload_ok": False}),
        ("lora", "train", {"proof": {}}),
        ("chain_merged", "train", {"merge_s": None}),
        ("chain_merged", "serve", {"smoke": None}),
        ("serve_4", "serve", {"load": None}),
        ("serve_4", "serve", {"ready_s": None}),
        ("serve_4", "serve", {"smoke": None}),
    ],
)
def test_an_end_without_error_is_no_success_where_something_is_missing(
    named: dict[str, Record], name: str, part: str, change: dict[str, Any]
) -> None:
    record = named[name]
    assert record.last
    seen = record.last.observation
    changed = seen.model_copy(update={part: getattr(seen, part).model_copy(update=change)})
    outcomes = [run.outcome for run in record.last.jobs]
    found = diagnose(record.case, outcomes, changed, "")
    assert found
    assert found.failure_class == "not_as_requested"
    assert found.next_step


@pytest.mark.parametrize(("field", "value"), [("failed", 1), ("output_tokens", 0), ("completed", 0)])
def test_a_load_point_with_failed_requests_or_no_tokens_is_no_measurement(
    named: dict[str, Record], field: str, value: int
) -> None:
    record = named["serve_4"]
    assert record.last
    assert record.last.observation.serve
    assert record.last.observation.serve.load
    load = record.last.observation.serve.load.model_copy(update={field: value})
    serve = record.last.observation.serve.model_copy(update={"load": load})
    found = diagnose(record.case, [FAILED], record.last.observation.model_copy(update={"serve": serve}), "")
    assert found
    assert found.failure_class == "not_as_requested"


def test_too_few_steps_or_a_rank_without_its_end_is_no_measurement(named: dict[str, Record]) -> None:
    record = named["fsdp"]
    assert record.last
    seen = record.last.observation
    ok = [Outcome(exit_code=0, start=1.0, end=2.0)]
    longer = record.case.model_copy(update={"steps": 21})
    wider = record.case.model_copy(update={"devices": 3})
    open_end = seen.model_copy(update={"ranks": (seen.ranks[0], seen.ranks[1].model_copy(update={"ended": False}))})
    for case, observation in ((longer, seen), (wider, seen), (record.case, open_end)):
        assert diagnose(case, ok, observation, "") is not None
    assert diagnose(record.case, ok, seen, "") is None


def test_a_proof_that_differs_fails_the_case(named: dict[str, Record]) -> None:
    record = named["fsdp"]
    assert record.last
    assert record.last.observation.train
    train = record.last.observation.train.model_copy(update={"proof_mismatches": ("fsdp asked, no DTensor found",)})
    found = diagnose(record.case, [FAILED], record.last.observation.model_copy(update={"train": train}), "")
    assert found
    assert found.failure_class == "not_as_requested"
    assert "no DTensor" in found.summary


@pytest.mark.parametrize(
    ("losses", "what", "rank", "status"),
    [
        ([2.0, None], "loss", 1, "established"),
        ([None, None], "loss", None, "unknown"),
        ([2.0, None], "grad_norm", None, "unknown"),
    ],
)
def test_a_nan_is_blamed_on_a_rank_only_where_the_others_were_finite(
    tmp_path: Path, losses: list[float | None], what: str, rank: int | None, status: str
) -> None:
    for number, loss in enumerate(losses):
        log = EventLog(str(tmp_path), number)
        log.write("step", step=7, loss=float("nan") if loss is None and what == "loss" else 1.0)
        if loss is None:
            log.write("nonfinite", step=7, what=what)
        log._file.close()
    found = diagnose(CASE, [FAILED], observe.observe(CASE, [tmp_path]), "")
    assert found
    assert found.failure_class == "nan_loss"
    assert (found.culprit.rank if found.culprit else None, found.culprit_status) == (rank, status)
    assert "0.0002 -> 2e-05" in found.next_step


# ---------------------------------------------------------------- whatever is given


def test_an_exhausted_rung_is_passed_over() -> None:
    event = error(phase="train", type="OutOfMemoryError", message=OOM, traceback=frames("run_backward"))
    no_batch = records.train_case(activation_checkpointing=False)
    assert "activation_checkpointing" in failed(no_batch, event).next_step
    assert failed(CASE, event).next_step.startswith("Halve micro_batch: 2 -> 1, with grad_accum: 1 -> 2")
    assert failed(records.train_case(), event).next_step == "Halve seq_len: 256 -> 128."
    assert failed(records.train_case(seq_len=8), event).next_step == "Take more devices with strategy fsdp."


PIECES = st.sampled_from(
    [log for _, log, _ in LOGS] + [TRACE, "==> x:3 <==", "==> :0 <==", "rank : 1", "exitcode : -9", "[rank1]: ", "\x00",
     "Root Cause (first observed failure):", TABLE.format(code=-9), "x" * 3000, "{seq_len}", "(?:", "\\", "KeyError: "]
)  # fmt: skip
TEXTS = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=6).map("\n".join))
ERRORS = st.lists(
    st.builds(error, st.integers(0, 3), st.floats(0, 1e10), phase=st.sampled_from(["train", "bench", ""]), type=TEXTS,
              message=TEXTS, traceback=TEXTS),
    max_size=3,
).map(tuple)  # fmt: skip
OUTCOMES = st.lists(
    st.builds(Outcome, exit_code=st.one_of(st.none(), st.integers(-20, 255)), signal=st.sampled_from([None, 9, 11, 15]),
              timed_out=st.booleans(), stalled=st.booleans(), host_oom_killed=st.booleans(), interrupted=st.booleans(),
              lost=st.booleans(), start=st.just(1.0), end=st.just(2.0)),
    max_size=2,
)  # fmt: skip


@settings(max_examples=150)
@given(st.sampled_from([CASE, SERVE, records.chain_case("merged")]), OUTCOMES, ERRORS, TEXTS)
def test_whatever_is_given_there_is_an_answer(case: Case, outcomes: list[Outcome], errors: Any, log: str) -> None:
    found = diagnose(case, outcomes, Observation(errors=errors), log)
    assert found
    assert found.failure_class in TAXONOMY
    assert found.next_step
    assert found.summary
    assert (found.culprit is None) == (found.culprit_status == "unknown")
    lines = {(line.file, line.number): line.text for line in split(log)}
    for quote in found.evidence:
        if not quote.file.endswith(".jsonl"):
            assert quote.text in lines[quote.file, quote.line]


def test_a_large_log_is_read_in_time() -> None:
    log = "[rank3]: INFO NET/IB : Using [0]mlx5_0:1/RoCE connection, optimizer.step KeyError\n" * 20_000
    assert failed(CASE, log=log + OOM).failure_class == "oom_gpu_forward"
    assert failed(CASE, log=log + frames("run_backward") + OOM).failure_class == "oom_gpu_backward"


def test_a_load_point_measured_before_the_server_died_is_a_measurement(tmp_path: Path) -> None:
    log = EventLog(str(tmp_path), 0)
    measured, lost = records.serve_case(concurrency=1), records.serve_case(concurrency=8)
    log.write("start", rank=0, world_size=1)
    log.write("ready", ready_s=30.0)
    log.write("smoke", case_id=None, ok=True, latency_s=0.4, generated_tokens=8, text="hm", checks={})
    point = {"concurrency": 1, "input_len": 8, "output_len": 8, "requests": 4, "completed": 4, "failed": 0}
    log.write("load_point", case_id=case_id(measured), duration_s=2.0, output_tokens=32, **point)
    log.write("error", phase="bench", type="ServerDied", message="ended by signal 9", traceback="")
    log._file.close()
    assert diagnose(measured, [FAILED], observe.observe(measured, [tmp_path]), "") is None
    assert diagnose(lost, [FAILED], observe.observe(lost, [tmp_path]), "") is not None
