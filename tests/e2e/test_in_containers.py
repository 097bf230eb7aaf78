"""Cases of the quickstart in containers of the pinned images, through the real command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fakes.containers import left

from harness import schema, store
from harness.containers import imagelock
from harness.schema import Record

pytestmark = [pytest.mark.docker, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parent.parent.parent
MATRIX = ROOT / "matrices" / "quickstart.yaml"
SOME = ("train-tiny-hybrid-lora-s128-*", "serve-tiny-hybrid-*-c4-*", "chain-tiny-hybrid-lora-adapter-*")
"""One training case for each strategy, a load point, and a chain."""


def call(runs: Path, only: str, *options: str) -> tuple[int, str]:
    """One call of the command line; exit code and output."""
    argv = ["run", str(MATRIX), "--runs", str(runs), "--box", "docker", "--only", only, *options]
    done = subprocess.run(
        [sys.executable, "-m", "harness", *argv], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


def of_cases(run: store.Run) -> list[Record]:
    return [record for record in run.records() if record.status != "skipped"]


@pytest.fixture(scope="session")
def run(cpu_images: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    """Some cases of the quickstart, measured in containers."""
    runs = tmp_path_factory.mktemp("containers")
    for only in SOME:
        code, output = call(runs, only)
        assert code == 0, output
    return store.Run(runs / MATRIX.stem)


def test_training_serving_and_a_chain_are_measured(run: store.Run) -> None:
    records = of_cases(run)
    assert {record.status for record in records} == {"measured"}
    cases = [record.case for record in records]
    assert {case.strategy for case in cases if isinstance(case, schema.TrainCase)} == {"none", "ddp", "fsdp"}
    assert {case.kind for case in cases} == {"train", "serve", "chain"}
    assert all(record.last and all(job.outcome.ok for job in record.last.jobs) for record in records)


def test_every_record_names_an_image_of_images_lock(run: store.Run) -> None:
    images = imagelock.read(imagelock.path_of()).images
    for record in of_cases(run):
        assert record.provenance is not None
        found = {one.name: one for one in record.provenance.environments}
        assert {name: one.digest for name, one in found.items()} == {
            name: images[f"{name}-cpu"].image for name in ("train", "serve")
        }
        assert all(one.box == "docker" and one.pinned for one in found.values())
        assert all(one.libraries["torch"] == "2.13.0+cpu" and one.python for one in found.values())


def test_nothing_is_left_at_work_and_all_files_are_the_callers(run: store.Run) -> None:
    assert left(run.folder) == []
    owners = {(path.lstat().st_uid, path.lstat().st_gid) for path in run.folder.rglob("*")}
    assert owners == {(os.getuid(), os.getgid())}


def test_a_case_killed_for_memory_is_recorded_so(cpu_images: dict[str, Any], tmp_path: Path) -> None:
    code, output = call(tmp_path, "train-tiny-hybrid-lora-s128-b2-one-*", "--host-memory", "0.3")
    assert code == 1, output
    (record,) = of_cases(store.Run(tmp_path / MATRIX.stem))
    assert record.last is not None
    assert record.last.jobs[0].outcome.host_oom_killed
    assert record.last.diagnosis is not None
    assert record.last.diagnosis.failure_class == "oom_host"
    assert left(tmp_path / MATRIX.stem) == []
