"""What a run cost in GPU time: records -> GPU-seconds, and how many cases they decided. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from harness.schema import AnyCase, ChainCase, JobRun, Record


@dataclass(frozen=True)
class GpuTime:
    """GPU-seconds of all jobs from start to end, and the cases that a record of theirs says something of."""

    gpu_seconds: float
    cases: int

    @property
    def per_case_s(self) -> float:
        """GPU-seconds per decided case."""
        return self.gpu_seconds / self.cases


def gpu_time(records: Iterable[Record]) -> GpuTime | None:
    """Of the records that have jobs on GPUs; a job that several cases share counts once; `None` without any."""
    decided = [record for record in records if record.attempts and record.case.device == "cuda"]
    jobs = {(job.job_id, job.outcome.start): _gpu_seconds(record.case, job)
            for record in decided for attempt in record.attempts for job in attempt.jobs}  # fmt: skip
    return GpuTime(sum(jobs.values()), len(decided)) if jobs else None


def _gpu_seconds(case: AnyCase, job: JobRun) -> float:
    half = case if not isinstance(case, ChainCase) else case.serve if job.environment == "serve" else case.train
    return max(0.0, job.outcome.end - job.outcome.start) * half.devices
