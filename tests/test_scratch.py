"""Checkpoints on a local disk: where they lie, that they go, and the rung that moves them away from a slow one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fakes.stub_run import MATRIX, Bench, failure, status

from harness import host, launch, pipeline, schema, store
from harness.backends.slurm import script, site
from harness.backends.slurm.backend import Slurm
from harness.schema import Command, TrainCase, case_id

SLOW = MATRIX + "train:\n  - {method: lora, seq_len: 64, stall: 1, ladder: nccl}\n"
LOCAL = MATRIX + "train:\n  - {method: lora, seq_len: 64, checkpoints: local}\n"
SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system than the run's."""
    if not os.access(SHARED_MEMORY, os.W_OK) or SHARED_MEMORY.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this host has no second file system to write to")
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as folder:
        yield Path(folder)


# ---------------------------------------------------------------- where they lie


def test_local_checkpoints_lie_on_the_disk_named_and_go_with_the_record(bench: Bench, disk: Path) -> None:
    result = bench.run(LOCAL, scratch=disk, keep_artifacts=True)
    assert status(result.records) == {"measured": 1}
    (link,) = bench.directory.jobs_dir.glob("*/artifacts")
    assert link.is_symlink()
    assert (link / "checkpoint").read_text() == "weights"
    assert link.resolve().parent == disk
    assert link.resolve().stat().st_mode & 0o077 == 0
    bench.directory.tidy(link.parent.name.rpartition(".")[0], 1)
    assert list(disk.iterdir()) == []
    assert not link.is_symlink()


