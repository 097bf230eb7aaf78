"""From a matrix to records: every case ends in one record, and a run goes on where an earlier one stopped."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from fakes.stub_run import FOUR, FULL, MIXED, ONE_GPU, Bench, failure, status

from harness import host, pipeline, schema, store
from harness.errors import HarnessError
from harness.schema import Gpu, Record

# ---------------------------------------------------------------- one record each


def test_every_planned_case_ends_in_exactly_one_record(bench: Bench) -> None:
    bench.box.behaviour = [(FULL, {"fail_at_step": 2})]
    result = bench.run(MIXED)
    plan = bench.directory.plan()
    planned = [*plan.cases, *(skip.case for skip in plan.skips)]
    assert sorted(record.case_id for record in result.records) == sorted(map(schema.case_id, planned))
    assert len(bench.stamps()) == len(planned)
    assert status(result.records) == {"measured": 6, "failed": 2, "skipped": 1}
    assert all(record.skip_reason for record in result.records if record.status == "skipped")
    assert {failure(record) for record in result.failed} == {"app_exception"}
    assert all("a mistake of this case" in record.last.log_tail for record in result.failed if record.last)
    assert result.page.stat().st_size > 100_000


def test_load_points_of_one_server_share_its_start(bench: Bench) -> None:
    result = bench.run(MIXED, only="serve-*")
    jobs = {record.last.jobs[0].dir for record in result.records if record.status == "measured" and record.last}
    assert len(jobs) == 1
    assert sorted(record.case.concurrency for record in result.records if record.status == "measured") == [1, 4]


def test_a_chain_serves_what_its_own_attempt_trained_and_leaves_no_artifacts(bench: Bench) -> None:
    result = bench.run(MIXED, only="chain-*")
    chain = next(record for record in result.records if record.status == "measured")
    assert chain.last is not None
    assert [job.environment for job in chain.last.jobs] == ["train", "serve"]
    assert not list(bench.directory.folder.rglob("artifacts"))


def test_a_chain_whose_training_fails_starts_no_server(bench: Bench) -> None:
    bench.box.behaviour = [("chain-*-train.*", {"fail_at_step": 1})]
    chain = bench.run(MIXED, only="chain-*").failed[0]
    assert chain.last is not None
    assert len(chain.last.jobs) == 1
    assert not list(bench.directory.jobs_dir.glob("*-serve.*"))


# ---------------------------------------------------------------- resume


def test_a_second_run_starts_nothing_and_touches_no_record(bench: Bench) -> None:
    bench.box.behaviour = [(FULL, {"fail_at_step": 2})]
    bench.run(MIXED)
    before, started = bench.stamps(), bench.attempts()
    again = bench.run(MIXED)
    assert (bench.stamps(), bench.attempts()) == (before, started)
    assert len(again.kept) == 8
    assert status(again.records) == {"measured": 6, "failed": 2, "skipped": 1}


def test_retry_failed_measures_the_failed_again_and_remembers(bench: Bench) -> None:
    bench.box.behaviour = [(FULL, {"fail_at_step": 2})]
    bench.run()
    bench.box.behaviour = []
    result = bench.run(retry_failed=True)
    assert status(result.records) == {"measured": 4}
    assert sorted(bench.attempts().values()) == [1, 1, 2, 2]
    retried = next(record for record in result.records if len(record.attempts) > 1)
    assert [attempt.number for attempt in retried.attempts] == [1, 2]
    assert retried.attempts[0].diagnosis is not None
    assert retried.attempts[1].diagnosis is None


def test_an_interrupted_case_is_measured_by_the_next_run(bench: Bench) -> None:
    bench.box.behaviour = [("*", {"step_s": 30, "helper": True})]

    def interrupt(progress: pipeline.Progress) -> None:
        if any(bench.directory.jobs_dir.glob("*/events.rank0.jsonl")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run(watch=interrupt)
    assert bench.working() == []
    assert bench.stamps() == {}
    bench.box.behaviour = []
    assert status(bench.run().records) == {"measured": 4}
    assert sorted(bench.attempts().values()) == [1, 1, 1, 2]


def test_an_outcome_without_a_record_is_taken_up_not_run_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control plane ends between a job's outcome and its record."""
    bench.box.behaviour = [(FULL, {"fail_at_step": 2})]
    save = store.Run.save

    def die(run: store.Run, record: Record) -> None:
        if record.status != "skipped":
            raise KeyboardInterrupt
        save(run, record)

    for _ in range(2):  # after a measured one, and after a failed one
        monkeypatch.setattr(store.Run, "save", die)
        with pytest.raises(KeyboardInterrupt):
            bench.run(MIXED, only="train-*")
        monkeypatch.setattr(store.Run, "save", save)
        bench.run(MIXED, only="train-*-lora-*")
    result = bench.run(MIXED)
    assert status(result.records) == {"measured": 6, "failed": 2, "skipped": 1}
    assert set(bench.attempts().values()) == {1}


def test_new_load_points_are_measured_on_a_server_of_their_own(bench: Bench) -> None:
    bench.run(MIXED, only="serve-*-c1-*")
    result = bench.run(MIXED, only="serve-*")
    assert status(result.records) == {"measured": 2, "skipped": 1}
    assert [record.last.number for record in result.records if record.last] == [1, 2]


def test_what_the_matrix_no_longer_excludes_is_measured(bench: Bench) -> None:
    first = bench.run(FOUR.replace("128]}", "128], exclude: [{method: full}]}"))
    assert status(first.records) == {"measured": 2, "skipped": 2}
    assert status(bench.run().records) == {"measured": 4}


