"""Run directories: atomic, versioned, locked, bound to one environment."""

import json
import multiprocessing
from pathlib import Path

import pytest

from harness import schema, store
from harness.errors import HarnessError
from harness.schema import Environment, Plan, Record, TrainCase


def train_case(**fields: object) -> TrainCase:
    return TrainCase.model_validate(
        {"variant": "tiny-hybrid", "method": "lora", "seq_len": 64, "device": "cpu"} | fields
    )


def skipped(case: TrainCase) -> Record:
    return Record(
        case_id=schema.case_id(case), case=case, status="skipped", skip_rule="r", skip_reason="why", finished_at=1.0
    )


def plan_of(tmp_path: Path, *cases: TrainCase) -> Plan:
    source = tmp_path / "m.yaml"
    source.write_text("version: 1\n")
    return Plan(name="m", source=str(source), matrix_sha256="0" * 64, cases=cases, skips=())


def environment(digest: str, **libraries: str) -> Environment:
    return Environment(name="train", box="venv", digest=digest, pinned=True, python="3.11.7", libraries=libraries)


def test_a_record_reads_back_as_it_was_written(tmp_path: Path) -> None:
    run = store.Run(tmp_path / "m")
    record = skipped(train_case())
    run.save(record)
    assert run.record(record.case_id) == record
    assert not list(tmp_path.rglob("*.tmp"))


def test_records_stand_in_the_order_of_the_plan_and_strangers_come_last(tmp_path: Path) -> None:
    run = store.Run(tmp_path / "m")
    cases = [train_case(seq_len=n) for n in (256, 64, 128)]
    run.begin(plan_of(tmp_path, *cases[:2]), backend="local", box="venv", environments=[environment("sha256:a")])
    for case in reversed(cases):
        run.save(skipped(case))
    assert [record.case.seq_len for record in run.records()] == [256, 64, 128]


def test_a_run_goes_on_in_its_own_environment_only(tmp_path: Path) -> None:
    run, plan = store.Run(tmp_path / "m"), plan_of(tmp_path, train_case())
    run.begin(plan, backend="local", box="venv", environments=[environment("sha256:a", torch="2.12")])
    run.begin(plan, backend="local", box="venv", environments=[environment("sha256:a", torch="2.12")])
    with pytest.raises(HarnessError, match=r"torch 2\.12 -> 2\.13") as raised:
        run.begin(plan, backend="local", box="venv", environments=[environment("sha256:b", torch="2.13")])
    assert "--runs" in raised.value.hint


def test_a_newer_file_says_to_upgrade(tmp_path: Path) -> None:
    run = store.Run(tmp_path / "m")
    record = skipped(train_case())
    run.save(record)
    path = run.record_path(record.case_id)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 99, "later_field": 1}))
    with pytest.raises(HarnessError, match="version 99") as raised:
        run.record(record.case_id)
    assert "upgrade" in raised.value.hint


@pytest.mark.parametrize("cut", [0, 1, 40, -1])
def test_a_cut_record_is_one_clear_message(tmp_path: Path, cut: int) -> None:
    run = store.Run(tmp_path / "m")
    record = skipped(train_case())
    run.save(record)
    path = run.record_path(record.case_id)
    path.write_text(path.read_text()[:cut])
    with pytest.raises(HarnessError, match=r"record\.json: not a record"):
        run.record(record.case_id)


def _hold(folder: str, held: object, release: object) -> None:
    with store.Run(Path(folder)).locked():
        held.set()  # type: ignore[attr-defined]
        release.wait(30)  # type: ignore[attr-defined]


def test_a_second_control_plane_is_told_who_is_at_work(tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    held, release = spawn.Event(), spawn.Event()
    other = spawn.Process(target=_hold, args=(str(tmp_path / "m"), held, release))
    other.start()
    assert held.wait(30)
    run = store.Run(tmp_path / "m")
    assert run.owner() == other.pid
    with pytest.raises(HarnessError, match=f"pid {other.pid}"), run.locked():
        pass
    release.set()
    other.join(30)
    assert run.owner() is None
    with run.locked():
        pass


def test_a_folder_that_is_no_run_names_the_runs_beside_it(tmp_path: Path) -> None:
    store.Run(tmp_path / "real").begin(plan_of(tmp_path), backend="local", box="venv", environments=[])
    with pytest.raises(HarnessError) as raised:
        store.Run.existing(tmp_path / "rael")
    assert "real" in raised.value.hint


def test_the_staged_payload_is_what_the_digest_says(tmp_path: Path) -> None:
    package = Path(store.__file__).parent
    first = store.Run(tmp_path / "a").stage_payload(package)
    assert first == store.Run(tmp_path / "b").stage_payload(package)
    staged = {path.name for path in (tmp_path / "a" / "payload" / "harness").iterdir()}
    assert staged == {"__init__.py", "events.py", "payload"}


def test_tidying_drops_artifacts_and_packs_long_series(tmp_path: Path) -> None:
    run = store.Run(tmp_path / "m")
    folder = run.job_dir("job", 1)
    (folder / "artifacts" / "base").mkdir(parents=True)
    (folder / "events.rank0.jsonl").write_text('{"kind":"alive"}\n' * 20_000)
    (folder / "events.rank1.jsonl").write_text('{"kind":"alive"}\n')
    run.tidy("job", 1)
    assert sorted(path.name for path in folder.iterdir()) == ["events.rank0.jsonl.gz", "events.rank1.jsonl"]
    assert run.attempts("job") == [1]
