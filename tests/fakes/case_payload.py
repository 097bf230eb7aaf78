"""A payload that says at once what a real one would say of the cases in `job.json`. Standard library + events.

Every number is invented. The variable FAKE, a JSON object, changes the defaults below.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

from harness.events import EventLog

DEFAULTS: dict[str, Any] = {
    "step_s": 0.0,
    "fail_at_step": None,  # raises, as a mistake in the case would
    "come_to": None,  # of cases that share its process, as many
    "lose": False,  # its supervisor is killed at the first step
    "helper": False,  # starts a child in a session of its own, which outlives it
    "write_bytes": 0,  # into a file, at the first step
    "room": None,  # runs out of memory at the first step where micro_batch * seq_len tokens are more
    "gpu": None,  # bytes: `stored` by dtype and class, `load`, `peak`, and `allowed`, beyond which memory runs out
    "slow_in_run": 0.0,  # seconds that a checkpoint takes where it is written into the job directory
    "oom": "CUDA out of memory. Tried to allocate 96.00 MiB.",  # what it says then
}
FAKE = DEFAULTS | json.loads(os.environ.get("FAKE", "{}"))


def train(job: dict[str, Any], case: dict[str, Any]) -> None:
    ranks = range(case["devices"])
    logs = [EventLog(".", rank) for rank in ranks]
    for rank, log in enumerate(logs):
        log.write("start", rank=rank, world_size=len(ranks), pid=os.getpid(), libraries={"torch": "0.0"})
    gpu = FAKE["gpu"]
    logs[0].write("proof", trainable_parameters=7, mismatches=[], **(on_gpu(logs[0], gpu) if gpu else {}))
    for step in range(1, case["steps"] + 1):
        misbehave(step)
        too_long = FAKE["room"] is not None and case["micro_batch"] * case["seq_len"] > FAKE["room"]
        if too_long or (gpu and gpu["peak"] > gpu["allowed"]):
            logs[0].write("error", phase="train", type="OutOfMemoryError", message=FAKE["oom"], traceback="")
            sys.exit(1)
        for log in logs:
            log.write("step", step=step, start=time.time(), step_time_s=0.5, tokens=64, padded_tokens=64,
                      loss=2.0 / step, grad_norm=1.0)  # fmt: skip
    if gpu:
        logs[0].write("memory", phase="backward", peak_allocated_bytes=gpu["peak"])
    logs[0].write("eval", loss=1.0, duration_s=0.1)
    for log in logs:
        log.write("phase", name="save", state="begin")
    os.makedirs("artifacts", exist_ok=True)
    time.sleep(0 if os.path.islink("artifacts") else FAKE["slow_in_run"])
    with open("artifacts/checkpoint", "w") as file:
        file.write("weights")
    logs[0].write("save", bytes=10, files=1, writer_rank=0, duration_s=0.1)
    logs[0].write("reload", ok=True, max_abs_logit_difference=0.0, checks={})
    if job["keep"] != "none":
        os.makedirs("artifacts/adapter", exist_ok=True)
    if job["keep"] == "merged":
        logs[0].write("merge", duration_s=0.1, peak_rss_bytes=10, path="artifacts/merged")
    for log in logs:
        log.write("end", ok=True)


def on_gpu(log: EventLog, gpu: dict[str, Any]) -> dict[str, Any]:
    """What a capped payload proves of its GPU, once the model is there."""
    log.write("memory", phase="load", peak_allocated_bytes=gpu["load"])
    return {"bytes_by_dtype_and_class": gpu["stored"], "memory_cap": {"allowed_bytes": gpu["allowed"]}}


def share(job: dict[str, Any]) -> None:
    """Training cases one after the other, each in a directory of its own, as `payload/shared.py` does it."""
    for item in job["cases"][: FAKE["come_to"]]:
        os.makedirs(f"cases/{item['id']}/artifacts")
        with contextlib.chdir(f"cases/{item['id']}"):
            train({"keep": "none"}, item["case"])


def serve(job: dict[str, Any]) -> None:
    if (adapter := job["model"]["adapter"]) and not os.path.isdir(adapter):
        raise FileNotFoundError(adapter)
    log = EventLog(".", 0)
    log.write("start", rank=0, world_size=1, pid=os.getpid())
    if FAKE["room"] is not None and job["cases"][0]["case"]["max_model_len"] > FAKE["room"]:
        said = "No available memory for the cache blocks."
        log.write("error", phase="start_server", type="ValueError", message=said, traceback="")
        sys.exit(1)
    log.write("ready", ready_s=0.1)
    for item in job["cases"]:
        misbehave(1)
        case = item["case"]
        load = {name: case[name] for name in ("concurrency", "input_len", "output_len", "requests")}
        latency = {"mean_s": 0.1, "p50_s": 0.1, "p95_s": 0.2, "p99_s": 0.2}
        log.write("load_point", case_id=item["id"], **load, completed=case["requests"], failed=0, duration_s=1.0,
                  output_tokens=8, output_tokens_per_s=8.0, ttft=latency)  # fmt: skip
    log.write("smoke", case_id=None, ok=True, latency_s=0.1, generated_tokens=8, text="{}", checks={})
    log.write("end", ok=True)


def misbehave(step: int) -> None:
    if step == 1 and FAKE["helper"]:
        subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"], start_new_session=True)
    time.sleep(FAKE["step_s"])
    if step == 1 and FAKE["write_bytes"]:
        with open("large", "wb") as file:
            file.write(b"x" * FAKE["write_bytes"])
    if step == 1 and FAKE["lose"]:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)
    if step == FAKE["fail_at_step"]:
        raise ValueError("a mistake of this case")


def main() -> None:
    with open("job.json") as file:
        job = json.load(file)
    with open("used.json", "w") as file:
        json.dump({"begin": time.time(), "devices": os.environ.get("CUDA_VISIBLE_DEVICES", "")}, file)
    if job["role"] == "serve":
        serve(job)
    elif "cases" in job:
        share(job)
    else:
        train(job, job["case"])


if __name__ == "__main__":
    main()
