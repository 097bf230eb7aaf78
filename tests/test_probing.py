"""The communication ladder: probes in the documented order, only such as can tell something, and what they showed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import catalog, triage
from harness.matrix.rules import obstacle
from harness.schema import (
    AnyCase,
    ChainCase,
    Diagnosis,
    LadderAsked,
    LadderEnd,
    ProbeCase,
    ServeCase,
    TrainCase,
    case_id,
)
from harness.triage import ladder
from harness.triage.ladder import Tried
from harness.triage.probing import CHECKPOINT_PHASES
from harness.triage.rungs import Means

NCCL = LadderAsked(ladders=("nccl",))
MEANS = Means(devices=8, interfaces=("eth0", "ib0"))
ANSWERED = ladder.ladders()["nccl"].classes


def train(**changes: Any) -> TrainCase:
    fields: dict[str, Any] = {
        "variant": "nano-9b-v2",
        "method": "lora",
        "seq_len": 512,
        "devices": 4,
        "strategy": "ddp",
    }
    return TrainCase(**fields | {"lora_targets": catalog.variant("nano-9b-v2").lora_targets} | changes)


def failed(failure: str = "coll_timeout", phase: str | None = "train") -> Diagnosis:
    return Diagnosis(failure_class=failure, phase=phase, summary="It failed.", next_step="Read the log.")


def climb(case: AnyCase, works: str = "", means: Means = MEANS, first: Diagnosis | None = None) -> list[Tried]:
    """All that is tried where the rungs named in `works` run as asked and the others fail; the first case included."""
    tried = [Tried(case, None, first or failed())]
    while not isinstance(answer := triage.next_rung(tried, NCCL, means, obstacle), LadderEnd):
        ran = answer.rung.name in works.split()
        tried.append(Tried(answer.case, answer.rung, None if ran else failed("nccl_bootstrap_net"), 60.0))
    return tried


def names(tried: list[Tried]) -> list[str]:
    return [one.rung.name for one in tried if one.rung]


def verdict(tried: list[Tried]) -> Diagnosis:
    """What the first case's diagnosis says in the end."""
    assert tried[0].diagnosis is not None
    probes = [triage.Probed(one.rung, one.case, one.diagnosis) for one in tried if one.rung]
    return triage.with_evidence(tried[0].diagnosis, probes)


# ---------------------------------------------------------------- the order


def test_probes_come_in_the_seeds_order() -> None:
    tried = climb(train())
    assert names(tried) == ["nccl_debug", "interface", "two_ranks", "p2p_off"]
    cases = [one.case for one in tried[1:]]
    assert all(isinstance(case, ProbeCase) and case.debug for case in cases)
    assert [(case.devices, getattr(case, "interface", ""), getattr(case, "p2p", "")) for case in cases] == [
        (4, None, True), (4, "lo", True), (2, None, True), (2, None, False)]  # fmt: skip


def test_two_ranks_are_no_fewer_than_two() -> None:
    tried = climb(train(devices=2))
    assert names(tried) == ["nccl_debug", "interface", "p2p_off"]
    last = tried[-1].rung
    assert last is not None
    assert "it has two ranks already" in [one.why for one in last.passed_over]


def test_gloo_has_no_p2p_to_turn_off() -> None:
    assert names(climb(train(device="cpu", variant="tiny-hybrid", devices=3))) == [
        "nccl_debug", "interface", "two_ranks"]  # fmt: skip


def test_between_hosts_the_interface_is_one_that_reaches_them() -> None:
    tried = climb(train(nodes=2))
    pinned = tried[2].case
    assert isinstance(pinned, ProbeCase)
    assert (pinned.nodes, pinned.interface) == (2, "eth0")
    assert names(climb(train(nodes=2), means=Means(devices=8))) == ["nccl_debug", "two_ranks", "p2p_off"]


def test_a_probe_that_failed_keeps_what_it_pins_until_its_rung() -> None:
    tried = climb(ProbeCase(device="cuda", devices=2, interface="eth0"))
    assert [getattr(one.case, "interface", "") for one in tried] == ["eth0", "eth0", "lo", "eth0"]
    assert names(climb(ProbeCase(device="cuda", devices=2, debug=True)))[0] == "interface"


def test_the_half_of_a_chain_or_a_server_that_failed_gives_the_ranks() -> None:
    serve = ServeCase(variant="nano-9b-v2", tensor_parallel=2)
    assert [case.case.devices for case in climb(serve)[1:]] == [2, 2, 2]
    chain = ChainCase(train=train(), serve=serve)
    assert climb(chain)[1].case.devices == 4
    assert climb(chain, first=failed(phase="bench"))[1].case.devices == 2


