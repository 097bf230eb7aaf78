"""Slurm for real: nothing is lost, nothing runs twice, no job is left. Needs the cluster of `tools/slurm start`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import slurm_sites, stub_box, stub_jobs
from fakes.stub_run import MATRIX, failure, status

from harness import boxes, pipeline, store
from harness.schema import Outcome, Record
from harness.session import Options

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parent.parent
ONE = MATRIX + "train:\n  - {method: lora, seq_len: 64}\n"
FOUR = MATRIX + "train:\n  - {method: [lora, full], seq_len: [64, 128]}\n"
EIGHT = MATRIX + "train:\n  - {method: [lora, full], seq_len: [64, 128], learning_rate: [1.0e-4, 2.0e-4]}\n"


def tool(*argv: str, **variables: str) -> str:
    """`tools/slurm` for the cluster that SLURM_CONF names, or for the one that `variables` say."""
    env = os.environ | {"HARNESS_SLURM_DIR": str(Path(os.environ["SLURM_CONF"]).parent)} | variables
    done = subprocess.run([ROOT / "tools/slurm", *argv], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def slurm(*argv: str) -> str:
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


class Bench:
    """A run on the cluster with stub payloads."""

    def __init__(self, folder: Path, more: str = "accounting: false\n") -> None:
        self.site = slurm_sites.write(folder / "shared", more)
        self.matrix = folder / "small.yaml"
        self.run_dir = store.Run(folder / "shared" / "small")
        self.stubs = folder / "stubs.json"
        self.stubs.write_text("[]")

    def behave(self, *behaviour: tuple[str, dict[str, Any]]) -> None:
        self.stubs.write_text(json.dumps(behaviour))
        boxes.REGISTRY["stub"] = lambda _: stub_box.StubBox(behaviour)

    def run(self, text: str = ONE) -> tuple[Record, ...]:
        self.matrix.write_text(text)
        options = Options(runs=self.run_dir.folder.parent, backend=f"slurm:{self.site}", box="stub")
        return pipeline.run(self.matrix, options).records

    def start(self, text: str) -> subprocess.Popen[bytes]:
        """The same in a process of its own, to be killed."""
        self.matrix.write_text(text)
        argv = [sys.executable, stub_box.__file__, "run", str(self.matrix), "--box", "stub", "--backend", "slurm"]
        with open(self.matrix.with_suffix(".log"), "ab") as log:
            return subprocess.Popen([*argv, "--site", str(self.site)], env=os.environ | {"STUBS": str(self.stubs)},
                                    stdout=log, stderr=log)  # fmt: skip

    def jobs(self) -> dict[str, str]:
        """Slurm's id of each job that has a ticket, by directory."""
        paths = self.run_dir.folder.glob("jobs/*/ticket.json")
        return {path.parent.name: json.loads(path.read_text())["handle"]["job"] for path in paths}

    def at_work(self) -> list[Path]:
        """Directories of the jobs whose payload has begun and has not ended."""
        return [path.parent for path in self.run_dir.folder.glob("jobs/*/used.json")
                if not (path.parent / "ended.txt").exists()]  # fmt: skip

    def outcomes(self) -> list[Outcome]:
        return [
            Outcome.model_validate_json(path.read_bytes()) for path in self.run_dir.folder.glob("jobs/*/outcome.json")
        ]

    def queued(self) -> list[str]:
        """Slurm's ids of this run's jobs that are still in the queue."""
        ids = set(self.jobs().values())
        return [one for one in slurm("squeue", "--me", "--noheader", "--format=%i").split() if one in ids]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    made.behave()
    yield made
    boxes.REGISTRY.pop("stub")
    assert made.queued() == []


def meanwhile(act: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=act)
    thread.start()
    return thread


def last(record: Record) -> Outcome:
    assert record.last
    return record.last.jobs[-1].outcome


def test_eight_small_cases_run_at_once_and_leave_no_job(bench: Bench) -> None:
    bench.behave(("*", {"step_s": 2.0}))
    records = bench.run(EIGHT)
    assert status(records) == {"measured": 8}
    ends = bench.outcomes()
    assert len(ends) == 8
    assert max(one.start for one in ends) < min(one.end for one in ends)  # there was a moment at which all were at work
    assert {host for one in ends for host in one.hosts} == {"n1", "n2"}
    assert {one.scheduler_state for one in ends} == {"COMPLETED"}
    assert len({one.scheduler_job for one in ends}) == 8


def test_a_time_limit_ends_a_job_and_says_so(bench: Bench) -> None:
    bench.behave(("*", {"step_s": 60.0}))
    (record,) = bench.run(ONE.replace("steps: 3,", "steps: 3, time_limit: 3s,"))
    assert failure(record) == "terminated_external"
    assert last(record).timed_out
    assert not last(record).cancelled
    assert last(record).end - last(record).start < 20
    assert len(record.attempts) == 1


