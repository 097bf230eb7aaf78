"""What a run adds to its plan: ladders after a failure and searches, counted apart, resumed, and always over."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fakes import stub_box
from fakes.stub_run import MATRIX, Bench, failure, status, stubbed

from harness import frontier, host, pipeline, store
from harness.schema import Gpu, Record, TrainCase
from harness.session import Options

ON_GPU = MATRIX.replace("device: cpu", "device: cuda")
LADDER = ON_GPU + "train:\n  - {method: lora, seq_len: 512, micro_batch: 4, ladder: oom}\n"
SEARCH = ON_GPU + "train:\n  - {method: lora, seq_len: {from: 64, to: 1024, step: 64}, frontier: seq_len}\n"


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    gpus = (Gpu(index=0, name="GPU", uuid="GPU-0", total_bytes=2**34),)
    monkeypatch.setattr(host, "gpus", lambda: (gpus, "580.0"))
    return stubbed(tmp_path, monkeypatch)


def train(record: Record) -> TrainCase:
    assert isinstance(record.case, TrainCase)
    return record.case


def chain(records: tuple[Record, ...]) -> list[Record]:
    """The planned case and what its ladder added, in order."""
    found = [next(record for record in records if record.parent is None)]
    while child := next((record for record in records if record.parent == found[-1].case_id), None):
        found.append(child)
    return found


# ---------------------------------------------------------------- ladders


def test_a_failed_case_climbs_to_one_that_fits_and_stays_failed_itself(bench: Bench) -> None:
    bench.box.behaviour = [("*", {"room": 300})]
    result = bench.run(LADDER)
    climbed = chain(result.records)
    assert [(train(one).seq_len, train(one).micro_batch, train(one).grad_accum) for one in climbed] == [
        (512, 4, 1), (256, 4, 1), (128, 4, 1), (128, 2, 2),
    ]  # fmt: skip
    assert [one.status for one in climbed] == ["failed", "failed", "failed", "measured"]
    assert [one.rung.name for one in climbed if one.rung] == ["seq_len", "seq_len", "micro_batch"]
    assert climbed[-1].ladder_end is not None
    assert climbed[-1].ladder_end.reason == "it ran with micro_batch"
    assert len(result.records) == 4


def test_off_is_off(bench: Bench) -> None:
    bench.box.behaviour = [("*", {"room": 300})]
    (record,) = bench.run(LADDER.replace("ladder: oom", "ladder: off")).records
    assert record.ladder_end is None


def test_contention_adds_nothing_and_says_why(bench: Bench) -> None:
    said = (
        "CUDA out of memory. Tried to allocate 96.00 MiB. GPU 0 has a total capacity of 79.00 GiB of which 9.00 MiB is "
        "free. Process 4711 has 61.00 GiB memory in use. Including non-PyTorch memory, this process has 17.00 GiB "
        "memory in use."
    )
    bench.box.behaviour = [("*", {"room": 300, "oom": said})]
    (record,) = bench.run(LADDER).records
    assert failure(record) == "oom_gpu_contention"
    assert record.ladder_end is not None
    assert "another process holds" in record.ladder_end.reason


def test_budgets_of_tries_and_minutes_end_it(bench: Bench) -> None:
    bench.box.behaviour = [("*", {"room": 1})]
    tries = bench.run(LADDER.replace("ladder: oom", "ladder: oom, ladder_tries: 2"))
    assert [one.rung.name for one in chain(tries.records) if one.rung] == ["seq_len", "seq_len"]
    end = chain(tries.records)[-1].ladder_end
    assert end is not None
    assert end.reason == "ladder_tries: 2 of 2 are spent"
    more = bench.run(LADDER.replace("ladder: oom", "ladder: oom, ladder_tries: 3"))  # a greater budget goes on
    assert [one.rung.name for one in chain(more.records) if one.rung] == ["seq_len", "seq_len", "micro_batch"]
    assert [one.ladder_end is None for one in chain(more.records)] == [True, True, True, False]


def test_a_rerun_takes_no_longer_than_the_budget_has_left(bench: Bench) -> None:
    bench.box.behaviour = [("*", {"room": 1})]
    result = bench.run(LADDER.replace("ladder: oom", "ladder: oom, ladder_minutes: 0.5, ladder_tries: 1"))
    child = chain(result.records)[1]
    assert train(child).time_limit_s == 30


def test_a_second_run_adds_nothing(bench: Bench) -> None:
    bench.box.behaviour = [("*", {"room": 300})]
    bench.run(LADDER)
    before, started = bench.stamps(), bench.attempts()
    again = bench.run(LADDER)
    assert (bench.stamps(), bench.attempts()) == (before, started)
    assert len(again.kept) == 4


@pytest.mark.parametrize("when", ["at work", "before its record"])
@pytest.mark.parametrize("number", [1, 3])
def test_killed_in_mid_ladder_it_goes_on_there(
    bench: Bench, number: int, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.box.behaviour = [("*", {"room": 300, "step_s": 0.3 if when == "at work" else 0.0})]
    save = store.Run.save

    def interrupt(progress: pipeline.Progress) -> None:
        if when == "at work" and progress.added == number and progress.running:
            raise KeyboardInterrupt

    def die(run: store.Run, record: Record) -> None:
        if when == "before its record" and len(bench.stamps()) == number and not run.record(record.case_id):
            raise KeyboardInterrupt
        save(run, record)

    monkeypatch.setattr(store.Run, "save", die)
    with pytest.raises(KeyboardInterrupt):
        bench.run(LADDER, interrupt)
    assert len(bench.stamps()) == number
    monkeypatch.setattr(store.Run, "save", save)
    bench.box.behaviour = [("*", {"room": 300})]
    climbed = chain(bench.run(LADDER).records)
    assert [train(one).seq_len for one in climbed] == [512, 256, 128, 128]
    attempts = bench.attempts()
    assert sorted(attempts.values()) == ([1, 1, 1, 1] if when == "before its record" else [1, 1, 1, 2])


def test_kill_after_kill_the_same_ladder_is_climbed_once(tmp_path: Path) -> None:
    """The control plane dies by SIGKILL at any moment, its jobs with it, until a start comes through."""
    said = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8388608 bytes."
    (tmp_path / "stubs.json").write_text(json.dumps([["*", {"room": 300, "oom": said, "step_s": 0.2}]]))
    bench = Bench(tmp_path, stub_box.StubBox())
    bench.matrix.write_text(LADDER.replace("device: cuda", "device: cpu"))
    argv = [
        sys.executable,
        str(stub_box.__file__),
        "run",
        str(bench.matrix),
        "--runs",
        str(bench.runs),
        "--box",
        "stub",
    ]
    dice, settled, kills = random.Random(5), dict[Path, int](), 0
    for _ in range(30):
        control = subprocess.Popen(argv, env=os.environ | {"STUBS": str(tmp_path / "stubs.json")},
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        try:
            control.wait(dice.uniform(0.5, 1.2) if kills < 4 else 60)
            break
        except subprocess.TimeoutExpired:
            control.kill()
            control.wait()
            kills += 1
        measured = {path: time for path, time in bench.stamps().items() if json.loads(path.read_text())["attempts"]}
        assert settled.keys() <= measured.keys()
        settled = measured
    assert kills >= 3
    climbed = chain(tuple(bench.directory.records()))
    assert [(train(one).seq_len, train(one).micro_batch) for one in climbed] == [(512, 4), (256, 4), (128, 4), (128, 2)]
    assert [one.status for one in climbed] == ["failed", "failed", "failed", "measured"]
    assert len(list(bench.directory.records())) == 4
    assert bench.working() == []


def test_a_rung_that_the_matrix_plans_itself_is_not_run_twice(bench: Bench) -> None:
    bench.box.behaviour = [("*", {"room": 1100})]
    text = LADDER.replace("seq_len: 512", "seq_len: [512, 256]")
    result = bench.run(text)
    assert status(result.records) == {"failed": 1, "measured": 1}
    end = result.failed[0].ladder_end
    assert end is not None
    assert end.leads_to == next(record.case_id for record in result.records if record.status == "measured")
    assert end.reason == "the next rung is seq_len, and the matrix plans that case itself"


def test_two_ladders_that_meet_share_the_case(bench: Bench) -> None:
    bench.box.behaviour = [("*", {"room": 600})]
    result = bench.run(LADDER.replace("seq_len: 512", "seq_len: [512, 256]"))
    assert max(bench.attempts().values()) == 1
    assert [train(one).seq_len for one in result.records if one.parent] == [128]
    assert sum(one.ladder_end is not None and one.ladder_end.leads_to is not None for one in result.records) == 1


def test_a_case_that_fails_otherwise_has_no_ladder(bench: Bench) -> None:
    bench.box.behaviour = [("*", {"fail_at_step": 1})]
    (record,) = bench.run(LADDER).records
    assert record.ladder_end is not None
    assert record.ladder_end.reason == "app_exception is not what the oom ladder answers"


def test_a_recorded_ladder_plays_again_and_one_that_was_not_recorded_ends(bench: Bench) -> None:
    bench.box.behaviour = [("*", {"room": 300})]
    bench.run(LADDER)
    player = Bench(bench.folder / "played", bench.box)
    player.folder.mkdir()
    again = player.run(LADDER, backend=f"replay:{bench.directory.folder}")
    assert [one.rung.name for one in chain(again.records) if one.rung] == ["seq_len", "seq_len", "micro_batch"]
    for job in bench.directory.jobs_dir.glob("*-b2-*"):
        shutil.rmtree(job)
    third = Bench(bench.folder / "third", bench.box)
    third.folder.mkdir()
    climbed = chain(third.run(LADDER, backend=f"replay:{bench.directory.folder}").records)
    assert [one.rung.name for one in climbed if one.rung] == ["seq_len", "seq_len"]
    assert climbed[-1].ladder_end is not None
    why = {one.rung: one.why for one in climbed[-1].ladder_end.passed_over}
    assert why["micro_batch"] == "the recording that is played has no such case"


def test_load_points_of_a_server_that_does_not_start_climb_together(bench: Bench) -> None:
    bench.box.behaviour = [("*", {"room": 600})]
    points = "{concurrency: 1, input_len: 8, output_len: 8}, {concurrency: 4, input_len: 8, output_len: 8}"
    text = f"{ON_GPU}serve:\n  - {{max_model_len: 2048, ladder: oom, load: [{points}]}}\n"
    result = bench.run(text)
    assert status(result.records) == {"failed": 4, "measured": 2}
    assert list(bench.attempts().values()) == [1, 1, 1]
    assert {one.case.max_model_len for one in result.records if one.status == "measured"} == {512}


def test_a_rung_that_this_host_cannot_give_is_passed_over(bench: Bench) -> None:
    bench.box.behaviour = [("*", {"room": 1})]
    text = LADDER.replace("seq_len: 512, micro_batch: 4", "seq_len: 16, activation_checkpointing: false")
    _, *added = chain(bench.run(text).records)
    assert [one.rung.name for one in added if one.rung] == ["qlora", "activation_checkpointing"]
    assert added[-1].ladder_end is not None
    why = {one.rung: one.why for one in added[-1].ladder_end.passed_over}
    assert why["fsdp"] == "sharding needs two GPUs; this host has one"


@pytest.mark.parametrize(("ranks", "ladder", "names"), [
    (2, "nccl", ["train", "serve"]),
    (2, "oom", ["serve"]),
    (1, "both", ["serve"]),
])  # fmt: skip
def test_a_server_that_may_be_probed_binds_the_libraries_of_probes_too(
    bench: Bench, ranks: int, ladder: str, names: list[str]
) -> None:
    bench.run(f"{ON_GPU}serve:\n  - {{tensor_parallel: {ranks}, ladder: {ladder}}}\n")
    assert [one.name for one in bench.directory.info().environments] == names


# ---------------------------------------------------------------- searches


def test_a_search_finds_what_the_grid_finds_in_a_third_of_the_runs(bench: Bench) -> None:
    bench.box.behaviour = [("*", {"room": 700})]
    result = bench.run(SEARCH)
    states = {train(record).seq_len: record for record in result.records}
    assert len(states) == 16
    assert max(length for length, record in states.items() if record.status == "measured") == 640
    assert failure(states[704]) in ("oom_gpu_forward", "oom_gpu_backward")
    assert sum(bench.attempts().values()) <= 16 / 3
    assert states[64].skip_reason == "Not measured: seq_len 576 ran, and the search is for the largest." or (
        states[64].skip_rule == "frontier_below"
    )
    assert states[1024].skip_rule == "frontier_above"
    assert all(record.frontier == "seq_len" for record in result.records)
    assert not [record for record in result.records if record.parent]
    assert result.failed == ()


def test_a_search_goes_on_where_it_was_and_ends(bench: Bench) -> None:
    bench.box.behaviour = [("*", {"room": 700})]

    def interrupt(progress: pipeline.Progress) -> None:
        if sum(record.status != "skipped" for record in progress.records) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run(SEARCH, interrupt)
    _, pending = pipeline.pending(bench.matrix, Options(runs=bench.runs, box="stub"))
    assert len(pending) == 1
    result = bench.run(SEARCH)
    assert max(train(one).seq_len for one in result.records if one.status == "measured") == 640
    assert pipeline.pending(bench.matrix, Options(runs=bench.runs, box="stub"))[1] == []
    before = bench.stamps(), bench.attempts()
    bench.run(SEARCH)
    assert (bench.stamps(), bench.attempts()) == before
    assert sum(bench.attempts().values()) <= 6


def test_what_was_measured_before_the_search_was_asked_for_belongs_to_it(bench: Bench) -> None:
    bench.box.behaviour = [("*", {"room": 700})]
    bench.run(SEARCH.replace("{from: 64, to: 1024, step: 64}, frontier: seq_len", "[640, 704]"))
    result = bench.run(SEARCH)
    assert list(bench.attempts().values()) == [1, 1]
    (search,) = frontier.searches(result.records)
    assert len(search.points) == 16
    assert (search.fits and search.fits.value, search.fails and search.fails.value) == (640, 704)


@pytest.mark.parametrize(("room", "largest"), [(10, None), (10_000, 1024)])
def test_a_search_at_either_end(bench: Bench, room: int, largest: int | None) -> None:
    bench.box.behaviour = [("*", {"room": room})]
    result = bench.run(SEARCH)
    found = [train(one).seq_len for one in result.records if one.status == "measured"]
    assert max(found, default=None) == largest


def test_a_failure_of_another_kind_stops_a_search_without_a_claim(bench: Bench) -> None:
    bench.box.behaviour = [("*-s576-*", {"fail_at_step": 1})]
    result = bench.run(SEARCH)
    assert status(result.records) == {"failed": 1, "skipped": 15}
    reasons: Any = {record.skip_rule for record in result.records if record.status == "skipped"}
    assert reasons == {"frontier_open"}
