"""The same software on every rank: a rank that differs is named, whatever else the job did."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from fakes import records

from harness import events, launch, observe
from harness.payload import versions
from harness.schema import Diagnosis, Outcome, TrainCase
from harness.triage import diagnose

ROOT = Path(__file__).resolve().parent.parent
SAME = {"torch": "2.13.0", "trl": "1.16.0"}


def job_of(folder: Path, *ranks: dict[str, str] | None) -> Path:
    """A job directory in which each rank says what it has installed; None: nothing of it, as older payloads."""
    for rank, found in enumerate(ranks):
        known = {} if found is None else {"libraries": found, "versions_sha256": versions.digest(found)}
        say(folder, rank, world_size=len(ranks), host=f"node{rank}", **known)
    return folder


def say(folder: Path, rank: int, **fields: Any) -> None:
    """One rank's first event."""
    line = {"kind": "start", "t": 1.0, "m": 1.0, "rank": rank, **fields}
    Path(events.file_of(str(folder), rank)).write_text(json.dumps(line) + "\n")


def verdict(job_dir: Path, devices: int, exit_code: int = 0) -> Diagnosis:
    case = records.train_case(devices=devices, strategy="ddp")
    found = diagnose(case, [Outcome(exit_code=exit_code, start=1.0, end=2.0)], observe.observe(case, [job_dir]), "")
    assert found is not None
    return found


@pytest.mark.parametrize("exit_code", [0, 1])
def test_a_rank_with_another_version_is_named(tmp_path: Path, exit_code: int) -> None:
    found = verdict(job_of(tmp_path, SAME, SAME, {**SAME, "trl": "1.15.0"}), 3, exit_code)
    assert found.failure_class == "not_as_requested"
    assert found.culprit is not None
    assert (found.culprit.rank, found.culprit.host, found.culprit_status) == (2, "node2", "established")
    assert "rank 2 on node2 has trl 1.15.0 (most ranks: 1.16.0)" in found.summary


def test_of_two_equal_camps_that_of_rank_0_is_right(tmp_path: Path) -> None:
    found = verdict(job_of(tmp_path, {**SAME, "torch": "2.12.0"}, SAME), 2)
    assert found.culprit is not None
    assert found.culprit.rank == 1
    assert "torch 2.13.0 (most ranks: 2.12.0)" in found.summary


def test_a_missing_library_and_a_package_beside_the_main_ones(tmp_path: Path) -> None:
    first = observe.observe(records.train_case(devices=2), [job_of(tmp_path, SAME, {"torch": "2.13.0"})])
    assert [one.differences for one in first.odd_ranks] == [("trl missing (most ranks: 1.16.0)",)]
    other = tmp_path / "other"
    other.mkdir()
    for rank, digest in enumerate(("sha256:1", "sha256:2")):
        say(other, rank, libraries=SAME, versions_sha256=digest)
    assert "packages beside the main ones" in verdict(other, 2).summary


def test_equal_ranks_and_ranks_that_say_nothing_are_not_odd(tmp_path: Path) -> None:
    case = records.train_case(devices=3)
    assert observe.observe(case, [job_of(tmp_path, SAME, SAME, None)]).odd_ranks == ()


def test_the_payload_says_the_same_of_the_whole_group() -> None:
    def rank(host: str, **changed: str) -> dict[str, Any]:
        return {"host": host, "versions": {**SAME, "idna": "3.20", **changed}}

    assert versions.difference([rank("a"), rank("b"), rank("c")]) is None
    said = versions.difference([rank("a"), rank("b", idna="3.19"), rank("c"), rank("d", trl="1.15.0")])
    assert said == "rank 1 on b has idna 3.19 (most ranks: 3.20); rank 3 on d has trl 1.15.0 (most ranks: 1.16.0)"


SHIM = """
import os, sys
if os.environ.get("RANK") == "1":
    sys.path.insert(0, os.path.join(os.path.dirname(__file__), "odd"))
"""
"""Python runs a module of this name at its start; rank 1 then sees another trl's metadata first."""


@pytest.mark.payload
def test_two_real_ranks_of_which_one_sees_another_version(tmp_path: Path, environments: Path) -> None:
    shim, job_dir = tmp_path / "shim", tmp_path / "job"
    info = shim / "odd" / "trl-1.15.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 1.15.9\n")
    (shim / "sitecustomize.py").write_text(SHIM)
    case = TrainCase(
        variant="tiny-hybrid", device="cpu", devices=2, strategy="ddp", method="full", lora_rank=0, param_dtype="fp32",
        seq_len=64, steps=3, warmup_steps=1, time_limit_s=120,
    )  # fmt: skip
    job = launch.jobs((case,), 1)[0]
    job_dir.mkdir()
    (job_dir / "job.json").write_text(json.dumps(job.payload))
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    ended = subprocess.run(
        [environments / "train/bin/python", *job.argv[1:]], cwd=job_dir, timeout=200, capture_output=True, check=False,
        env={**kept, **job.env, "PYTHONPATH": f"{shim}:{ROOT}"},
    )  # fmt: skip
    assert ended.returncode != 0
    seen = observe.observe(case, [job_dir])
    assert {error["type"] for error in seen.errors} == {"NotAsRequested"}
    assert all(not rank.steps.step for rank in seen.ranks)
    found = diagnose(case, [Outcome(exit_code=1, start=1.0, end=2.0)], seen, ended.stderr.decode())
    assert found is not None
    assert found.failure_class == "not_as_requested"
    assert found.culprit is not None
    assert found.culprit.rank == 1
    assert "trl 1.15.9 (most ranks: " in found.summary
