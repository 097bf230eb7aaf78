"""The ladder and the search on what real GPUs have recorded: which case would be tried next, and what would fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fakes import stub_box
from fakes.stub_run import status
from fakes.surfaces import through

from harness import boxes, frontier, host, matrix, pipeline, triage
from harness.matrix.rules import obstacle
from harness.schema import Gpu, LadderAsked, LadderEnd, Record, TrainCase, case_id
from harness.session import Options
from harness.store import read_record, records_below
from harness.triage.held import GIB, held
from harness.triage.rungs import Means

REPORTS = Path(__file__).resolve().parent.parent / "reports"
OOM = LadderAsked(ladders=("oom",), tries=6, minutes=60)
RECORDS = {path.parent.name: record for path in records_below(REPORTS / "h200-1gpu")
           if isinstance((record := read_record(path)).case, TrainCase)}  # fmt: skip


def record(name: str) -> Record:
    return next(found for case_id, found in RECORDS.items() if case_id.startswith(f"train-{name}-"))


def case(found: Record) -> TrainCase:
    assert isinstance(found.case, TrainCase)
    return found.case


def means(found: Record, gpus: int = 1) -> Means:
    """What a host with as many of the record's GPUs gives."""
    assert found.last
    assert found.provenance
    size = found.provenance.gpus[0].total_bytes
    return Means(devices=gpus, device_bytes=size, held=held(case(found), found.last.observation, size))


def after(found: Record, gpus: int = 1) -> triage.Next:
    """The rung that follows the recorded failure."""
    assert found.last
    tried = [triage.Tried(found.case, None, found.last.diagnosis, 60.0)]
    answer = triage.next_rung(tried, OOM, means(found, gpus), obstacle)
    assert isinstance(answer, triage.Next), answer
    return answer


def test_12b_under_24_gib_goes_to_4_bits_at_its_own_length() -> None:
    """It died in the first forward pass, but its weights, gradients and optimizer alone take more than there is."""
    died = record("nano-12b-v2-lora-s2048-b1-one-cap24")
    bound = means(died).held
    assert bound is not None
    assert 23.4 < bound.held / GIB < 23.6
    assert bound.room / GIB < 23.4
    answer = after(died)
    assert answer.rung.name == "qlora"
    assert [(one.field, one.before, one.after) for one in answer.rung.change] == [("method", "lora", "qlora")]
    why = {one.rung: one.why for one in answer.rung.passed_over}
    assert why["seq_len"] == (
        "weights, gradients and optimizer state alone take 23.50 GiB of the 23.40 that PyTorch may hold, whatever the "
        "length and batch"
    )
    fitted = record("nano-12b-v2-qlora-s2048-b1-one-cap24")
    assert fitted.case == answer.case
    assert fitted.status == "measured"


def test_30b_under_24_gib_that_dies_at_load_goes_to_4_bits() -> None:
    answer = after(record("nano-30b-a3b-lora-s2048-b1-one-cap24"))
    assert answer.rung.name == "qlora"
    assert {one.rung for one in answer.rung.passed_over} == {"seq_len", "micro_batch", "grad_accum"}
    assert answer.case == record("nano-30b-a3b-qlora-s2048-b1-one-cap24").case


def test_when_4_bits_do_not_fit_either_one_gpu_has_nothing_left_and_two_shard() -> None:
    died = record("nano-30b-a3b-qlora-s2048-b1-one-cap24")
    assert died.last
    small = case(died).model_copy(update={"memory_cap_gib": 12.0})
    diagnosis = record("nano-30b-a3b-lora-s2048-b1-one-cap24").last
    assert diagnosis
    tried = [triage.Tried(small, None, diagnosis.diagnosis, 60.0)]
    answer = triage.next_rung(tried, OOM, Means(devices=1, device_bytes=150 * 10**9), obstacle)
    assert isinstance(answer, LadderEnd)
    assert "sharding needs two GPUs" in next(one.why for one in answer.passed_over if one.rung == "fsdp")


@pytest.mark.parametrize("name", [name for name, found in RECORDS.items() if found.status == "measured"])
def test_what_is_held_whatever_the_batch_is_a_little_less_than_the_optimizer_s_step_takes(name: str) -> None:
    """The bound is one: of no case that ran does it say that it cannot."""
    found = RECORDS[name]
    assert found.last
    bound, peak = means(found).held, frontier.peak_bytes(found, "optimizer_step")
    assert bound is not None
    assert peak is not None
    assert 0.95 * peak < bound.held <= peak
    assert bound.too_much is None


