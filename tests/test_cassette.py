"""Recorded runs replayed through the whole pipeline, with no environment, GPU or network: the same numbers again."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from harness import pipeline, store
from harness.errors import HarnessError
from harness.schema import ProbeCase, Record
from harness.session import Options
from harness.summary import summarize

CASSETTES = Path(__file__).parent / "cassettes"
NAMES = ("cpu", "h200", "h200-serve", "h200x2-ddp", "h200x2-fsdp", "probe", "h200x2-probe")


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pipeline.Result]:
    """Each cassette played once, where no environment is installed."""
    patch = pytest.MonkeyPatch()
    patch.setenv("HARNESS_ENVS", "/nonexistent")
    patch.setattr(pipeline, "POLL_S", 0.0)
    runs = tmp_path_factory.mktemp("runs")
    found = {name: pipeline.run(CASSETTES / name / "matrix.yaml", options(name, runs)) for name in NAMES}
    patch.undo()
    return found


def options(name: str, runs: Path) -> Options:
    return Options(runs=runs / name, backend=f"replay:{CASSETTES / name}")


def recorded(name: str) -> dict[str, Record]:
    return {record.case_id: record for record in store.Run(CASSETTES / name).records()}


@pytest.mark.parametrize("name", NAMES)
def test_a_replay_gives_the_recorded_statuses_and_numbers(replayed: dict[str, pipeline.Result], name: str) -> None:
    before = recorded(name)
    assert {record.case_id: record.status for record in replayed[name].records} == {
        record.case_id: record.status for record in before.values()
    }
    for record in replayed[name].records:
        assert summarize(record) == summarize(before[record.case_id])
        if record.last:
            then = before[record.case_id].last
            assert then is not None
            assert record.last.observation.ranks == then.observation.ranks
            assert [job.outcome for job in record.last.jobs] == [job.outcome for job in then.jobs]


@pytest.mark.parametrize("name", NAMES)
def test_replayed_numbers_are_labelled_and_know_where_they_were_measured(
    replayed: dict[str, pipeline.Result], name: str
) -> None:
    for record in replayed[name].records:
        if record.status == "skipped":
            continue
        then = recorded(name)[record.case_id].provenance
        assert then is not None
        assert record.provenance == then.model_copy(update={"number_kind": "replayed", "backend": "replay"})
    page = replayed[name].page.read_text()
    assert "replayed" in page


def test_the_cpu_cassette_has_every_kind_of_case_and_a_failure() -> None:
    records = recorded("cpu").values()
    assert {record.case.kind for record in records if record.status == "measured"} == {"train", "serve", "chain"}
    assert {"ddp", "fsdp", "none"} <= {getattr(record.case, "strategy", "none") for record in records}
    assert Counter(record.status for record in records) == {"measured": 10, "failed": 1, "skipped": 3}


def test_the_failure_is_diagnosed_again_from_its_recorded_files(replayed: dict[str, pipeline.Result]) -> None:
    (failed,) = replayed["cpu"].failed
    assert failed.last is not None
    assert failed.last.diagnosis is not None
    assert failed.last.diagnosis.failure_class == "nan_loss"
    assert failed.last.diagnosis.culprit is not None
    assert failed.last.diagnosis.culprit.rank == 0


def test_the_communication_ladder_is_climbed_again_and_says_what_it_showed(
    replayed: dict[str, pipeline.Result],
) -> None:
    records = {record.case_id: record for record in replayed["probe"].records}
    first = next(record for record in records.values() if record.parent is None and record.status == "failed")
    debug = next(record for record in records.values() if record.parent == first.case_id)
    pinned = next(record for record in records.values() if record.parent == debug.case_id)
    assert [record.rung.name for record in (debug, pinned) if record.rung] == ["nccl_debug", "interface"]
    assert [record.status for record in (first, debug, pinned)] == ["failed", "failed", "measured"]
    assert first.last is not None
    assert first.last.diagnosis is not None
    assert first.last.diagnosis.failure_class == "nccl_bootstrap_net"
    assert "With the interface pinned to lo the all-reduce of 2 ranks completes" in first.last.diagnosis.showed
    assert first.last.diagnosis.next_step == "Set GLOO_SOCKET_IFNAME=lo for the job."
    assert pinned.ladder_end is not None
    assert "the choice of interface is the cause" in replayed["probe"].page.read_text()


def test_two_gpus_reduce_over_nvlink_and_without_p2p_over_host_memory(replayed: dict[str, pipeline.Result]) -> None:
    seen = {}
    for record in replayed["h200x2-probe"].records:
        summary = summarize(record)
        assert isinstance(record.case, ProbeCase)
        assert record.last is not None
        nccl = record.last.observation.nccl
        assert summary is not None
        assert summary.probe is not None
        assert summary.probe.bus_bytes_per_s is not None
        assert summary.probe.wrong == 0
        assert nccl is not None
        assert nccl.version == "2.28.9+cuda13.0"
        large = next(one for one in nccl.choices if one.collective == "AllReduce" and one.size_bytes == 2**30)
        chose = (large.algorithm, large.protocol, large.channels)
        seen[record.case.p2p] = (set(nccl.transports), nccl.paths, chose, summary.probe.bus_bytes_per_s)
    assert seen[True][:3] == ({"P2P/CUMEM"}, ("NVL",), ("RING", "SIMPLE", 24))
    assert seen[False][:3] == ({"SHM/direct/direct"}, ("PHB",), ("RING", "SIMPLE", 4))
    assert seen[True][3] > 10 * seen[False][3]


def test_gpu_memory_is_told_in_three_numbers(replayed: dict[str, pipeline.Result]) -> None:
    for record in replayed["h200"].records:
        summary = summarize(record)
        assert summary is not None
        assert summary.train is not None
        assert summary.train.memory_measure == "allocated"
        for row in summary.train.memory:
            assert row.allocated_bytes is not None
            assert row.reserved_bytes is not None
            assert row.device_used_bytes is not None
            assert row.allocated_bytes <= row.reserved_bytes <= row.device_used_bytes


def test_a_second_replay_keeps_all_and_a_measuring_run_will_not_mix(replayed: dict[str, pipeline.Result]) -> None:
    first = replayed["cpu"]
    again = pipeline.run(CASSETTES / "cpu" / "matrix.yaml", options("cpu", first.run.folder.parent.parent))
    assert [record.finished_at for record in again.records] == [record.finished_at for record in first.records]
    with pytest.raises(HarnessError, match="do not mix"):
        first.run.begin(first.run.plan(), backend="local", box="venv", environments=[])


def test_a_replay_of_what_is_no_run_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(HarnessError, match="no recorded run"):
        pipeline.run(CASSETTES / "cpu" / "matrix.yaml", Options(runs=tmp_path, backend=f"replay:{tmp_path}"))


def test_a_cassette_that_lacks_a_planned_case_says_which(tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(CASSETTES / "h200", cut)
    job = next(cut.glob("jobs/*9b*"))
    shutil.rmtree(job)
    with pytest.raises(HarnessError, match=re.escape(job.name.removesuffix(".1"))):
        pipeline.run(cut / "matrix.yaml", Options(runs=tmp_path / "runs", backend=f"replay:{cut}"))


def test_cassettes_are_small_and_tell_nothing_of_the_machine_they_were_recorded_on() -> None:
    files = [path for path in CASSETTES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_250_000
    for path in files:
        text = path.read_text()
        assert not re.search(r"/(?:work|tmp|root|home|opt|mnt)/", text), path
        assert not re.search(r"GPU-(?!00000000)[0-9a-f]{8}-", text), path
        assert not re.search(r"(?<![\d.\"])(?:10|172|192\.168)\.\d+\.\d+\.\d+", text), path


def test_two_gpus_each_hold_half_of_a_sharded_model(replayed: dict[str, pipeline.Result]) -> None:
    (record,) = replayed["h200x2-fsdp"].records
    assert record.last
    ranks = record.last.observation.ranks
    assert len(ranks) == 2
    summary = summarize(record)
    assert summary
    assert summary.train
    assert summary.train.peak
    whole, load = 17.8e9, [phase.allocated_bytes for phase in summary.train.memory if phase.phase == "load"]
    assert load
    assert all(one and one < 0.75 * whole for one in load), "no rank holds the whole model, at load either"
    assert summary.train.peak.allocated_bytes is not None
    assert summary.train.peak.allocated_bytes < whole
