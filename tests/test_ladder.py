"""The next rung after a failure: in the documented order, only what can help, and always to an end."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import catalog, triage
from harness.matrix.rules import obstacle
from harness.schema import (
    NOT_IDENTITY,
    AnyCase,
    ChainCase,
    Diagnosis,
    Evidence,
    LadderAsked,
    LadderEnd,
    ServeCase,
    TrainCase,
    case_id,
)
from harness.triage import ladder
from harness.triage.rungs import GIB, Means, sequences_per_step

OOM = LadderAsked(ladders=("oom",))
ROOMY = Means(devices=8, device_bytes=80 * GIB)
TRAINING = ("oom_gpu_load", "oom_gpu_forward", "oom_gpu_backward", "oom_gpu_optimizer", "oom_gpu_save_eval")
SERVING = ("serve_kv_cache", "serve_oom_profile", "oom_gpu_load")


def train(**changes: Any) -> TrainCase:
    fields: dict[str, Any] = {"variant": "nano-9b-v2", "method": "lora", "seq_len": 8192, "micro_batch": 4}
    return TrainCase(**fields | {"lora_targets": catalog.variant("nano-9b-v2").lora_targets} | changes)


def failed(failure: str, phase: str | None = "train") -> Diagnosis:
    return Diagnosis(failure_class=failure, phase=phase, summary="It failed.")


def climb(case: AnyCase, failure: str, means: Means = ROOMY, asked: LadderAsked = OOM, phase: str | None = None) -> Any:
    """All that is tried where each rerun fails as the first did; the end last."""
    tried = [triage.Tried(case, None, failed(failure, phase))]
    found: list[Any] = []
    while True:
        answer = triage.next_rung(tried, asked, means, obstacle)
        found.append(answer)
        if isinstance(answer, LadderEnd):
            return found
        tried.append(triage.Tried(answer.case, answer.rung, failed(failure, phase), 60.0))


def names(found: list[Any]) -> list[str]:
    return [one.rung.name for one in found[:-1]]


# ---------------------------------------------------------------- the order


def test_the_order_is_the_first_seeds() -> None:
    found = climb(train(activation_checkpointing=False, devices=2, strategy="ddp"), "oom_gpu_forward")
    expected = ["seq_len", "seq_len", "micro_batch", "micro_batch", "qlora"]
    assert names(found)[:5] == expected
    assert [case.seq_len for case in (one.case for one in found[:-1])][:2] == [4096, 2048]
    # 4-bit weights cannot be sharded, and two shares of 16 bits are no smaller: the last word is checkpointing.
    assert names(found)[5:] == ["activation_checkpointing"]
    assert found[-1].reason == "no rung is left that could help"


def test_the_recipes_own_order_can_be_chosen() -> None:
    asked = OOM.model_copy(update={"order": "seed003"})
    found = climb(train(activation_checkpointing=False, micro_batch=2), "oom_gpu_backward", asked=asked)
    assert names(found) == ["activation_checkpointing", "micro_batch"]
    assert "only what FSDP2 has sharded" in found[0].rung.passed_over[0].why
    sharded = train(strategy="fsdp", devices=8, micro_batch=1)
    assert names(climb(sharded, "oom_gpu_load", asked=asked)) == ["cpu_offload"]


def test_the_effective_batch_stays() -> None:
    case = train(micro_batch=6, grad_accum=2, devices=2, strategy="ddp")
    reruns = [one.case for one in climb(case, "oom_gpu_backward")[:-1]]
    assert {sequences_per_step(one) for one in reruns} == {sequences_per_step(case)}
    assert (1, 12) in {(one.micro_batch, one.grad_accum) for one in reruns}


# ---------------------------------------------------------------- only what can help


def test_at_load_no_length_or_batch_is_tried() -> None:
    first = climb(train(), "oom_gpu_load", phase="load")[0]
    assert first.rung.name == "qlora"
    why = {passed.rung: passed.why for passed in first.rung.passed_over}
    assert list(why) == ["seq_len", "micro_batch", "grad_accum"]
    assert why["seq_len"] == "the weights alone do not fit, before any sequence or batch counts"


def test_a_model_that_cannot_fit_on_one_gpu_goes_straight_to_sharding() -> None:
    case = train(variant="nano-30b-a3b", devices=8, strategy="ddp", memory_cap_gib=12)
    first = climb(case, "oom_gpu_load", phase="load")[0]
    assert (first.rung.name, first.case.strategy, first.case.devices) == ("fsdp", "fsdp", 8)
    why = {passed.rung: passed.why for passed in first.rung.passed_over}
    assert why["qlora"] == "the weights alone would take 14.7 GiB of each device's 12.0"


def test_one_gpu_becomes_all_of_the_host_and_the_batch_stays() -> None:
    case = train(method="full", lora_targets=(), lora_rank=0, lora_alpha=0, micro_batch=1, grad_accum=16)
    first = climb(case, "oom_gpu_optimizer")[1]
    assert (first.case.strategy, first.case.devices, first.case.grad_accum) == ("fsdp", 8, 2)
    assert first.rung.keeps_effective_batch
    assert first.case.optimizer == "adamw_torch_fused"


def test_contention_is_never_answered_by_shrinking() -> None:
    (end,) = climb(train(), "oom_gpu_contention")
    assert "free it and run the case as it is" in end.reason


def test_host_memory_of_a_gpu_job_is_no_rung() -> None:
    (end,) = climb(train(), "oom_host")
    assert "not the GPU's" in end.reason


def test_on_a_cpu_the_host_s_memory_is_what_shrinks() -> None:
    found = climb(train(variant="tiny-hybrid", device="cpu", seq_len=256, micro_batch=2), "oom_host", phase="train")
    assert names(found)[:3] == ["seq_len", "seq_len", "micro_batch"]
    assert "fsdp" not in names(found)


def test_what_no_ladder_answers_ends_at_once() -> None:
    (end,) = climb(train(), "app_exception")
    assert end.reason == "app_exception is not what the oom ladder answers"


def test_a_server_s_cache_asks_for_shorter_requests_first() -> None:
    case = ServeCase(variant="nano-9b-v2", max_model_len=131072, input_len=1024, output_len=128, max_num_seqs=1)
    found = climb(case, "serve_kv_cache")
    assert names(found)[:5] == ["max_model_len"] * 4 + ["utilization_up"]
    assert found[3].case.max_model_len == 8192


def test_a_length_that_the_server_names_is_taken() -> None:
    said = (
        "ValueError: To serve at least one request with the model's max seq len (131072), (8.03 GiB KV cache is needed,"
        " which is larger than the available KV cache memory (1.53 GiB). Based on the available memory, the estimated "
        "maximum model length is 24928. Try increasing `gpu_memory_utilization`."
    )
    quote = Evidence(file="server.log", line=9, text=said, role="initiating")
    diagnosis = failed("serve_kv_cache", "start_server").model_copy(update={"evidence": (quote,)})
    for need, expected in ((1000, 24928), (30000, 30128)):
        case = ServeCase(variant="nano-9b-v2", max_model_len=131072, input_len=need, output_len=128)
        answer = triage.next_rung([triage.Tried(case, None, diagnosis)], OOM, ROOMY, obstacle)
        assert isinstance(answer, triage.Next)
        assert isinstance(answer.case, ServeCase)
        assert answer.case.max_model_len == expected


def test_the_load_is_never_made_impossible() -> None:
    case = ServeCase(variant="nano-9b-v2", max_model_len=2048, input_len=1024, output_len=512, concurrency=16)
    for one in climb(case, "serve_kv_cache")[:-1] + climb(case, "serve_oom_profile")[:-1]:
        assert one.case.max_model_len >= 1536
        assert one.case.max_num_seqs >= 16


def test_the_half_of_a_chain_that_failed_changes() -> None:
    case = ChainCase(train=train(), serve=ServeCase(variant="nano-9b-v2", adapter="adapter", max_model_len=8192))
    server = climb(case, "serve_kv_cache", phase="start_server")[0]
    assert [change.field for change in server.rung.change] == ["serve.max_model_len"]
    trainer = climb(case, "oom_gpu_backward", phase="train")[0]
    assert [change.field for change in trainer.rung.change] == ["train.seq_len"]


# ---------------------------------------------------------------- the end


def test_budgets_end_it() -> None:
    tries = climb(train(), "oom_gpu_forward", asked=OOM.model_copy(update={"tries": 2}))
    assert (len(tries), tries[-1].reason) == (3, "ladder_tries: 2 of 2 are spent")
    minutes = climb(train(), "oom_gpu_forward", asked=OOM.model_copy(update={"minutes": 2.5}))
    assert (len(minutes), minutes[-1].reason) == (4, "ladder_minutes: 3 of 2.5 are spent")


def test_what_runs_ends_it() -> None:
    case = train()
    first = triage.next_rung([triage.Tried(case, None, failed("oom_gpu_forward"))], OOM, ROOMY, obstacle)
    assert isinstance(first, triage.Next)
    tried = [triage.Tried(case, None, failed("oom_gpu_forward")), triage.Tried(first.case, first.rung)]
    end = triage.next_rung(tried, OOM, ROOMY, obstacle)
    assert isinstance(end, LadderEnd)
    assert end.reason == "it ran with seq_len"


def test_another_failure_of_a_rerun_ends_it() -> None:
    first = climb(train(), "oom_gpu_forward")[0]
    tried = [
        triage.Tried(train(), None, failed("oom_gpu_forward")),
        triage.Tried(first.case, first.rung, failed("nan_loss")),
    ]
    end = triage.next_rung(tried, OOM, ROOMY, obstacle)
    assert isinstance(end, LadderEnd)
    assert end.reason == "the rerun failed otherwise: nan_loss"


# ---------------------------------------------------------------- properties

CASES = st.one_of(
    st.builds(
        lambda method, **fields: (
            train(method=method, **fields)
            if method != "full"
            else train(method=method, lora_targets=(), lora_rank=0, lora_alpha=0, **fields)
        ),
        method=st.sampled_from(["lora", "qlora", "full"]),
        variant=st.sampled_from(["tiny-hybrid", "nano-9b-v2", "nano-30b-a3b"]),
        device=st.sampled_from(["cuda", "cpu"]),
        seq_len=st.integers(8, 131072),
        micro_batch=st.integers(1, 96),
        grad_accum=st.integers(1, 64),
        devices=st.sampled_from([1, 2, 3, 8]),
        strategy=st.sampled_from(["none", "ddp", "fsdp"]),
        optimizer=st.sampled_from(["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit"]),
        activation_checkpointing=st.booleans(),
        memory_cap_gib=st.one_of(st.none(), st.floats(1, 200)),
    ),
    st.builds(
        ServeCase,
        variant=st.sampled_from(["tiny-hybrid", "nano-9b-v2"]),
        max_model_len=st.integers(16, 131072),
        max_num_seqs=st.integers(1, 1024),
        gpu_memory_utilization=st.floats(0.1, 1),
        tensor_parallel=st.sampled_from([1, 2, 4, 8]),
        concurrency=st.integers(1, 256),
    ),
)
ASKED = st.builds(
    LadderAsked, ladders=st.just(("oom",)), order=st.sampled_from(["seed000", "seed003"]), tries=st.integers(1, 40)
)
MEANS = st.builds(Means, devices=st.integers(1, 16), device_bytes=st.one_of(st.none(), st.integers(2**30, 2**38)))
FAILURES = st.lists(st.sampled_from((*TRAINING, *SERVING, "oom_host", "app_exception")), min_size=1, max_size=50)


@given(CASES, FAILURES, ASKED, MEANS)
def test_a_ladder_ends_never_revisits_and_changes_only_what_its_rung_declares(
    case: AnyCase, failures: list[str], asked: LadderAsked, means: Means
) -> None:
    tried = [triage.Tried(case, None, failed(failures[0]))]
    for number in range(asked.tries + 1):
        answer = triage.next_rung(tried, asked, means, obstacle)
        assert answer == triage.next_rung(tried, asked, means, obstacle)
        if isinstance(answer, LadderEnd):
            break
        assert case_id(answer.case) not in {case_id(one.case) for one in tried}
        assert obstacle(answer.case) is None
        _check_declared(tried[-1].case, answer)
        tried.append(triage.Tried(answer.case, answer.rung, failed(failures[number % len(failures)])))
    assert isinstance(answer, LadderEnd)
    assert len(tried) - 1 <= asked.tries


def _check_declared(before: AnyCase, answer: triage.Next) -> None:
    entry = ladder.ladders()[answer.rung.ladder].rungs[answer.rung.name]
    changed = {change.field.removeprefix("train.").removeprefix("serve.") for change in answer.rung.change}
    assert changed
    assert changed <= set(entry.changes)
    assert not changed & NOT_IDENTITY
    if entry.keeps_effective_batch:
        assert answer.rung.keeps_effective_batch


@pytest.mark.parametrize("name", list(ladder.ladders()))
def test_every_rung_of_a_ladder_is_described_and_made(name: str) -> None:
    found = ladder.ladders()[name]
    ordered = {rung for order in found.orders.values() for rung in order}
    assert ordered == set(found.rungs)
    assert set(found.rungs) <= set(ladder.MAKERS)
    assert not set(found.classes) & set(found.refuses)
