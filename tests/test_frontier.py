"""The largest value that fits: the grid's answer in a third of its runs, and never a wrong "fits"."""

from __future__ import annotations

import math
from pathlib import Path

import bench_frontier
import pytest
from fakes import records, stub_box, surfaces
from fakes.stub_run import MATRIX, Bench
from fakes.surfaces import CASE, as_record, searched
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import boxes, frontier, host, pipeline
from harness.schema import Gpu, TrainCase, case_id
from harness.store import read_record

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
    assert len(done) <= math.ceil(math.log2(len(values) + 1))  # no peaks, no guess: halving alone
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


# ---------------------------------------------------------------- guided by measured peaks


@settings(max_examples=150)
@given(
    st.sampled_from(sorted(surfaces.MADE_UP)),
    st.integers(2, 40),
    st.sampled_from([64, 512, 2048]),
    st.floats(0, 1),
    st.floats(0.85, 1.1),
    st.booleans(),
)
def test_whatever_the_peaks_say_the_answer_is_right_and_the_bound_holds(
    name: str, count: int, step: int, share: float, real: float, loaded: bool
) -> None:
    """Capacity differs from what the record says of it by -15 to +10 %; on surfaces that no line describes too."""
    peak, values = surfaces.MADE_UP[name], range(step, step * count + 1, step)
    low, high = min(map(peak, values)), max(map(peak, values))
    capacity = low * 0.99 + (high * 1.01 - low * 0.99) * share
    ends = {value: None if peak(value) <= capacity else "oom_gpu_backward" for value in values}
    found, done = searched(values, ends.__getitem__, peak, 2**34 if loaded else 0, capacity / real)
    assert len(done) <= found.most_runs <= math.ceil(math.log2(count + 1)) + 1
    if count >= 12:
        assert 3 * len(done) <= count
    assert found.fits is None or (found.fits.value in done and ends[found.fits.value] is None)
    assert found.fails is None or ends[found.fails.value] is not None
    fitting = [value for value in values if ends[value] is None]
    if fitting == list(values)[: len(fitting)]:  # nothing that fits lies above something that does not
        assert (found.fits.value if found.fits else None) == max(fitting, default=None)


@settings(max_examples=60)
@given(GRIDS, st.data())
def test_peaks_that_are_nonsense_cost_no_more_than_the_bound(values: list[int], data: st.DataObject) -> None:
    room = data.draw(st.integers(0, 2_001))
    peaks = {value: data.draw(st.floats(0, 1e12)) for value in values}
    said = data.draw(st.floats(0, 1e12))
    found, done = searched(
        values, lambda value: None if value <= room else "oom_gpu_forward", peaks.__getitem__, said / 2, said
    )
    assert (found.fits.value if found.fits else None) == max((one for one in values if one <= room), default=None)
    assert len(done) <= found.most_runs


def test_two_peaks_point_at_the_border() -> None:
    peak = surfaces.MADE_UP["linear"]
    values = range(2048, 65_537, 2048)
    found, done = searched(values, lambda value: None if value <= 55_000 else "oom_gpu_forward", peak, 2**34,
                           peak(55_000) * 1.01)  # fmt: skip
    assert list(done) == [34_816, 53_248, 55_296]
    assert found.fits is not None
    assert found.fits.value == 53_248


def test_points_measured_before_leave_the_bound_to_halving() -> None:
    values = range(1, 41)
    cases = [CASE.model_copy(update={"seq_len": 8 * value}) for value in values]
    measured = {case_id(case): as_record(case, None, 1e9 + case.seq_len, 1e9, 2e9) for case in cases[:10]}
    found = frontier.search("seq_len", cases, measured)
    assert found.tries > found.most_runs
    assert found.next is found.gap[len(found.gap) // 2]


@pytest.mark.parametrize("name", surfaces.recorded())
def test_on_measured_memory_a_search_agrees_with_the_grid(name: str) -> None:
    load, known = surfaces.recorded()[name]
    peak, lengths = surfaces.through(known), range(min(known), max(known) + 1, 256)
    for cap in range(min(known.values()) - 2**28, max(known.values()) + 2**30, 2**30):
        fitting = [value for value in lengths if peak(value) <= cap]
        found, done = searched(
            lengths, lambda value, fits=set(fitting): None if value in fits else "oom_gpu_forward", peak, load, cap
        )
        assert (found.fits.value if found.fits else None) == max(fitting, default=None)
        assert 3 * len(done) <= len(lengths)


@pytest.mark.parametrize("count", [6, 12, 16])
def test_on_measured_memory_peaks_save_runs(count: int) -> None:
    halving, guided, _ = bench_frontier.runs(count, unused=(0.0, 0.06), steps=(1024,))
    assert guided < halving


def test_a_gpu_s_records_say_what_pytorch_was_allowed() -> None:
    """The committed records, as the search reads them."""
    folder = surfaces.ROOT / "reports/h200-1gpu/cases"
    capped = read_record(folder / "train-nano-9b-v2-lora-s2048-b1-one-cap24-2cb8e1eb/record.json")
    whole = read_record(folder / "train-nano-9b-v2-lora-s2048-b1-one-3400cbba/record.json")
    room, peak = frontier.room_bytes(capped), frontier.peak_bytes(capped)
    assert room is not None
    assert peak is not None
    assert 23 * 2**30 < room < 24 * 2**30
    assert 18.6 * 2**30 < peak < 18.8 * 2**30
    assert frontier.room_bytes(whole) == 150_754_820_096


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
