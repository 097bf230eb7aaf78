"""A case under memory_cap_gib, from its record's label to what triage and the live view say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fakes import stub_box
from fakes.stub_run import ONE_GPU, Bench
from pydantic import JsonValue

from harness import boxes, host, observe, pipeline
from harness.schema import Gpu, Observation, Outcome, TrainCase
from harness.triage import diagnose

GIB = 2**30
CASE = TrainCase(variant="nano-9b-v2", method="lora", seq_len=4096, lora_targets=("in_proj",), memory_cap_gib=24)
OOM: dict[str, JsonValue] = {
    "rank": 0, "t": 1.0, "phase": "train", "type": "OutOfMemoryError", "line": 9, "file": "j.1/events.rank0.jsonl",
    "message": "CUDA out of memory. Tried to allocate 96.00 MiB. GPU 0 has a total capacity of 139.81 GiB of which "
               "115.00 GiB is free. Including non-PyTorch memory, this process has 23.99 GiB memory in use. 23.49 GiB "
               "allowed; Of the allocated memory 23.10 GiB is allocated by PyTorch.",
    "traceback": 'File "torch/autograd/graph.py", line 7, in _engine_run_backward',
}  # fmt: skip


def test_its_record_is_labelled_capped_and_the_others_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = stub_box.StubBox()
    monkeypatch.setitem(boxes.REGISTRY, "stub", lambda _: box)
    monkeypatch.setattr(pipeline, "POLL_S", 0.02)
    card = Gpu(index=0, name="NVIDIA H200", uuid="GPU-0", total_bytes=141 * GIB)
    monkeypatch.setattr(host, "gpus", lambda: ((card,), "580.0"))
    text = ONE_GPU.replace("seq_len: [64, 128, 256, 512]", "seq_len: 64, memory_cap_gib: [24, null]")
    records = Bench(tmp_path, box).run(text).records
    kinds = {
        record.case.memory_cap_gib: record.provenance.number_kind
        for record in records
        if isinstance(record.case, TrainCase) and record.provenance
    }
    assert kinds == {24.0: "capped", None: "measured"}


def test_running_out_of_memory_under_a_cap_says_so() -> None:
    ended = Outcome(exit_code=1, start=0.0, end=9.0)
    capped = diagnose(CASE, [ended], Observation(errors=(OOM,)), "")
    whole = diagnose(CASE.model_copy(update={"memory_cap_gib": None}), [ended], Observation(errors=(OOM,)), "")
    assert capped
    assert whole
    assert (capped.failure_class, capped.phase) == (whole.failure_class, whole.phase) == ("oom_gpu_backward", "train")
    assert capped.summary == whole.summary.removesuffix(".") + ", with memory_cap_gib 24."


@pytest.mark.parametrize(("cap", "shown"), [(None, 2048.0), (24.0, None)])
def test_the_live_view_shows_no_speed_of_it(tmp_path: Path, cap: float | None, shown: float | None) -> None:
    case = CASE.model_copy(update={"memory_cap_gib": cap}).model_dump(mode="json")
    (tmp_path / "job.json").write_text(json.dumps({"role": "train", "case": case}))
    step = {"kind": "step", "step": 3, "step_time_s": 2.0, "tokens": 4096, "loss": 1.5}
    (tmp_path / "events.rank0.jsonl").write_text(json.dumps(step) + "\n")
    live = observe.peek(tmp_path)
    assert (live.step, live.loss, live.tokens_per_s) == (3, 1.5, shown)
    assert (live.step_time_s is None) == (shown is None)