def test_silence_ends_a_job_as_stalled(bench: Bench) -> None:
    bench.behave(("*", {"step_s": 60.0}))
    (record,) = bench.run(ONE.replace("steps: 3,", "steps: 3, stall: 3s,"))
    assert failure(record) == "stalled"
    assert last(record).stalled


def test_a_case_that_fails_by_itself_is_not_tried_again(bench: Bench) -> None:
    bench.behave(("*", {"fail_at_step": 2}))
    (record,) = bench.run()
    assert (record.status, len(record.attempts), last(record).scheduler_state) == ("failed", 1, "FAILED")
    assert last(record).exit_code == 1
    assert "a mistake of this case" in record.last.log_tail if record.last else False


def test_scancel_by_hand_is_a_person_s_word(bench: Bench) -> None:
    bench.behave(("*", {"step_s": 60.0}))

    def cancel() -> None:
        stub_jobs.wait_for(bench.at_work, 60)
        slurm("scancel", *bench.jobs().values())

    acting = meanwhile(cancel)
    (record,) = bench.run()
    acting.join()
    assert failure(record) == "cancelled"
    assert last(record).cancelled
    assert last(record).scheduler_state == "CANCELLED"
    assert len(record.attempts) == 1


def test_harness_cancel_ends_exactly_what_it_started(bench: Bench, tmp_path: Path) -> None:
    bench.behave(("*", {"step_s": 60.0}))
    other = slurm("sbatch", "--parsable", f"--output={tmp_path}/other.log", "--wrap", "sleep 300").strip()
    try:
        control = bench.start(FOUR)
        stub_jobs.wait_for(lambda: len(bench.at_work()) == 4, 60)
        lines = pipeline.cancel(bench.run_dir)
        assert control.wait(30) == 130
        assert sum("was ended" in line for line in lines) == 4, lines
        assert bench.queued() == []
        assert [one.interrupted for one in bench.outcomes()] == [True] * 4
        assert slurm("squeue", "--noheader", "--format=%T", f"--jobs={other}").strip() == "RUNNING"
    finally:
        slurm("scancel", other)
    bench.behave()
    assert status(bench.run(FOUR)) == {"measured": 4}  # what was interrupted is measured by the next run


def test_a_killed_control_plane_loses_nothing_and_repeats_nothing(bench: Bench) -> None:
    bench.behave(("*", {"step_s": 3.0}))
    control = bench.start(FOUR)
    stub_jobs.wait_for(lambda: len(bench.at_work()) == 4, 60)
    control.kill()
    control.wait()
    assert len(bench.queued()) == 4  # they go on
    before = bench.jobs()
    assert status(bench.run(FOUR)) == {"measured": 4}
    assert bench.jobs() == before  # the same jobs, adopted


def test_the_controller_restarts_in_mid_run(bench: Bench) -> None:
    bench.behave(("*", {"step_s": 4.0}))

    def restart() -> None:
        stub_jobs.wait_for(bench.at_work, 60)
        tool("controller", "restart")

    acting = meanwhile(restart)
    records = bench.run(FOUR)
    acting.join()
    assert status(records) == {"measured": 4}
    assert [len(record.attempts) for record in records] == [1] * 4


