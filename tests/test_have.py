"""`run --have DIR`: what was measured before, in such an environment and on such a device, is not measured again."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from fakes.stub_run import FOUR, FULL, MATRIX, MIXED, Bench, status, stubbed
from rich.console import Console

from harness import cli, evidence, host, pipeline
from harness.errors import HarnessError
from harness.report import terminal
from harness.schema import Environment, Gpu, TrainCase, case_id
from harness.session import Options

GPU_CASES = "version: 1\nname: small\ndefaults: {variant: tiny-hybrid, steps: 3, warmup_steps: 1}\ntrain:\n"
GPU_CASES += "  - {method: lora, seq_len: 64, memory_cap_gib: [24, null]}\n"


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return stubbed(tmp_path / "first", monkeypatch)


def again(bench: Bench, where: str = "second") -> Bench:
    """The same matrix in a folder with no runs."""
    folder = bench.folder.parent / where
    folder.mkdir()
    return Bench(folder, bench.box)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()


def gpus(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    found = (Gpu(index=0, name=name, uuid="GPU-0", total_bytes=2**37),)
    monkeypatch.setattr(host, "gpus", lambda: (found, "580.0"))


def digest(bench: Bench, monkeypatch: pytest.MonkeyPatch, **by_name: str) -> None:
    """Give environments these digests from now on."""

    def environment(name: Any, device: str = "cpu") -> Environment:
        found = by_name.get(name, "sha256:0")
        return Environment(name=name, box="stub", digest=found, pinned=False, python="3", libraries={})

    monkeypatch.setattr(bench.box, "environment", environment)


def test_what_stands_elsewhere_is_copied_as_it_is_and_not_measured(bench: Bench) -> None:
    bench.run(MIXED)
    second = again(bench)
    watched: list[Any] = []
    result = second.run(MIXED, watched.append, have=(bench.folder,))
    assert not second.directory.jobs_dir.exists()
    assert status(result.records) == {"measured": 8, "skipped": 1}
    assert result.kept == {record.case_id for record in result.records if record.status == "measured"}
    for name in result.kept:
        assert second.directory.record_path(name).read_bytes() == bench.directory.record_path(name).read_bytes()
    assert watched[-1].kept == result.kept
    third = second.run(MIXED)
    assert third.kept == result.kept


def test_only_what_is_missing_or_failed_there_is_measured(bench: Bench) -> None:
    bench.box.behaviour = [(FULL, {"fail_at_step": 2})]
    bench.run(FOUR)
    bench.box.behaviour = []
    second = again(bench)
    result = second.run(FOUR, have=(bench.runs,))
    assert len(result.kept) == 2
    assert all("-full-" in name for name in second.attempts())
    assert status(result.records) == {"measured": 4}


def test_another_environment_is_no_evidence_for_the_cases_that_run_in_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.run(MIXED)
    digest(bench, monkeypatch, serve="sha256:1")
    second = again(bench)
    kept = second.run(MIXED, have=(bench.folder,)).kept
    assert len(kept) == 5
    assert all(name.startswith("train-") for name in kept)


def test_evidence_is_of_the_same_type_of_gpu_and_a_capped_record_is_evidence(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, "NVIDIA H200")
    bench.run(GPU_CASES)
    assert len(again(bench, "same").run(GPU_CASES, have=(bench.folder,)).kept) == 2
    gpus(monkeypatch, "NVIDIA H100 80GB HBM3")
    assert not again(bench, "other").run(GPU_CASES, have=(bench.folder,)).kept


def test_a_number_of_another_processor_or_kind_is_no_evidence(bench: Bench) -> None:
    case = TrainCase(variant="tiny-hybrid", device="cpu", method="full", seq_len=64, lora_rank=0)
    bench.run(FOUR.replace("[lora, full]", "full").replace("[64, 128]", "64"))
    (record,) = bench.directory.records()
    assert record.provenance
    here = evidence.Place(record.provenance.environments, (), record.provenance.cpu)
    found = evidence.below((bench.folder,))
    assert isinstance(record.case, TrainCase)
    assert evidence.standing(record.case, found, here) == bench.directory.record_path(record.case_id)
    assert evidence.standing(case, found, here) is None
    elsewhere = evidence.Place(here.environments, (), "another processor")
    assert evidence.standing(record.case, found, elsewhere) is None
    replayed = record.provenance.model_copy(update={"number_kind": "replayed"})
    bench.directory.save(record.model_copy(update={"provenance": replayed}))
    assert evidence.standing(record.case, found, here) is None


def test_the_latest_of_several_records_is_kept(bench: Bench) -> None:
    bench.run(FOUR, only="*-full-s64-*")
    (record,) = bench.directory.records()
    other = again(bench, "other")
    other.directory.save(record.model_copy(update={"finished_at": record.finished_at + 9}))
    second = again(bench)
    second.run(FOUR, only="*-full-s64-*", have=(other.folder, bench.folder))
    (kept,) = second.directory.records()
    assert kept.finished_at == record.finished_at + 9


def test_a_dry_run_leaves_out_what_stands_elsewhere(bench: Bench) -> None:
    bench.run(FOUR, only="*-s64-*")
    second = again(bench)
    second.matrix.write_text(FOUR)
    _, cases = pipeline.pending(second.matrix, Options(runs=second.runs, box="stub", have=(bench.folder,)))
    assert {case.seq_len for case in cases if isinstance(case, TrainCase)} == {128}
    assert len(cases) == 2
    assert not second.runs.exists()


def test_what_ran_out_of_memory_stands_too_but_for_whoever_wants_failures_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(monkeypatch, "NVIDIA H200")
    text = MATRIX.replace("device: cpu", "device: cuda") + "train: [{method: lora, seq_len: [64, 128, 256]}]\n"
    bench.box.behaviour = [("*-s128-*", {"room": 100}), ("*-s256-*", {"fail_at_step": 2})]
    bench.run(text)
    kept = again(bench, "same").run(text, have=(bench.folder,)).kept
    assert sorted(name.split("-")[4] for name in kept) == ["s128", "s64"]
    kept = again(bench, "again").run(text, have=(bench.folder,), retry_failed=True).kept
    assert [name.split("-")[4] for name in kept] == ["s64"]


def test_a_folder_that_is_not_there_is_a_mistake(bench: Bench) -> None:
    with pytest.raises(HarnessError, match="no such folder"):
        bench.run(FOUR, have=(bench.folder / "absent",))
    assert not list(bench.runs.glob("small/jobs/*"))


def test_the_terminal_says_kept(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench.run(FOUR, only="*-s64-*")
    second = again(bench)
    second.matrix.write_text(FOUR)
    argv = ["harness", "run", str(second.matrix), "--runs", str(second.runs), "--box", "stub"]
    monkeypatch.setattr(sys, "argv", [*argv, "--have", str(bench.folder), "--have", str(bench.runs)])
    assert cli.main() == 0
    out = capsys.readouterr().out
    assert "2 of 4 kept" in out
    rows = [line.split()[0] for line in out.splitlines() if line.startswith(("kept ", "measured "))]
    assert sorted(rows) == ["kept", "kept", "measured", "measured"]


def test_a_failed_record_that_stands_is_still_called_failed(bench: Bench) -> None:
    bench.box.behaviour = [(FULL, {"fail_at_step": 2})]
    bench.run(FOUR)
    result = bench.run(FOUR)
    console = Console(width=100, record=True)
    console.print(terminal.run_table(result.records, result.kept))
    text = console.export_text()
    assert len(result.kept) == 4
    assert (text.count("\nfailed"), text.count("\nkept")) == (2, 2)
    assert case_id(result.records[0].case) in text