def test_one_rank_has_nobody_to_talk_to() -> None:
    tried = climb(train(devices=1, strategy="none"), first=failed("stalled"))
    assert names(tried) == []
    end = triage.next_rung(tried, NCCL, MEANS, obstacle)
    assert isinstance(end, LadderEnd)
    assert end.passed_over[0].why == "one rank has nobody to talk to"


@pytest.mark.parametrize("failure", ["coll_mismatch", "nccl_shm", "nccl_invalid_usage"])
def test_what_a_probe_would_only_show_again_is_refused(failure: str) -> None:
    end = triage.next_rung([Tried(train(), None, failed(failure))], NCCL, MEANS, obstacle)
    assert isinstance(end, LadderEnd)
    assert end.reason == ladder.ladders()["nccl"].refuses[failure]


# ---------------------------------------------------------------- checkpoints on a local disk


def passed_over(tried: list[Tried], rung: str) -> str:
    """Why the ladder that ends after `tried` left a rung out."""
    end = triage.next_rung(tried, NCCL, MEANS, obstacle)
    assert isinstance(end, LadderEnd)
    return next(one.why for one in end.passed_over if one.rung == rung)


@pytest.mark.parametrize("phase", sorted(CHECKPOINT_PHASES))
def test_where_a_checkpoint_was_written_the_case_is_run_again_with_a_local_one(phase: str) -> None:
    tried = climb(train(), "nccl_debug local_checkpoints", first=failed("stalled", phase))
    assert names(tried) == ["nccl_debug", "local_checkpoints"]
    again = tried[-1]
    assert again.case == train(checkpoints="local")
    assert again.rung is not None
    assert [(one.field, one.before, one.after) for one in again.rung.change] == [("checkpoints", "run", "local")]
    assert case_id(again.case) != case_id(train())


def test_a_case_that_wrote_no_checkpoint_is_not_run_again_for_one() -> None:
    assert "it failed in phase train" in passed_over(climb(train(), "nccl_debug"), "local_checkpoints")
    saving = failed("stalled", "save")
    local = climb(train(checkpoints="local"), "nccl_debug", first=saving)
    assert "on a local disk already" in passed_over(local, "local_checkpoints")
    serving = climb(ServeCase(variant="nano-9b-v2", tensor_parallel=2), "nccl_debug", first=saving)
    assert "local_checkpoints" not in names(serving)


def test_ranks_that_do_not_talk_come_before_their_checkpoints() -> None:
    saving = failed("stalled", "save")
    for works in ("", "interface", "p2p_off"):
        tried = climb(train(), works, first=saving)
        assert "do not talk as they are" in passed_over(tried, "local_checkpoints")


def test_a_single_rank_that_hangs_while_saving_is_run_again_at_once() -> None:
    tried = climb(train(devices=1, strategy="none"), "local_checkpoints", first=failed("stalled", "save"))
    assert names(tried) == ["local_checkpoints"]
    for rung in ("nccl_debug", "interface", "two_ranks", "p2p_off"):
        assert passed_over(tried, rung) == "one rank has nobody to talk to"
    assert passed_over(tried, "local_checkpoints") == "it was tried already"
    assert verdict(tried).showed == "With checkpoints on a local disk the case completes: the storage path is suspect."


def test_the_training_half_of_a_chain_takes_its_checkpoints_along() -> None:
    chain = ChainCase(train=train(), serve=ServeCase(variant="nano-9b-v2", adapter="adapter"))
    again = climb(chain, "nccl_debug local_checkpoints", first=failed("stalled", "save"))[-1]
    assert again.case == ChainCase(train=train(checkpoints="local"), serve=chain.serve)


@pytest.mark.parametrize(
    ("ended", "showed", "next_step"),
    [
        (None, "With checkpoints on a local disk the case completes: the storage path is suspect.", "file system"),
        (failed("stalled", "save"), "it fails too (stalled in save): not the storage.", "the rank that stops first"),
        (
            failed("storage_full", "save"),
            "failed otherwise (storage_full in save), which says nothing",
            "Read the log.",
        ),
        (failed("oom_gpu_forward", "train"), "failed otherwise (oom_gpu_forward in train)", "Read the log."),
    ],
)
def test_the_verdict_says_what_the_local_disk_showed(ended: Diagnosis | None, showed: str, next_step: str) -> None:
    tried = climb(train(), "nccl_debug local_checkpoints", first=failed("stalled", "save"))
    found = verdict([*tried[:-1], replace(tried[-1], diagnosis=ended)])
    assert found.showed.startswith("Without the model the all-reduce of 4 ranks completes. ")
    assert showed in found.showed
    assert next_step in found.next_step
    assert found.failure_class == "stalled"