def test_a_box_may_write_where_the_checkpoints_lie(bench: Bench, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[schema.Job] = []
    wrap = bench.box.wrap

    def note(job: schema.Job, job_dir: Path, payload_root: Path) -> Command:
        seen.append(job)
        return wrap(job, job_dir, payload_root)

    monkeypatch.setattr(bench.box, "wrap", note)
    chain = "chain:\n  - train: {method: lora, seq_len: 64, checkpoints: local}\n    serve: {adapter: adapter}\n"
    bench.run(MATRIX + chain, scratch=disk)
    train, serve = seen
    assert [mount.writable for mount in train.mounts] == [True]
    assert serve.mounts == train.mounts  # it reads there what training left
    assert Path(train.mounts[0].path).parent == disk
    assert list(disk.iterdir()) == []


def test_killed_with_checkpoints_elsewhere_the_next_run_leaves_nothing(bench: Bench, disk: Path) -> None:
    bench.box.behaviour = [("*.1", {"step_s": 30})]

    def interrupt(progress: pipeline.Progress) -> None:
        if progress.running:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run(LOCAL, interrupt, scratch=disk)
    assert len(list(disk.iterdir())) == 1
    assert status(bench.run(LOCAL, scratch=disk).records) == {"measured": 1}
    assert list(disk.iterdir()) == []


def test_a_link_that_nobody_here_made_is_not_followed(tmp_path: Path) -> None:
    run, precious = store.Run(tmp_path / "run"), tmp_path / "precious"
    (precious / "folder").mkdir(parents=True)
    run.job_dir("job", 1).mkdir(parents=True)
    (run.job_dir("job", 1) / "artifacts").symlink_to(precious)
    run.tidy("job", 1)
    assert (precious / "folder").is_dir()


def test_without_a_disk_of_its_own_a_local_checkpoint_is_a_skip(bench: Bench) -> None:
    (record,) = bench.run(LOCAL, scratch=bench.folder).records
    assert record.skip_rule == "no_local_disk"
    assert "lies on the run directory's own file system" in str(record.skip_reason)


def test_what_is_a_local_disk_is_said_by_the_kernel(
    tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert host.apart(disk, tmp_path) is None
    assert host.file_system(disk) == "tmpfs"
    assert "no folder that can be written to" in str(host.apart(tmp_path / "absent", tmp_path))
    for kind in ("nfs4", "lustre", "fuse.sshfs"):
        monkeypatch.setattr(host, "file_system", lambda _, kind=kind: kind)
        assert f"lies on {kind}, which is no disk of this host" in str(host.apart(disk, tmp_path))


def test_a_process_cannot_give_each_of_its_cases_a_disk() -> None:
    case = TrainCase(variant="tiny-hybrid", method="lora", seq_len=64, device="cpu")
    assert launch.process_key(case)
    assert launch.process_key(case.model_copy(update={"checkpoints": "local"})) is None


# ---------------------------------------------------------------- the rung


def test_a_case_that_stalls_while_saving_is_run_again_with_local_checkpoints(bench: Bench, disk: Path) -> None:
    bench.box.behaviour = [("*", {"slow_in_run": 30})]
    result = bench.run(SLOW, scratch=disk)
    first, again = result.records
    assert (failure(first), first.last and first.last.diagnosis and first.last.diagnosis.phase) == ("stalled", "save")
    assert (again.status, again.parent) == ("measured", first.case_id)
    assert again.rung is not None
    assert (again.rung.name, [one.field for one in again.rung.change]) == ("local_checkpoints", ["checkpoints"])
    assert first.status == "failed"
    assert first.last is not None
    assert first.last.diagnosis is not None
    assert first.last.diagnosis.showed == (
        "With checkpoints on a local disk the case completes: the storage path is suspect."
    )
    assert list(disk.iterdir()) == []
    stamps = bench.stamps()
    bench.run(SLOW, scratch=disk)
    assert bench.stamps() == stamps


def test_on_one_file_system_the_rung_is_not_climbed(bench: Bench) -> None:
    bench.box.behaviour = [("*", {"slow_in_run": 30})]
    (record,) = bench.run(SLOW, scratch=bench.folder).records
    assert record.ladder_end is not None
    why = {one.rung: one.why for one in record.ladder_end.passed_over}
    assert "lies on the run directory's own file system" in why["local_checkpoints"]
    assert sum(bench.attempts().values()) == 1


def test_a_replay_needs_no_disk(bench: Bench, disk: Path) -> None:
    bench.box.behaviour = [("*", {"slow_in_run": 30})]
    bench.run(SLOW, scratch=disk)
    player = Bench(bench.folder / "played", bench.box)
    player.folder.mkdir()
    played = player.run(SLOW, backend=f"replay:{bench.directory.folder}", scratch=player.folder)
    assert [one.rung.name for one in played.records if one.rung] == ["local_checkpoints"]


# ---------------------------------------------------------------- on a cluster

CASE = TrainCase(variant="tiny-hybrid", method="lora", seq_len=64, device="cpu", devices=4, strategy="ddp",
                 checkpoints="local")  # fmt: skip
PLACE = site.Site(version=1, runs="/shared", nodes=4, scratch="/local")


def text(case: TrainCase, place: site.Site = PLACE) -> str:
    (job,) = launch.jobs((case,), 1)
    return script.text(
        script.Order(job=job, argv=job.argv, env={}, job_dir="/shared/run/jobs/j.1", name="j", site=place)
    )


def test_a_site_without_a_scratch_disk_cannot_write_there() -> None:
    (job,) = launch.jobs((CASE,), 1)
    bare = PLACE.model_copy(update={"scratch": None})
    assert "names none (scratch)" in str(Slurm(bare, "site").lacking(job))
    assert Slurm(PLACE, "site").lacking(job) is None


def test_ranks_of_several_nodes_find_their_checkpoints_under_one_name_on_each() -> None:
    wide = CASE.model_copy(update={"nodes": 2})
    local, shared = text(wide), text(wide.model_copy(update={"checkpoints": "run"}))
    assert 'ln -s "$artifacts" artifacts' in local
    assert local.index("artifacts=$scratch_root/") < local.index('if [ "${1:-}" = on-node ]')  # before either part
    assert 'rm -rf "$scratch" "$artifacts"' in local
    assert "$artifacts" not in shared
    assert text(CASE) == text(CASE.model_copy(update={"checkpoints": "run"})).replace(
        case_id(CASE.model_copy(update={"checkpoints": "run"})), case_id(CASE)
    )


def test_the_id_says_so_and_no_other_id_changed() -> None:
    assert "-local-" in case_id(CASE)
    plain = CASE.model_copy(update={"checkpoints": "run"})
    assert case_id(plain) == case_id(
        TrainCase.model_validate_json(json.dumps(plain.model_dump(exclude={"checkpoints"})))
    )
