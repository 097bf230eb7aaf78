"""GPU-seconds of a run: each job once, whoever shares it."""

from __future__ import annotations

from typing import Any

import pytest

from harness.schema import Attempt, JobRun, Observation, Outcome, Record, TrainCase, case_id
from harness.summary.gpu_time import gpu_time


def record(seq_len: int, *jobs: tuple[str, float, float], **fields: Any) -> Record:
    case = TrainCase(variant="nano-9b-v2", method="lora", seq_len=seq_len, lora_targets=("in_proj",), **fields)
    runs = tuple(JobRun(job_id=name, environment="train", dir=f"jobs/{name}.1", outcome=Outcome(start=start, end=end))
                 for name, start, end in jobs)  # fmt: skip
    attempts = (Attempt(number=1, jobs=runs, observation=Observation()),) if runs else ()
    status: Any = "measured" if runs else "skipped"
    return Record(case_id=case_id(case), case=case, status=status, attempts=attempts, finished_at=1.0)


def test_a_job_counts_once_for_all_its_cases_and_for_each_of_its_gpus() -> None:
    shared = ("shared", 100.0, 220.0)
    found = gpu_time([record(64, shared), record(128, shared), record(256, shared),
                      record(64, ("two", 0.0, 30.0), devices=2, strategy="ddp"), record(512)])  # fmt: skip
    assert found is not None
    assert (found.gpu_seconds, found.cases) == (180.0, 4)
    assert found.per_case_s == pytest.approx(45.0)


def test_a_run_on_a_cpu_costs_no_gpu_time() -> None:
    assert gpu_time([record(64, ("job", 0.0, 9.0), device="cpu"), record(128)]) is None