# ---------------------------------------------------------------- matrices/nano-fits.yaml, as a GPU would answer it

ALLOWED = {24.0: 25_120_931_839, 40.0: 42_300_801_023}
"""What PyTorch was left of a cap of 24 GiB, as recorded, and as much less of 40."""


def on_h200(one: TrainCase) -> dict[str, Any]:
    """What the stub of a payload shall say of a case, by the records of its variant and method."""
    alike = [found for found in RECORDS.values() if found.status == "measured"
             and (case(found).variant, case(found).method) == (one.variant, one.method)]  # fmt: skip
    peaks = {case(found).seq_len: frontier.peak_bytes(found) or 0 for found in alike}
    line = through(peaks) if len(peaks) > 1 else peaks.__getitem__
    last = alike[0].last
    assert last
    assert last.observation.train
    assert one.memory_cap_gib
    stored = last.observation.train.proof["bytes_by_dtype_and_class"]
    load = frontier.peak_bytes(alike[0], "load")
    return {"stored": stored, "load": load, "peak": round(line(one.seq_len)), "allowed": ALLOWED[one.memory_cap_gib]}


def test_the_order_in_which_a_gpu_runs_nano_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real matrix on a host with one GPU, its jobs stubs that run out of memory where the records say."""
    box = stub_box.StubBox()
    monkeypatch.setitem(boxes.REGISTRY, "stub", lambda _: box)
    monkeypatch.setattr(pipeline, "POLL_S", 0.02)
    card = Gpu(index=0, name="NVIDIA H200", uuid="GPU-0", total_bytes=150_754_820_096)
    monkeypatch.setattr(host, "gpus", lambda: ((card,), "580.0"))
    plan = matrix.load(REPORTS.parent / "matrices/nano-fits.yaml")
    cases = [one for one in plan.cases if isinstance(one, TrainCase)]
    cases += [one.model_copy(update={"method": "qlora"}) for one in cases if one.variant == "nano-12b-v2"]
    box.behaviour = [(f"{case_id(one)}.*", {"gpu": on_h200(one)}) for one in cases]
    result = pipeline.run(Path(plan.source), Options(runs=tmp_path, box="stub"))
    ran = sorted((one for one in result.records if one.last), key=began)
    assert [f"{_words(case(one))} {one.status}" for one in ran] == [
        "12b-v2 lora 2048 as 24 GiB failed",
        "9b-v2 lora 18432 as 24 GiB failed",
        "9b-v2 lora 18432 as 40 GiB measured",
        "12b-v2 qlora 2048 as 24 GiB measured",  # the ladder's one rung: no length would have mended it
        "9b-v2 lora 10240 as 24 GiB failed",
        "9b-v2 lora 26624 as 40 GiB measured",  # where the line through the peaks meets what is allowed
        "9b-v2 lora 6144 as 24 GiB measured",
        "9b-v2 lora 28672 as 40 GiB failed",
        "9b-v2 lora 8192 as 24 GiB failed",
    ]
    fits = [(found.fits.value, found.fails.value) for found in frontier.searches(result.records)
            if found.fits and found.fails]  # fmt: skip
    assert fits == [(6144, 8192), (26624, 28672)]
    assert status(result.records) == {"measured": 4, "failed": 5, "skipped": 25}
    assert [_words(case(one)) for one in result.failed] == ["12b-v2 lora 2048 as 24 GiB"]


def began(one: Record) -> float:
    assert one.last
    return one.last.jobs[0].outcome.start


def _words(one: TrainCase) -> str:
    return f"{one.variant.removeprefix('nano-')} {one.method} {one.seq_len} as {one.memory_cap_gib:g} GiB"


def test_what_no_length_mends_is_not_advised_either() -> None:
    from harness.triage import advice

    died = record("nano-12b-v2-lora-s2048-b1-one-cap24")
    assert died.last
    known = advice.values(died.case, died.last.observation)
    assert "half_seq_len" not in known
    assert (known["held_gib"], known["room_gib"]) == ("23.50", "23.40")
    assert "half_seq_len" in advice.values(died.case)