def test_an_attempt_left_behind_loses_its_artifacts(bench: Bench) -> None:
    bench.run(MIXED, only="chain-*", keep_artifacts=True)
    chain = next(record for record in bench.directory.records() if record.status == "measured")
    assert list(bench.directory.folder.rglob("artifacts"))
    bench.directory.record_path(chain.case_id).unlink()
    next(bench.directory.jobs_dir.glob("*-serve.1/outcome.json")).unlink()
    bench.run(MIXED, only="chain-*")
    assert sorted(bench.attempts().values()) == [2, 2]
    assert not list(bench.directory.folder.rglob("artifacts"))


# ---------------------------------------------------------------- lost jobs


def test_a_lost_job_is_tried_again_and_its_record_remembers(bench: Bench) -> None:
    bench.box.behaviour = [("*.1", {"lose": True})]
    result = bench.run(only="*-lora-s64-*")
    assert status(result.records) == {"measured": 1}
    assert [attempt.number for attempt in result.records[0].attempts] == [1, 2]
    assert result.records[0].attempts[0].jobs[0].outcome.lost
    assert bench.working() == []


def test_a_job_that_is_always_lost_is_recorded_after_so_many_tries(bench: Bench) -> None:
    bench.box.behaviour = [("*", {"lose": True, "helper": True})]
    result = bench.run(only="*-lora-s64-*")
    assert [failure(record) for record in result.records] == ["lost"]
    assert list(bench.attempts().values()) == [1 + pipeline.MAX_LOST]
    assert len(result.records[0].attempts) == 1 + pipeline.MAX_LOST
    assert bench.working() == []


# ---------------------------------------------------------------- devices


def gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    found = tuple(Gpu(index=n, name="GPU", uuid=f"GPU-{n}", total_bytes=2**34) for n in range(count))
    monkeypatch.setattr(host, "gpus", lambda: (found, "580.0" if found else None))


@pytest.mark.parametrize(
    ("setting", "indexes"),
    [(None, [0, 1, 2]), ("", []), ("2,0", [0, 2]), ("GPU-1", [1]), (" 1 ", [1]), ("-1", []), ("GPU-9", [])],
)
def test_a_gpu_that_the_environment_hides_is_not_ours(setting: str | None, indexes: list[int]) -> None:
    found = tuple(Gpu(index=n, name="GPU", uuid=f"GPU-{n}abc", total_bytes=2**34) for n in range(3))
    assert [gpu.index for gpu in host.visible(found, setting)] == indexes


def overlap(uses: list[tuple[float, float, str]]) -> list[tuple[str, str]]:
    """Devices of each two jobs that were at work at the same time."""
    return [
        (one[2], other[2])
        for index, one in enumerate(uses)
        for other in uses[index + 1 :]
        if other[0] < one[1] and one[0] < other[1]
    ]


def test_gpu_cases_are_skips_without_gpus_and_measured_once_there_are(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, 0)
    first = bench.run(ONE_GPU)
    assert status(first.records) == {"skipped": 4}
    assert {record.skip_reason for record in first.records} == {"needs 1 GPU; this host shows 0"}
    assert not bench.directory.jobs_dir.exists()
    gpus(monkeypatch, 2)
    second = bench.run(ONE_GPU)
    assert status(second.records) == {"measured": 4}
    assert all(len(record.provenance.gpus) == 2 for record in second.records if record.provenance)


def test_one_gpu_cases_run_side_by_side_and_never_share_a_gpu(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 4)
    bench.box.behaviour = [("*", {"step_s": 0.4})]
    two = "train: [{method: lora, strategy: ddp, devices: 2, seq_len: [64, 128]}, {method: lora, seq_len"
    bench.run(ONE_GPU.replace("train: [{method: lora, seq_len", two))
    uses = bench.uses()
    assert sorted(len(devices.split(",")) for _, _, devices in uses) == [1, 1, 1, 1, 2, 2]
    at_once = overlap(uses)
    assert len(at_once) >= 4
    assert all(not set(one.split(",")) & set(other.split(",")) for one, other in at_once)
    assert {gpu for _, _, devices in uses for gpu in devices.split(",")} == {"0", "1", "2", "3"}


def test_a_cpu_case_has_the_host_to_itself(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(monkeypatch, 4)
    bench.box.behaviour = [("*", {"step_s": 0.1})]
    bench.run(FOUR + "  - {device: cuda, method: lora, seq_len: [64, 128]}\n")
    uses = bench.uses()
    assert len(uses) == 6
    assert [pair for pair in overlap(uses) if "" in pair] == []


# ---------------------------------------------------------------- a full disk


def test_a_disk_that_is_full_at_a_record_costs_no_finished_case(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.box.behaviour = [("*-full-s64-*.1", {"fail_at_step": 2})]
    write = store.write_atomically
    room = [3]

    def full(path: Path, text: str) -> None:
        if path.name == "record.json":
            room[0] -= 1
            if room[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, text)

    for expected in (3, 2):
        room[0] = expected - 1
        monkeypatch.setattr(store, "write_atomically", full)
        with pytest.raises(HarnessError, match="full") as raised:
            bench.run()
        monkeypatch.setattr(store, "write_atomically", write)
        assert "finished cases are kept" in raised.value.hint
    before = bench.stamps()
    assert len(before) == 3
    result = bench.run()
    assert before.items() <= bench.stamps().items()
    assert status(result.records) == {"measured": 4}
