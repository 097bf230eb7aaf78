"""Training cases that share a process: which may, what their records say, and what a failure leaves to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes.stub_run import FOUR, MATRIX, Bench, failure, status

from harness import launch, observe, pipeline
from harness.errors import HarnessError
from harness.schema import Record, TrainCase, case_id

LENGTHS = MATRIX + "train:\n  - {method: lora, seq_len: [64, 128, 256, 512]}\n"
SHARED = "shared-*"


def case(**fields: Any) -> TrainCase:
    asked = {"variant": "nano-9b-v2", "method": "lora", "seq_len": 64, "lora_targets": ("in_proj",), **fields}
    return TrainCase.model_validate(asked)


def job_of(record: Record) -> str:
    assert record.last is not None
    return record.last.jobs[0].job_id


@pytest.mark.parametrize(
    ("changes", "shares"),
    [({"seq_len": 128}, True), ({"activation_checkpointing": False}, True), ({"repeat": 1}, True),
     ({"method": "qlora"}, False), ({"variant": "nano-12b-v2"}, False), ({"param_dtype": "fp32"}, False),
     ({"device": "cpu"}, False), ({"weights": "/models/own"}, False), ({"memory_cap_gib": 24}, False),
     ({"strategy": "ddp", "devices": 2}, False)],
)  # fmt: skip
def test_who_may_follow_whom_in_a_process(changes: dict[str, Any], shares: bool) -> None:
    both = (case(), case(**changes))
    assert len(launch.group(both, share=True)) == (1 if shares else 2)
    assert len(launch.group(both)) == 2


def test_a_shared_job_has_the_time_and_the_mounts_of_all_its_cases() -> None:
    first, second = case(data="/data/a.jsonl"), case(data="/data/b.jsonl", time_limit_s=60, stall_s=900)
    (job,) = launch.jobs((first, second), 1)
    assert (job.time_limit_s, job.stall_s) == (3660, 900)
    assert [mount.path for mount in job.mounts] == ["/data/a.jsonl", "/data/b.jsonl"]
    assert job.case_ids == (case_id(first), case_id(second))
    assert "harness.payload.shared" in job.argv
    assert launch.jobs((second, first), 1)[0].id != job.id


def test_like_cases_share_one_job_and_each_gets_its_own_numbers(bench: Bench) -> None:
    result = bench.run(FOUR, share_process=True)
    assert status(result.records) == {"measured": 4}
    jobs = {record.case.method: set() for record in result.records}  # type: ignore[union-attr]
    for record in result.records:
        jobs[record.case.method].add(job_of(record))  # type: ignore[union-attr]
        assert record.last
        assert len(record.last.observation.ranks[0].steps.step) == record.case.steps  # type: ignore[union-attr]
    assert [len(found) for found in jobs.values()] == [1, 1]
    assert sum(bench.attempts().values()) == 2
    assert not list(bench.directory.folder.rglob("artifacts"))
    assert bench.run(FOUR, share_process=True).kept == {record.case_id for record in result.records}


def test_after_a_failure_the_rest_is_measured_in_a_fresh_process(bench: Bench) -> None:
    bench.box.behaviour = [("*", {"room": 200})]
    result = bench.run(LENGTHS, share_process=True)
    by_length = {record.case.seq_len: record for record in result.records}  # type: ignore[union-attr]
    assert [by_length[length].status for length in (64, 128, 256, 512)] == ["measured", "measured", "failed", "failed"]
    assert {failure(by_length[length]) for length in (256, 512)} == {"oom_gpu_forward"}
    shared = {job_of(by_length[length]) for length in (64, 128, 256)}
    assert len(shared) == 1
    assert job_of(by_length[512]) == by_length[512].case_id


def test_what_a_process_did_not_come_to_is_measured_in_the_next(bench: Bench) -> None:
    bench.box.behaviour = [(SHARED, {"come_to": 1})]
    result = bench.run(LENGTHS, share_process=True)
    assert status(result.records) == {"measured": 4}
    assert len({job_of(record) for record in result.records}) == 4


def test_a_process_that_comes_to_nothing_ends(bench: Bench) -> None:
    bench.box.behaviour = [(SHARED, {"come_to": 0})]
    result = bench.run(LENGTHS, share_process=True)
    assert status(result.records) == {"measured": 1, "failed": 3}


def test_what_an_interrupted_process_had_finished_is_measured(bench: Bench) -> None:
    bench.box.behaviour = [(SHARED, {"step_s": 0.3})]

    def interrupt(progress: pipeline.Progress) -> None:
        ends = [path for path in bench.directory.jobs_dir.glob("*/cases/*/events.*") if '"end"' in path.read_text()]
        if len(ends) >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run(LENGTHS, interrupt, share_process=True)
    bench.box.behaviour = []
    result = bench.run(LENGTHS, share_process=True)
    assert status(result.records) == {"measured": 4}
    first = [record for record in result.records if len(record.attempts) == 1]
    assert [record.case.seq_len for record in first] == [64, 128]  # type: ignore[union-attr]
    assert len({job_of(record) for record in result.records}) == 2


def test_sharing_keeps_no_artifacts(bench: Bench) -> None:
    with pytest.raises(HarnessError, match="cannot keep artifacts"):
        bench.run(FOUR, share_process=True, keep_artifacts=True)


def test_a_warm_process_says_nothing_of_the_gpus_memory(tmp_path: Path) -> None:
    """The sampler sees all that a GPU holds, what the cases before left of it included."""
    samples = Path(__file__).parent / "cassettes/samples-h200/gpu.samples.node0.jsonl"
    for name, earlier in (("cold", 0), ("warm", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / samples.name).write_bytes(samples.read_bytes())
        start = {"kind": "start", "t": 1.0, "m": 1.0, "rank": 0, "earlier_cases": earlier}
        (tmp_path / name / "events.rank0.jsonl").write_text(json.dumps(start) + "\n")
    cold, warm = (observe.observe(case(), [tmp_path / name]) for name in ("cold", "warm"))
    assert cold.gpus[0].memory_max_bytes
    assert (warm.gpus[0].memory_max_bytes, set(warm.gpus[0].memory_used_bytes)) == (None, {None})
    assert warm.gpus[0].power_w == cold.gpus[0].power_w
    assert warm.train
    assert warm.train.earlier_cases == 2
    assert any("had measured other cases before" in note for note in warm.notes)
    assert not any("had measured other cases before" in note for note in cold.notes)
