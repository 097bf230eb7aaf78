"""The largest value that fits: the grid's answer in a third of its runs, and never a wrong "fits"."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from fakes import records, stub_box
from fakes.stub_run import MATRIX, Bench
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import boxes, frontier, host, pipeline, schema
from harness.schema import Gpu, Record, TrainCase, case_id
from harness.store import read_record, records_below

ROOT = Path(__file__).resolve().parent.parent


CASE = records.train_case(device="cuda")


def as_record(case: TrainCase, failure: str | None) -> Record:
    """A record of `case` that ran, or failed so."""
    outcome = schema.Outcome(exit_code=0 if failure is None else 1, start=1.0, end=2.0)
    diagnosis = failure and schema.Diagnosis(failure_class=failure, summary="It failed.")
    job = schema.JobRun(job_id="j", environment="train", dir="jobs/j.1", outcome=outcome)
    attempt = schema.Attempt(number=1, jobs=(job,), observation=schema.Observation(), diagnosis=diagnosis or None)
    return Record(
        case_id=case_id(case), case=case, status="failed" if failure else "measured", attempts=(attempt,),
        frontier="seq_len", finished_at=2.0,
    )  # fmt: skip


def searched(values: Sequence[int], ends: Callable[[int], str | None]) -> tuple[frontier.Search, dict[int, Record]]:
    """A search over `values` to its end, and what it ran; `ends` says how each would end."""
    cases = [CASE.model_copy(update={"seq_len": value}) for value in values]
    done: dict[int, Record] = {}
    for _ in range(len(values) + 1):
        found = frontier.search("seq_len", cases, {record.case_id: record for record in done.values()})
        if found.next is None:
            break
        case = next(one for one in cases if case_id(one) == found.next.case_id)
        assert case.seq_len not in done
        done[case.seq_len] = as_record(case, ends(case.seq_len))
    assert found.next is None
    return found, done


GRIDS = st.integers(2, 50).flatmap(
    lambda n: st.lists(st.integers(8, 2_000), min_size=n, max_size=n, unique=True).map(sorted)
)


@settings(max_examples=40)
@given(GRIDS, st.integers(0, 2_001))
def test_the_answer_is_the_grids_and_takes_a_third_of_its_runs(values: list[int], room: int) -> None:
    found, done = searched(values, lambda value: None if value <= room else "oom_gpu_forward")
    fitting = [value for value in values if value <= room]
    assert (found.fits.value if found.fits else None) == max(fitting, default=None)
    above = [value for value in values if value > room]
    assert (found.fails.value if found.fails else None) == min(above, default=None)
    assert len(done) <= math.ceil(math.log2(len(values) + 1))
    if len(values) >= 12:
        assert 3 * len(done) <= len(values)
    assert len(found.idle) + len(done) == len(values)


@settings(max_examples=40)
@given(GRIDS, st.data())
def test_nothing_is_said_to_fit_that_was_not_measured(values: list[int], data: st.DataObject) -> None:
    """On any surface, one with holes included."""
    ends = {
        value: data.draw(st.sampled_from([None, "oom_gpu_forward", "oom_gpu_contention", "app_exception"]))
        for value in values
    }
    found, done = searched(values, ends.__getitem__)
    assert found.fits is None or (found.fits.value in done and ends[found.fits.value] is None)
    assert found.fails is None or ends[found.fails.value] == "oom_gpu_forward"
    assert {point.value for point, _, _ in found.idle} == set(values) - set(done)


def test_contention_is_no_word_about_size() -> None:
    found, _ = searched([64, 128, 192], lambda _: "oom_gpu_contention")
    assert (found.fits, found.fails) == (None, None)
    assert {rule for _, rule, _ in found.idle} == {frontier.OPEN}


def test_a_server_whose_cache_is_too_small_is_too_large() -> None:
    cases = [records.serve_case(device="cuda", max_model_len=length) for length in (4_096, 32_768, 131_072)]
    failed = as_record(CASE, "serve_kv_cache").model_copy(update={"case": cases[1], "case_id": case_id(cases[1])})
    found = frontier.search("max_model_len", cases, {failed.case_id: failed})
    assert found.fails is not None
    assert found.fails.value == 32_768
    assert found.next is not None
    assert found.next.value == 4_096
    assert frontier.Point("of training", 1, as_record(CASE, "serve_kv_cache")).state == "failed otherwise"


def test_it_is_found_again_from_records_alone() -> None:
    found, done = searched(range(64, 2048, 64), lambda value: None if value <= 700 else "oom_gpu_backward")
    (again,) = frontier.searches(list(done.values()))
    assert (again.fits and again.fits.value, again.fails and again.fails.value) == (640, 704)
    assert again.tries == found.tries


# ---------------------------------------------------------------- recorded surfaces


def peaks() -> dict[str, dict[int, int]]:
    """Measured peaks of allocated memory by length, of each committed case measured at three lengths."""
    found: dict[str, dict[int, int]] = {}
    for path in records_below(ROOT / "reports"):
        record = read_record(path)
        case, train = record.case, record.last and record.last.observation.train
        if record.status == "measured" and train and isinstance(case, TrainCase) and case.memory_cap_gib is None:
            assert record.last
            peak = max(
                memory.peak_allocated_bytes or 0 for rank in record.last.observation.ranks for memory in rank.memory
            )
            found.setdefault(f"{path.parents[2].name}/{frontier.group(case, 'seq_len')}", {})[case.seq_len] = peak
    return {name: of for name, of in found.items() if len(of) >= 3}


def between(known: Mapping[int, int], length: int) -> float:
    """Bytes at a length between measured ones, on the line between its neighbours."""
    low = max(one for one in known if one <= length)
    high = min(one for one in known if one >= length)
    return known[low] + (known[high] - known[low]) * (length - low) / max(high - low, 1)


@pytest.mark.parametrize("name", sorted(peaks()))
def test_on_measured_memory_a_search_agrees_with_the_grid(name: str) -> None:
    known = peaks()[name]
    lengths = range(min(known), max(known) + 1, 256)
    for cap in range(min(known.values()) - 2**28, max(known.values()) + 2**30, 2**30):
        fitting = [value for value in lengths if between(known, value) <= cap]
        found, done = searched(lengths, lambda value, fits=set(fitting): None if value in fits else "oom_gpu_forward")
        assert (found.fits.value if found.fits else None) == max(fitting, default=None)
        assert 3 * len(done) <= len(lengths)


# ---------------------------------------------------------------- the replay backend

GRID = (
    MATRIX.replace("device: cpu", "device: cuda")
    + """\
