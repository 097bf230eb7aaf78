"""What ends a run from outside: Ctrl-C, `cancel`, a kill, a full disk. Nothing is lost and nothing stays at work."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import stub_box
from fakes.stub_jobs import wait_for
from fakes.stub_run import FOUR, MIXED, Bench, status, stubbed

from harness import pipeline
from harness.errors import HarnessError

SLOW = [("*", {"step_s": 60, "helper": True})]


Harness = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def harness(bench: Bench) -> Iterator[Harness]:
    """The command line in a process of its own, with jobs of that behaviour."""
    started: list[subprocess.Popen[str]] = []

    def call(behaviour: Any, *argv: str, **options: Any) -> subprocess.Popen[str]:
        stubs = bench.folder / "stubs.json"
        stubs.write_text(json.dumps(behaviour))
        started.append(
            subprocess.Popen(
                [sys.executable, str(stub_box.__file__), *argv], env={**os.environ, "STUBS": str(stubs)}, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
            )
        )  # fmt: skip
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.communicate()


def start(bench: Bench, harness: Harness, behaviour: Any, text: str = FOUR, **options: Any) -> subprocess.Popen[str]:
    """A run in a process of its own, at work on its first job when this returns."""
    bench.matrix.write_text(text)
    argv = ("run", str(bench.matrix), "--runs", str(bench.runs), "--box", "stub")
    control = harness(behaviour, *argv, **options)
    wait_for(lambda: len(bench.working()) > 1 or control.poll() is not None)
    assert control.poll() is None, control.communicate()
    return control


def finish(control: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = control.communicate(timeout=60)
    return control.returncode, out, err


def test_ctrl_c_exits_130_and_leaves_nothing_at_work(bench: Bench, harness: Harness) -> None:
    control = start(bench, harness, SLOW)
    control.send_signal(signal.SIGINT)
    code, _, err = finish(control)
    assert code == 130
    assert "finished cases are kept" in err
    assert "Traceback" not in err
    assert bench.working() == []
    assert status(bench.run().records) == {"measured": 4}


def test_cancel_ends_a_run_of_another_process(bench: Bench, harness: Harness) -> None:
    """Also one in the background of a shell, which ignores Ctrl-C."""
    control = start(bench, harness, SLOW, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    code, out, err = finish(harness([], "cancel", str(bench.directory.folder)))
    assert (code, err) == (0, "")
    assert f"pid {control.pid}" in out
    assert finish(control)[0] == 130
    assert bench.working() == []
    assert finish(harness([], "cancel", str(bench.directory.folder)))[1].startswith("nothing of this run")


def test_a_second_run_beside_the_first_is_refused_and_disturbs_nothing(bench: Bench, harness: Harness) -> None:
    control = start(bench, harness, SLOW)
    with pytest.raises(HarnessError, match=f"pid {control.pid}"):
        bench.run()
    assert control.poll() is None
    control.terminate()
    assert finish(control)[0] == 130


def test_a_run_at_work_on_another_host_is_left_alone(bench: Bench) -> None:
    """On a shared disk the lock tells of a process that has no meaning here."""
    bench.run(only="*-lora-s64-*")
    with bench.directory.locked():
        (bench.directory.folder / "lock").write_text("1 another-node")
        with pytest.raises(HarnessError, match="another-node"):
            pipeline.cancel(bench.directory)
        with pytest.raises(HarnessError, match="another-node"):
            bench.run()


def test_a_killed_control_plane_loses_no_record_and_leaves_nothing_at_work(bench: Bench, harness: Harness) -> None:
    control = start(bench, harness, [("*-full-*", {"step_s": 60, "helper": True})], MIXED)
    wait_for(lambda: len(bench.stamps()) >= 3 and any(bench.directory.jobs_dir.glob("*-full-*/events.rank0.jsonl")))
    before = bench.stamps()
    control.kill()
    control.communicate()
    wait_for(lambda: bench.working() == [])
    result = bench.run(MIXED)
    assert before.items() <= bench.stamps().items()
    assert status(result.records) == {"measured": 8, "skipped": 1}
    assert sorted(bench.attempts().values())[-2:] == [1, 2]
    assert bench.working() == []


# ---------------------------------------------------------------- a disk that is really full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("no small disk without the right to mount one: run as root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Leave nothing free on the disk of `folder`."""
    filler = folder / "filler"
    with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    assert shutil.disk_usage(folder).free == 0
    return filler


def test_a_disk_full_between_two_jobs(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = stubbed(small_disk, monkeypatch)

    def watch(progress: pipeline.Progress) -> None:
        if progress.records and not (small_disk / "filler").exists():
            fill(small_disk)

    with pytest.raises(HarnessError, match=r"full|No space left"):
        bench.run(watch=watch)
    before = bench.stamps()
    assert len(before) >= 1
    assert bench.working() == []
    with pytest.raises(HarnessError, match=r"full|No space left"):
        bench.run()
    (small_disk / "filler").unlink()
    result = bench.run()
    assert before.items() <= bench.stamps().items()
    assert status(result.records) == {"measured": 4}


def test_a_disk_full_while_a_job_writes(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = stubbed(small_disk, monkeypatch)
    bench.box.behaviour = [("*", {"step_s": 0.5})]

    def watch(progress: pipeline.Progress) -> None:
        training = any(running.live.step for running in progress.running)
        if progress.records and training and not (small_disk / "filler").exists():
            fill(small_disk)

    with pytest.raises(HarnessError, match=r"full|No space left"):
        bench.run(watch=watch)
    before = bench.stamps()
    assert len(before) >= 1
    assert bench.working() == []
    (small_disk / "filler").unlink()
    bench.box.behaviour = []
    result = bench.run()
    assert before.items() <= bench.stamps().items()
    assert status(result.records) == {"measured": 4}


def test_a_case_that_fills_the_disk_by_itself_is_tried_by_the_next_run(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = stubbed(small_disk, monkeypatch)
    bench.box.behaviour = [("*-full-s64-*", {"write_bytes": 40 * 2**20})]
    with pytest.raises(HarnessError, match=r"full|No space left"):
        bench.run()
    for path in bench.directory.jobs_dir.glob("*/large"):
        path.unlink()
    bench.box.behaviour = []
    assert status(bench.run().records) == {"measured": 4}
