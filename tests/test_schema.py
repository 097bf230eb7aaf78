"""The types that pass between modules: identities that last, values that cannot change, records that round-trip."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError, create_model

from harness import schema
from harness.schema import ChainCase, Record, ServeCase, TrainCase, case_id

words = st.from_regex(r"[a-z][a-z0-9-]{0,12}", fullmatch=True)
counts = st.integers(1, 64)
seconds = st.floats(0.1, 1e6)

trains = st.builds(
    TrainCase,
    variant=words,
    device=st.sampled_from(["cpu", "cuda"]),
    weights=st.sampled_from(["random", "hub", "/models/mine"]),
    param_dtype=st.sampled_from(["bf16", "fp32"]),
    thinking=st.booleans(),
    seed=st.integers(0, 2**31),
    repeat=st.integers(0, 9),
    time_limit_s=seconds,
    stall_s=seconds,
    method=st.sampled_from(["lora", "qlora", "full"]),
    seq_len=st.integers(8, 1 << 20),
    micro_batch=counts,
    grad_accum=counts,
    devices=counts,
    strategy=st.sampled_from(["none", "ddp", "fsdp"]),
    activation_checkpointing=st.booleans(),
    optimizer=st.sampled_from(["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"]),
    learning_rate=st.floats(1e-8, 1.0),
    lora_rank=st.integers(0, 256),
    lora_alpha=st.integers(0, 256),
    lora_targets=st.lists(words, max_size=4).map(tuple),
    attention=st.sampled_from(["sdpa", "eager", "flash_attention_2"]),
    steps=counts,
    warmup_steps=st.integers(0, 8),
    data=st.sampled_from(["synthetic", "/data/mine.jsonl"]),
    memory_cap_gib=st.none() | st.floats(1, 1024),
)
serves = st.builds(
    ServeCase,
    variant=words,
    time_limit_s=seconds,
    tensor_parallel=counts,
    max_model_len=st.integers(16, 1 << 20),
    max_num_seqs=counts,
    adapter=st.sampled_from(["none", "adapter", "merged", "/models/mine"]),
    enforce_eager=st.booleans(),
    gpu_memory_utilization=st.floats(0.01, 1.0),
    concurrency=counts,
    input_len=counts,
    output_len=counts,
    requests=counts,
)
chains = st.builds(ChainCase, train=trains, serve=serves)
cases = st.one_of(trains, serves, chains)


# ---------------------------------------------------------------- identity


def test_ids_of_the_first_version() -> None:
    """Written down once: a change here renames every case that anyone has measured."""
    train = TrainCase(variant="nano-9b-v2", method="lora", seq_len=2048, lora_targets=("in_proj", "q_proj"))
    serve = ServeCase(variant="nano-9b-v2", concurrency=8)
    assert case_id(train) == "train-nano-9b-v2-lora-s2048-b1-one-13e51241"
    assert case_id(serve) == "serve-nano-9b-v2-tp1-c8-i128-o128-0ecc89ec"
    assert case_id(ChainCase(train=train, serve=serve)) == "chain-nano-9b-v2-lora-none-9d5e9785"


@given(one=cases, other=cases)
def test_different_cases_have_different_ids(one: Any, other: Any) -> None:
    assume(without_limits(one) != without_limits(other))
    assert case_id(one) != case_id(other)


@given(case=cases)
def test_an_id_is_stable_and_a_file_name(case: Any) -> None:
    again = schema.CASE.validate_json(case.model_dump_json())
    assert case_id(again) == case_id(case)
    assert re.fullmatch(r"[a-z0-9][A-Za-z0-9.-]{0,120}", case_id(case))


@given(case=trains, limit=seconds, stall=seconds)
def test_when_to_give_up_is_no_part_of_an_id(case: TrainCase, limit: float, stall: float) -> None:
    assert case_id(case.model_copy(update={"time_limit_s": limit, "stall_s": stall})) == case_id(case)


@given(case=trains)
def test_a_new_field_with_a_default_renames_nothing(case: TrainCase) -> None:
    later = create_model("TrainCase", __base__=TrainCase, packing=(float | None, None), routed=(bool, False))
    assert case_id(later(**case.model_dump())) == case_id(case)
    assert case_id(later(**case.model_dump(), routed=True)) != case_id(case)


def test_a_cap_stands_in_the_id_and_its_absence_renames_nothing() -> None:
    case = TrainCase(variant="nano-9b-v2", method="lora", seq_len=2048, lora_targets=("in_proj", "q_proj"))
    named = [case_id(case.model_copy(update={"memory_cap_gib": cap})) for cap in (24.0, 22.5)]
    assert named[0].startswith("train-nano-9b-v2-lora-s2048-b1-one-cap24-")
    assert named[1].startswith("train-nano-9b-v2-lora-s2048-b1-one-cap22.5-")
    assert case_id(case) == "train-nano-9b-v2-lora-s2048-b1-one-13e51241"


@given(case=serves)
def test_a_new_field_renames_no_chain(case: ServeCase) -> None:
    train = TrainCase(variant=case.variant, method="lora", seq_len=64)
    later = create_model("ServeCase", __base__=ServeCase, prefix_caching=(bool, False))
    chain = ChainCase(train=train, serve=case)
    assert case_id(chain.model_copy(update={"serve": later(**case.model_dump())})) == case_id(chain)


def without_limits(case: Any) -> dict[str, Any]:
    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: cleaned(item) for name, item in value.items() if name not in schema.NOT_IDENTITY}
        return value

    found: dict[str, Any] = cleaned(case.model_dump())
    return found


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    "fields",
    [
        {"seqlen": 64},
        {"seq_len": 0},
        {"learning_rate": math.nan},
        {"learning_rate": math.inf},
        {"strategy": "zero"},
        {"repeat": -1},
        {"time_limit_s": 0.0},
    ],
)
def test_what_a_case_cannot_be(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TrainCase(**{"variant": "v", "method": "lora", "seq_len": 64, **fields})


def test_a_case_cannot_be_changed() -> None:
    case = TrainCase(variant="v", method="lora", seq_len=64)
    with pytest.raises(ValidationError):
        case.seq_len = 128


# ---------------------------------------------------------------- records

texts = st.text(max_size=40)
numbers = st.floats(allow_nan=False, allow_infinity=False)
maybe = st.none() | numbers
columns = st.integers(0, 4).flatmap(
    lambda n: st.builds(
        schema.Steps,
        step=st.tuples(*[st.integers(1, 99)] * n),
        step_time_s=st.tuples(*[maybe] * n),
        loss=st.tuples(*[maybe] * n),
        tokens=st.tuples(*[st.none() | st.integers(0, 1 << 40)] * n),
    )
)
ranks = st.builds(
    schema.RankObservation,
    rank=st.integers(0, 8),
    steps=columns,
    memory=st.lists(st.builds(schema.PhaseMemory, phase=texts, peak_rss_bytes=st.none() | counts), max_size=2).map(
        tuple
    ),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | numbers | texts, lambda s: st.lists(s, max_size=3)
)
observations = st.builds(
    schema.Observation,
    ranks=st.lists(ranks, max_size=2).map(tuple),
    train=st.none() | st.builds(schema.TrainObservation, proof=st.dictionaries(texts, json_values, max_size=3)),
    serve=st.none() | st.builds(schema.ServeObservation, ready_s=maybe, smoke=st.none()),
    notes=st.lists(texts, max_size=2).map(tuple),
)
outcomes = st.builds(
    schema.Outcome, exit_code=st.none() | st.integers(0, 255), start=numbers, end=numbers, detail=texts
)
jobs = st.builds(
    schema.JobRun, job_id=words, environment=st.sampled_from(["train", "serve"]), dir=words, outcome=outcomes
)
diagnoses = st.builds(
    schema.Diagnosis,
    failure_class=words,
    summary=texts,
    evidence=st.lists(
        st.builds(schema.Evidence, file=words, line=counts, text=texts, role=st.sampled_from(["initiating", "advice"])),
        max_size=2,
    ).map(tuple),
)
attempts = st.builds(
    schema.Attempt,
    number=counts,
    jobs=st.lists(jobs, max_size=2).map(tuple),
    observation=observations,
    diagnosis=st.none() | diagnoses,
    log_tail=texts,
)
records = st.builds(
    Record,
    case_id=words,
    case=cases,
    status=st.sampled_from(["measured", "failed", "skipped"]),
    skip_reason=st.none() | texts,
    attempts=st.lists(attempts, max_size=2).map(tuple),
    provenance=st.none(),
    finished_at=numbers,
)


@settings(max_examples=40)
@given(record=records)
def test_a_record_survives_its_file(record: Record) -> None:
    assert Record.model_validate_json(record.model_dump_json()) == record


@given(case=cases, words_=texts)
def test_a_plan_survives_its_file(case: Any, words_: str) -> None:
    skip = schema.Skip(case=case, rule="excluded", reason=words_)
    plan = schema.Plan(name="p", source="p.yaml", matrix_sha256="0", cases=(case,), skips=(skip,))
    assert schema.Plan.model_validate_json(plan.model_dump_json()) == plan


def test_a_record_of_a_later_version_is_not_read_as_this_one() -> None:
    with pytest.raises(ValidationError):
        Record.model_validate({"case_id": "c", "case": {}, "status": "measured", "finished_at": 1.0, "new": 1})


@pytest.mark.parametrize(
    ("fields", "ok"),
    [
        ({"exit_code": 0}, True),
        ({"exit_code": 1}, False),
        ({"signal": 9}, False),
        ({"exit_code": 0, "stalled": True}, False),
        ({"exit_code": 0, "timed_out": True}, False),
        ({"exit_code": 0, "interrupted": True}, False),
        ({"lost": True}, False),
    ],
)
def test_an_outcome_is_ok_where_it_ended_by_itself(fields: dict[str, Any], ok: bool) -> None:
    assert schema.Outcome(start=0.0, end=1.0, **fields).ok is ok


def test_cases_are_asked_for_by_patterns_with_commas_between() -> None:
    name = "train-nano-9b-v2-lora-s2048-b1-one-3400cbba"
    assert schema.asked_for(name, None)
    assert schema.asked_for(name, "serve-*, train-*-lora-*")
    assert not schema.asked_for(name, "serve-*,chain-*")