# ---------------------------------------------------------------- what they showed


@pytest.mark.parametrize(
    ("works", "climbed", "showed", "next_step"),
    [
        ("nccl_debug", 1, "Without the model the all-reduce of 4 ranks completes", "the rank that stops first"),
        ("interface", 2, "With the interface pinned to lo the all-reduce of 4 ranks completes",
         "Set NCCL_SOCKET_IFNAME=lo"),
        ("two_ranks", 3, "Two ranks reduce together, 4 do not", "Probe further pairs"),
        ("p2p_off", 4, "With P2P off the all-reduce of 2 ranks completes: the P2P path is suspect",
         "NCCL_P2P_DISABLE=1"),
        ("", 4, "The probe fails too, without any model (nccl_debug: nccl_bootstrap_net", "with the probe alone"),
    ],
)  # fmt: skip
def test_the_verdict_says_what_the_probes_showed(works: str, climbed: int, showed: str, next_step: str) -> None:
    tried = climb(train(), works)
    assert len(names(tried)) == climbed
    found = verdict(tried)
    assert showed in found.showed
    assert next_step in found.next_step
    assert found.failure_class == "coll_timeout"


def test_a_probe_that_works_makes_the_narrowing_ones_needless() -> None:
    end = triage.next_rung(climb(train(), "interface"), NCCL, MEANS, obstacle)
    assert isinstance(end, LadderEnd)
    whys = {one.rung: one.why for one in end.passed_over}
    assert whys["two_ranks"] == "the ranks reduce together as they are (interface)"


def test_a_failure_while_saving_points_at_the_disk_where_the_network_works() -> None:
    found = verdict(climb(train(), "nccl_debug", first=failed(phase="save"))[:-1])
    assert "local disk" in found.next_step


def test_no_probe_shows_nothing() -> None:
    assert verdict([Tried(train(), None, failed())]) == failed()


# ---------------------------------------------------------------- property

CASES = st.one_of(
    st.builds(
        ProbeCase,
        device=st.sampled_from(["cuda", "cpu"]),
        devices=st.integers(1, 16),
        nodes=st.integers(1, 3),
        interface=st.sampled_from([None, "lo", "eth0"]),
        p2p=st.booleans(),
        debug=st.booleans(),
    ),
    st.builds(
        train,
        device=st.sampled_from(["cuda", "cpu"]),
        devices=st.integers(1, 16),
        nodes=st.integers(1, 3),
        strategy=st.sampled_from(["none", "ddp", "fsdp"]),
    ),
    st.builds(ServeCase, variant=st.just("nano-9b-v2"), tensor_parallel=st.integers(1, 8)),
)


@given(
    CASES,
    st.sampled_from(ANSWERED),
    st.lists(st.booleans(), min_size=20, max_size=20),
    st.integers(1, 20),
    st.sets(st.sampled_from(["eth0", "ib0"])),
    st.sampled_from([None, "train", "save", "reload"]),
)
def test_the_ladder_ends_never_revisits_and_changes_only_what_its_rung_declares(
    case: AnyCase, failure: str, runs: list[bool], tries: int, interfaces: set[str], phase: str | None
) -> None:
    asked, means = NCCL.model_copy(update={"tries": tries}), Means(devices=8, interfaces=tuple(sorted(interfaces)))
    tried = [Tried(case, None, failed(failure, phase))]
    for ran in runs:
        answer = triage.next_rung(tried, asked, means, obstacle)
        if isinstance(answer, LadderEnd):
            break
        assert isinstance(answer.case, TrainCase if answer.rung.name == "local_checkpoints" else ProbeCase)
        assert obstacle(answer.case) is None
        assert case_id(answer.case) not in {case_id(one.case) for one in tried}
        entry = ladder.ladders()["nccl"].rungs[answer.rung.name]
        assert {change.field for change in answer.rung.change} <= set(entry.changes)
        tried.append(Tried(answer.case, answer.rung, None if ran else failed(failure)))
    assert isinstance(answer, LadderEnd)
    assert len(tried) - 1 <= min(tries, 5)
    found = verdict(tried)
    assert bool(found.showed) == (len(tried) > 1)