def test_a_dead_node_is_left_out_of_the_next_attempt(bench: Bench) -> None:
    bench.behave(("*.1", {"step_s": 120.0}))
    struck: list[str] = []

    def strike() -> None:
        (folder,) = stub_jobs.wait_for(bench.at_work, 60)
        struck.extend(path.name.split(".")[1] for path in folder.glob("node.*.txt"))
        tool("node", struck[0], "kill")

    acting = meanwhile(strike)
    try:
        (record,) = bench.run()
    finally:
        acting.join()
        tool("node", struck[0], "start")
        stub_jobs.wait_for(lambda: slurm("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split().count(struck[0]), 60)
    first, second = (attempt.jobs[-1].outcome for attempt in record.attempts)
    assert record.status == "measured"
    assert first.node_failed
    assert (first.scheduler_state, first.failed_hosts) == ("NODE_FAIL", tuple(struck))
    assert second.ok
    assert second.hosts != first.hosts
    script = (bench.run_dir.folder / record.attempts[1].jobs[0].dir / "job.sbatch").read_text()
    assert f"#SBATCH --exclude={struck[0]}\n" in script


def test_a_preempted_job_is_queued_again(tmp_path: Path, bench: Bench) -> None:
    bench.site.write_text(bench.site.read_text() + "exclusive: true\nexclude_nodes: [n2]\n")
    bench.behave(("*.1", {"step_s": 60.0}))

    def preempt() -> None:
        stub_jobs.wait_for(bench.at_work, 60)
        slurm("sbatch", "--partition=urgent", "--exclusive", "--nodelist=n1", f"--output={tmp_path}/urgent.log",
              "--wrap", "sleep 3")  # fmt: skip

    acting = meanwhile(preempt)
    (record,) = bench.run()
    acting.join()
    assert record.status == "measured"
    assert record.attempts[0].jobs[-1].outcome.preempted
    assert record.attempts[0].diagnosis
    assert record.attempts[0].diagnosis.failure_class == "preempted"


@pytest.fixture(scope="module")
def accounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A second cluster, with slurmdbd over MariaDB, whose queue forgets a job soon after its end."""
    variables = {"HARNESS_SLURM_DIR": f"/var/tmp/harness-slurm-{os.getpid()}", "HARNESS_SLURM_PORT": "17700",
                 "HARNESS_SLURM_MIN_JOB_AGE": "2"}  # fmt: skip
    try:
        tool("start", "--accounting", **variables)
        yield variables
    finally:
        tool("stop", **variables)
        subprocess.run(["rm", "-rf", variables["HARNESS_SLURM_DIR"]], check=True)


def test_accounting_tells_what_the_queue_has_forgotten(
    accounted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_CONF", f"{accounted['HARNESS_SLURM_DIR']}/slurm.conf")
    bench = Bench(tmp_path, "accounting: true\n")
    bench.behave(("*full*", {"step_s": 60.0}), ("*lora*", {"step_s": 2.0}))
    control = bench.start(FOUR)
    stub_jobs.wait_for(lambda: len(bench.at_work()) == 4, 60)
    control.kill()
    control.wait()
    slurm("scancel", *(job for name, job in bench.jobs().items() if "full" in name))
    stub_jobs.wait_for(lambda: slurm("squeue", "--me", "--states=all", "--noheader") == "", 90)
    for path in bench.run_dir.folder.glob("jobs/*full*/ended.txt"):
        path.unlink()  # as where a node died: accounting alone knows
    records = bench.run(FOUR)
    assert status(records) == {"measured": 2, "failed": 2}
    assert {failure(record) for record in records if record.status == "failed"} == {"cancelled"}
    assert {last(record).scheduler_state for record in records} == {"COMPLETED", "CANCELLED"}
    boxes.REGISTRY.pop("stub")


@pytest.mark.payload
@pytest.mark.server
@pytest.mark.timeout(600)
def test_the_quickstart_trains_on_two_nodes_and_serves(tmp_path: Path) -> None:
    """The first command of README's section on Slurm, with real training and a real server."""
    site = slurm_sites.write(tmp_path / "shared", f"accounting: false\nscratch: {tmp_path}/scratch\nmax_queued: 2\n")
    (tmp_path / "scratch").mkdir()
    matrix = ROOT / "matrices/quickstart-slurm.yaml"
    argv = [sys.executable, "-m", "harness", "run", str(matrix), "--backend", "slurm", "--site", str(site)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    records = store.Run(tmp_path / "shared" / "quickstart-slurm").records()
    assert {record.status for record in records} == {"measured"}
    (both,) = (record for record in records if record.case.nodes == 2)
    assert last(both).hosts == ("n1", "n2")
    assert both.provenance
    assert both.provenance.hosts == ("n1", "n2")
    assert both.last
    ranks = {rank.rank: rank.host for rank in both.last.observation.ranks}
    assert sorted(str(host) for host in ranks.values()) == ["n1", "n2"]
    logs = {path.name for path in (tmp_path / "shared/quickstart-slurm" / both.last.jobs[0].dir / "logs").glob("rank*")}
    assert {f"rank{rank}.{host}.stderr.log" for rank, host in ranks.items()} <= logs
    assert {record.case.kind for record in records} >= {"train", "serve", "chain"}
    assert all(last(record).scheduler_job for record in records)
    assert not list((tmp_path / "scratch").glob("harness-*/[0-9]*"))  # nothing is left on a node but caches


def test_waiting_costs_few_calls(bench: Bench) -> None:
    """A record stands within 15 s of its job's end."""
    began = time.time()
    (record,) = bench.run()
    assert record.finished_at - last(record).end < 15
    assert time.time() - began < 60


@pytest.mark.payload
def test_doctor_checks_a_site_and_reduces_over_its_nodes(tmp_path: Path) -> None:
    site = slurm_sites.write(tmp_path / "shared")

    def doctor() -> tuple[int, dict[str, dict[str, str]]]:
        argv = [sys.executable, "-m", "harness", "doctor", "--json", "--site", str(site)]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
        findings = json.loads(done.stdout)["findings"]
        return done.returncode, {finding["topic"]: finding for finding in findings}

    code, found = doctor()
    assert code == 0
    assert found["probe"]["status"] == "ok", found
    assert "n1, n2" in found["probe"]["text"]
    assert found["time"]["status"] == "warn"  # the partition ends jobs, and the site file does not say so
    site.write_text(site.read_text().replace("partition: batch", "partition: nowhere"))
    code, found = doctor()
    assert code == 1
    assert found["partition"]["status"] == "bad"
    assert "probe" not in found  # what is known to be wrong is not tried
