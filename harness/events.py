"""The lines a payload may write: one JSON object a line, appended and flushed as things happen. Standard library only.

Each rank writes `events.rank<N>.jsonl` in the job directory (a serving job is rank 0). Every line has `kind`, `t` (Unix
seconds) and `m` (monotonic seconds of that host). Sizes are bytes, durations are seconds. A float that is not finite is
written as the string "nan", "inf" or "-inf", so that the file stays JSON and the fact is kept.

    start          rank, world_size, local_rank, pid, host, python, libraries {name: version},
                   versions_sha256 (of all that is installed; equal on every rank),
                   device {type, name, total_bytes}, baseline_rss_bytes
    phase          name, state "begin" or "end", duration_s (at the end); names: data, load, prepare, train, eval,
                   save, reload, merge; start_server, bench, smoke, stop_server; join, check, arrive, measure
    memory         phase (load, first_forward, backward, optimizer_step, eval, save, merge), peak_allocated_bytes,
                   peak_reserved_bytes, device_used_bytes, peak_rss_bytes; null where it does not apply
    proof          what really runs: trainable_parameters, total_parameters, parameters_by_layer_type,
                   trainable_by_layer_type, bytes_by_dtype_and_class, sharding, kernels, attention, loss_path,
                   adapter, optimizer, activation_checkpointing, memory_cap (null, or cap_bytes,
                   outside_torch_bytes, allowed_bytes, card_bytes); mismatches [sentence]
    step           step (from 1), warmup, start (Unix), step_time_s, data_wait_s, before_collective_s, tokens,
                   padded_tokens, loss, grad_norm, learning_rate
    eval           loss, duration_s
    save           bytes, files, writer_rank, duration_s
    reload         ok, max_abs_logit_difference, checks {name: bool}
    merge          duration_s, peak_rss_bytes, path
    nonfinite      step, what ("loss" or "grad_norm")
    server         argv, port, pid
    ready          ready_s, weights_bytes, kv_cache_bytes, kv_cache_tokens, facts {}
    load_point     case_id, and the fields of `schema.LoadPoint`
    smoke          case_id (null: holds for all of the job), and the fields of `schema.Smoke`
    server_memory  peak_rss_bytes
    check          name, ok, found, expected: a collective's known result; the element furthest off
    arrival        warmup, work_s [], wait_s []: rounds of a fixed piece of work, then an all-reduce
    collective     operation, size_bytes, warmup, timer, time_s []: each one after the warm-up
    alive          what: a sign of life where nothing else is said (server start, benchmark)
    note           text: something a person should know
    error          phase, type, message, traceback
    end            ok

An `error` line is always the last before a non-zero exit that the payload itself chose.
"""

from __future__ import annotations

import glob
import json
import math
import os
import re
import time
from collections.abc import Iterator
from typing import Any

FILE_NAME = "events.rank{rank}.jsonl"
_FILE = re.compile(r"events\.rank(\d+)\.jsonl$")


def file_of(job_dir: str, rank: int) -> str:
    """The event file of `rank` in `job_dir`."""
    return os.path.join(job_dir, FILE_NAME.format(rank=rank))


def files(job_dir: str) -> dict[int, str]:
    """Every rank's event file that exists in `job_dir`, by rank, in rank order."""
    found = {}
    for path in glob.glob(os.path.join(glob.escape(job_dir), FILE_NAME.format(rank="*"))):
        if match := _FILE.search(path):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def _plain(value: Any) -> Any:
    """`value` with floats that are not finite as strings, so that it is JSON."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


class EventLog:
    """Appends lines to one rank's file; each is on its way to the disk when `write` returns."""

    def __init__(self, job_dir: str, rank: int) -> None:
        self._file = open(file_of(job_dir, rank), "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the process

    def write(self, kind: str, **fields: Any) -> None:
        """Append one line; raises OSError where the disk is full."""
        line = {"kind": kind, "t": time.time(), "m": time.monotonic(), **_plain(fields)}
        self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._file.flush()


def read(path: str) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Line numbers (from 1) and events of a file that may be cut at any byte; `None` for a line that is no event."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                event = None
            yield number, event if isinstance(event, dict) and isinstance(event.get("kind"), str) else None
