"""vLLM's own serving benchmark: its command line, and its result file -> the fields of a load point."""

from __future__ import annotations

import math
import zlib
from typing import Any

PERCENTILES = (50, 95, 99)


def argv(python: str, case_id: str, case: dict[str, Any], *, base_url: str, model: str, tokenizer: str) -> list[str]:
    """The command of one load point; prompts differ between cases, so that no prefix cache carries over."""
    return [
        python, "-m", "vllm.entrypoints.cli.main", "bench", "serve",
        "--backend", "openai", "--base-url", base_url, "--endpoint", "/v1/completions",
        "--model", model, "--tokenizer", tokenizer,
        "--dataset-name", "random",
        "--random-input-len", str(case["input_len"]), "--random-output-len", str(case["output_len"]),
        "--num-prompts", str(case["requests"]), "--max-concurrency", str(case["concurrency"]),
        "--seed", str(prompt_seed(case_id, case)), "--ignore-eos",
        "--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", ",".join(map(str, PERCENTILES)),
        "--save-result", "--save-detailed", "--result-filename", result_name(case_id),
    ]  # fmt: skip


def prompt_seed(case_id: str, case: dict[str, Any]) -> int:
    """The benchmark's seed: the case's own, moved by its id."""
    return (int(case["seed"]) + zlib.crc32(case_id.encode())) % 2**31


def result_name(case_id: str) -> str:
    """The file in the job directory that keeps the raw values of every request."""
    return f"bench-{case_id}.json"


def load_point(case: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
    """The fields of `schema.LoadPoint`; latencies are `None` where no request was completed."""
    done = int(result.get("completed") or 0)
    after_first = done > 0 and int(case["output_len"]) > 1
    return {
        "concurrency": case["concurrency"],
        "input_len": case["input_len"],
        "output_len": case["output_len"],
        "requests": case["requests"],
        "completed": done,
        "failed": int(result.get("failed", case["requests"] - done)),
        "duration_s": _finite(result.get("duration")) or 0.0,
        "requests_per_s": _finite(result.get("request_throughput")) if done else None,
        "output_tokens": int(result.get("total_output_tokens") or 0),
        "output_tokens_per_s": _finite(result.get("output_throughput")) if done else None,
        "total_tokens_per_s": _finite(result.get("total_token_throughput")) if done else None,
        "ttft": _latency(result, "ttft") if done else _latency({}, "ttft"),
        "tpot": _latency(result, "tpot") if after_first else _latency({}, "tpot"),
        "itl": _latency(result, "itl") if after_first else _latency({}, "itl"),
    }


def fault(point: dict[str, Any], result: dict[str, Any]) -> str | None:
    """Why this is no measurement, or `None`. The benchmark exits 0 even when every request failed."""
    first = next((str(error) for error in result.get("errors") or () if error), "")
    reason = f"; the first failure: {first.strip().splitlines()[-1][:300]}" if first.strip() else ""
    if point["failed"] > 0:
        return f"{point['failed']} of {point['requests']} requests failed{reason}"
    if point["completed"] != point["requests"]:
        return f"{point['completed']} of {point['requests']} requests were completed{reason}"
    return "no token was generated" if point["output_tokens"] <= 0 else None


def _latency(result: dict[str, Any], name: str) -> dict[str, float | None]:
    """Mean and percentiles in seconds; the benchmark states milliseconds."""
    keys = {"mean_s": f"mean_{name}_ms", **{f"p{rank}_s": f"p{rank}_{name}_ms" for rank in PERCENTILES}}
    found = {field: _finite(result.get(key)) for field, key in keys.items()}
    return {field: None if value is None else value / 1000 for field, value in found.items()}


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
