"""Verdicts over texts, and lines that libraries print, for tests of triage."""

from __future__ import annotations

from pathlib import Path

from harness.schema import LogVerdict
from harness.triage import triage

OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. "
    "GPU {gpu} has a total capacity of 9.00 GiB of which 1.00 GiB is free."
)
WAITED = (
    "[rank{rank}]:[E301 10:30:0{rank}.0 x.cpp:1] [Rank {rank}] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=7, OpType=ALLREDUCE, NumelIn=4, NumelOut=4, Timeout(ms)=600000) "
    "ran for 600010 milliseconds before timing out."
)


def of(tmp_path: Path, **files: str) -> LogVerdict:
    """The verdict over files of this text, by name."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return triage([tmp_path])
