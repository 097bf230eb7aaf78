"""What a vLLM server says of itself: text of its log -> values, `None` where nothing is stated. Pure.

Wordings of vLLM 0.10 to 0.32, CUDA and CPU builds: worker/gpu_model_runner.py, worker/gpu_worker.py,
worker/cpu_worker.py, engine/core.py and core/kv_cache_utils.py below vllm/v1/, compilation/monitor.py and
platforms/interface.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 2**30

_WEIGHTS = re.compile(r"Model loading took ([\d.]+) (GiB|GB)(?: memory)? and ([\d.]+) s")
_KV_GPU = re.compile(r"Available KV cache memory: (-?[\d.]+) (GiB|GB)")
_KV_CPU = re.compile(r"(?:Explicitly|Auto) set \(([\d.]+)/[\d.]+\) (GiB|GB) for KV cache")
_KV_TOKENS = re.compile(r"\b[\w +]+ KV cache size: ([\d,]+) tokens")
_CONCURRENCY = re.compile(r"Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x")
_ARCHITECTURE = re.compile(r"Resolved architecture: (\w+)")
_ENGINE = re.compile(r"init engine \(.*?\) took ([\d.]+) s")
_COMPILE = re.compile(r"torch\.compile (?:took|takes) ([\d.]+) s")
_COMPILE_IN_ALL = re.compile(r"init engine \(.*?\) took [\d.]+ s(?:econds)? \(compilation: ([\d.]+) s")
_PROFILE = re.compile(r"Initial profiling/warmup run took ([\d.]+) s")
_CAPTURE = re.compile(r"Graph capturing finished in ([\d.]+) secs?, took (-?[\d.]+) GiB")
_BLOCK = re.compile(r"Setting attention block size to (\d+) tokens")
_MAMBA_PADDING = re.compile(r"Padding mamba page size by ([\d.]+)%")
_ATTENTION = re.compile(r"Using ([A-Z0-9_]+)(?: attention)? backend\b")
_PREFIX = re.compile(r"^(?:\([^)]*pid=\d+\) )?(?:(?:INFO|WARNING|ERROR|DEBUG) \d\d-\d\d \d\d:\d\d:\d\d \[[^\]]*\] )?")
_EXCEPTION = re.compile(r"^(?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception)\b(?:: .*)?$")
_COUNT = re.compile(r"\d+ validation errors? for ")
_CASCADE = ("Engine core initialization failed", "Engine process failed", "WorkerProc initialization failed")


@dataclass(frozen=True)
class Stated:
    """What the server stated. Where several workers speak, a size is the largest of one worker's."""

    weights_bytes: int | None = None
    weights_bytes_by_worker: tuple[int, ...] = ()
    load_weights_s: float | None = None
    kv_cache_bytes: int | None = None
    kv_cache_tokens: int | None = None
    max_concurrency: float | None = None
    """Requests of the full model length that the cache holds at once."""
    init_engine_s: float | None = None
    compile_s: float | None = None
    """Of torch.compile; near 0 where its cache was warm."""
    profile_s: float | None = None
    """The first run, which finds out what the cache may have."""
    capture_graphs_s: float | None = None
    graphs_bytes: int | None = None
    """CUDA graphs of one worker, as the driver's free memory shrank."""
    attention_block_tokens: int | None = None
    """Tokens per cache block, made so large that an attention block is at least one Mamba state."""
    mamba_padding_percent: float | None = None
    """By how much a Mamba state is padded to the size of a cache block."""
    architecture: str | None = None
    attention_backend: str | None = None


def stated(text: str) -> Stated:
    """All that `text` states; printed sizes have two digits after the point, so they are good to 0.005 GiB."""
    weights = _WEIGHTS.findall(text)
    by_worker = tuple(_bytes(size, unit) for size, unit, _ in weights)
    cache = [_bytes(*found) for found in _KV_GPU.findall(text) or _KV_CPU.findall(text)]
    graphs = _CAPTURE.findall(text)
    tokens = [int(found.replace(",", "")) for found in _KV_TOKENS.findall(text)]
    return Stated(
        weights_bytes=max(by_worker, default=None),
        weights_bytes_by_worker=by_worker,
        load_weights_s=max((float(seconds) for _, _, seconds in weights), default=None),
        kv_cache_bytes=max(cache, default=None),
        kv_cache_tokens=min(tokens, default=None),
        max_concurrency=min((float(times) for _, times in _CONCURRENCY.findall(text)), default=None),
        init_engine_s=_number(_ENGINE, text),
        compile_s=_largest(_COMPILE_IN_ALL, text) or _largest(_COMPILE, text),
        profile_s=_largest(_PROFILE, text),
        capture_graphs_s=max((float(seconds) for seconds, _ in graphs), default=None),
        graphs_bytes=max((_bytes(size, "GiB") for _, size in graphs), default=None),
        attention_block_tokens=int(block) if (block := _word(_BLOCK, text)) else None,
        mamba_padding_percent=_number(_MAMBA_PADDING, text),
        architecture=_word(_ARCHITECTURE, text),
        attention_backend=_word(_ATTENTION, text),
    )


def first_error(text: str) -> str | None:
    """The first exception that `text` names, apart from those that only report another; vLLM logs the cause first."""
    lines = [_PREFIX.sub("", line).strip() for line in text.splitlines()]
    for index, line in enumerate(lines):
        if _EXCEPTION.match(line) and not any(word in line for word in _CASCADE):
            # pydantic's first line only counts the errors; the next two name them
            return " ".join(lines[index : index + 3] if _COUNT.search(line) else [line])[:500]
    return None


def tail(text: str, lines: int = 60) -> str:
    """The last `lines` lines of `text`."""
    return "\n".join(text.splitlines()[-lines:])


def _bytes(size: str, unit: str) -> int:
    return round(float(size) * (GIB if unit == "GiB" else 10**9))


def _number(pattern: re.Pattern[str], text: str) -> float | None:
    found = pattern.search(text)
    return float(found[1]) if found else None


def _largest(pattern: re.Pattern[str], text: str) -> float | None:
    return max(map(float, pattern.findall(text)), default=None)


def _word(pattern: re.Pattern[str], text: str) -> str | None:
    found = pattern.search(text)
    return found[1] if found else None