train:
  - {method: lora, seq_len: {from: 64, to: 1024, step: 64}"""
)


def test_a_replayed_grid_and_a_replayed_search_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = stub_box.StubBox([("*", {"room": 700})])
    monkeypatch.setitem(boxes.REGISTRY, "stub", lambda _: box)
    gpus = (Gpu(index=0, name="GPU", uuid="GPU-0", total_bytes=2**34),)
    monkeypatch.setattr(host, "gpus", lambda: (gpus, "580.0"))
    monkeypatch.setattr(pipeline, "POLL_S", 0.02)
    recording = Bench(tmp_path / "recorded", box)
    recording.folder.mkdir()
    grid = recording.run(GRID + "}\n")
    player = Bench(tmp_path / "played", box)
    player.folder.mkdir()
    played = player.run(GRID + ", frontier: seq_len}\n", backend=f"replay:{recording.directory.folder}")
    assert sum(player.attempts().values()) * 3 <= len(grid.records)
    for search in frontier.searches(played.records):
        mine = {point.case_id for point in search.points}
        best = max(
            record.case.seq_len
            for record in grid.records
            if record.case_id in mine and record.status == "measured" and isinstance(record.case, TrainCase)
        )
        assert search.fits is not None
        assert search.fits.value == best
    assert len(frontier.searches(played.records)) == 1
