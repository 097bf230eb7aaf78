"""Probes: what a matrix says of them, how they are started, what their lines come to, and what a report shows."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from fakes.records import probe_case, provenance
from fakes.script import BEGAN, Script, run_probe
from hypothesis import example, given
from hypothesis import strategies as st

from harness import evidence, launch, matrix, observe, triage
from harness.errors import HarnessError
from harness.matrix import rules
from harness.report import figures, terminal
from harness.report.entry import ReportRun, entries
from harness.report.page import html_of
from harness.report.words import TIMES
from harness.schema import Attempt, NcclFacts, Observation, Outcome, ProbeCase, Record, TrainCase, case_id
from harness.summary import summarize
from harness.summary.probes import bus_factor

OUTCOME = Outcome(exit_code=0, start=BEGAN, end=BEGAN + 10)


def seen_of(folder: Path, case: ProbeCase, **how: Any) -> Observation:
    script = Script(folder / f"{case_id(case)}.1", 0)
    run_probe(script, case, **how)
    script.close()
    return observe.observe(case, [script.folder])


def record_of(case: ProbeCase, observation: Observation, outcome: Outcome = OUTCOME) -> Record:
    diagnosis = triage.diagnose(case, [outcome], observation, "")
    attempt = Attempt(number=1, jobs=(), observation=observation, diagnosis=diagnosis)
    return Record(case_id=case_id(case), case=case, status="failed" if diagnosis else "measured", attempts=(attempt,),
                  finished_at=BEGAN)  # fmt: skip


# ---------------------------------------------------------------- matrix and launch


def plan_of(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "m.yaml"
    path.write_text(f"version: 1\nname: m\n{text}")
    return matrix.load(path)


def test_a_block_of_probes_is_a_product_in_which_a_list_of_sizes_is_one_value(tmp_path: Path) -> None:
    sizes = "sizes: [1KiB, 4096, 2 MiB], time_limit: 2m"
    plan = plan_of(tmp_path, f"probe:\n  - {{device: cuda, devices: [2, 4], p2p: [true, false], {sizes}}}\n")
    assert len(plan.cases) == 4
    assert {case.sizes_bytes for case in plan.cases} == {(1024, 4096, 2 * 2**20)}
    assert plan.cases[0].time_limit_s == 120.0
    assert len({case_id(case) for case in plan.cases}) == 4


def test_defaults_of_training_that_a_probe_knows_reach_it(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "defaults: {device: cpu, devices: 2, seq_len: 128}\nprobe:\n  - interface: lo\n")
    assert plan.cases == (ProbeCase(device="cpu", devices=2, interface="lo"),)


def test_an_exclude_of_probes_sees_their_own_defaults(tmp_path: Path) -> None:
    text = "probe:\n  - {device: cpu, repeat: 2, debug: [true, false], exclude: [{devices: 2, debug: true}]}\n"
    assert [skip.rule for skip in plan_of(tmp_path, text).skips] == ["excluded", "excluded"]


@pytest.mark.parametrize(
    ("point", "said"),
    [
        ("sizes: [3]", "a multiple of 4 bytes"),
        ("sizes: 1KiB", "must be a list of sizes"),
        ("sizes: [5KB]", "bytes or a size such as 64MiB"),
        ("sizes: [32GiB]", "at most 16GiB"),
        ("variant: tiny-hybrid", "unknown key 'variant'"),
        ("iterations: 0", "at least 1"),
    ],
)
def test_a_mistake_in_a_probe_is_named(tmp_path: Path, point: str, said: str) -> None:
    with pytest.raises(HarnessError, match=said):
        plan_of(tmp_path, f"probe:\n  - {{device: cpu, {point}}}\n")


BROKEN = {
    "probe_needs_two_ranks": "device: cpu, devices: 1",
    "ranks_uneven_over_nodes": "device: cuda, devices: 4, nodes: 3",
    "p2p_needs_gpu": "device: cpu, p2p: false",
}
SOUND = ("device: cpu, devices: 2", "device: cuda, devices: 4, nodes: 2", "device: cuda, p2p: false")


@pytest.mark.parametrize("rule", [rule.__name__ for rule in rules.PROBE_RULES])
def test_a_probe_that_cannot_be_is_a_skip(tmp_path: Path, rule: str) -> None:
    plan = plan_of(tmp_path, f"probe: {{{BROKEN[rule]}}}\n")
    assert [skip.rule for skip in plan.skips] == [rule]


@pytest.mark.parametrize("point", SOUND)
def test_the_nearest_probe_that_can_be_is_a_case(tmp_path: Path, point: str) -> None:
    assert len(plan_of(tmp_path, f"probe: {{{point}}}\n").cases) == 1


def job_of(case: ProbeCase) -> Any:
    (job,) = launch.jobs((case,), 1)
    return job


def test_a_probe_runs_under_torchrun_in_the_training_environment() -> None:
    job = job_of(probe_case(device="cuda", devices=4))
    assert job.environment == "train"
    assert job.argv[:3] == ("python", "-m", "torch.distributed.run")
    assert "--nproc_per_node=4" in job.argv
    assert job.argv[-2:] == ("harness.payload.probe", "job.json")
    assert job.env["NCCL_DEBUG"] == "INFO"
    assert "NCCL_P2P_DISABLE" not in job.env


def test_what_a_probe_pins_stands_in_its_environment() -> None:
    env = job_of(probe_case(device="cuda", interface="eth0", p2p=False, debug=True)).env
    assert env["NCCL_SOCKET_IFNAME"] == "=eth0"
    assert env["NCCL_P2P_DISABLE"] == "1"
    assert "TUNING" in env["NCCL_DEBUG_SUBSYS"]
    assert env["TORCH_NCCL_TRACE_BUFFER_SIZE"] == "2000"
    cpu = job_of(probe_case(interface="eth0", debug=True)).env
    assert (cpu["GLOO_SOCKET_IFNAME"], cpu["TORCH_DISTRIBUTED_DEBUG"]) == ("eth0", "DETAIL")
    assert job_of(probe_case()).env["GLOO_SOCKET_IFNAME"] == "lo"


def test_ranks_on_one_host_never_look_up_its_name() -> None:
    several = TrainCase(variant="tiny-hybrid", device="cpu", method="full", seq_len=64, devices=2, strategy="ddp")
    for case in (probe_case(), several):
        (job,) = launch.jobs((case,), 1)
        assert "--local-addr=127.0.0.1" in job.argv


def test_a_probe_of_several_nodes_meets_at_the_first() -> None:
    job = job_of(probe_case(device="cuda", devices=4, nodes=2))
    assert {"--nnodes=2", "--nproc_per_node=2", "--rdzv_endpoint={head}:{port}"} <= set(job.argv)
    assert (job.nodes, job.devices) == (2, 4)


# ---------------------------------------------------------------- observation and diagnosis


def test_all_that_ranks_wrote_is_observed_and_measured(tmp_path: Path) -> None:
    case = probe_case()
    seen = seen_of(tmp_path, case)
    assert seen.train is None
    assert seen.serve is None
    assert seen.probe is not None
    assert (seen.probe.backend, seen.probe.timer) == ("gloo", "host clock")
    assert [(one.rank, one.size_bytes, len(one.time_s)) for one in seen.probe.series] == [
        (0, 1024, 4), (0, 2**20, 4), (1, 1024, 4), (1, 2**20, 4)]  # fmt: skip
    assert triage.diagnose(case, [OUTCOME], seen, "") is None


def test_a_wrong_sum_is_no_measurement(tmp_path: Path) -> None:
    case = probe_case()
    diagnosis = triage.diagnose(case, [OUTCOME], seen_of(tmp_path, case, wrong=True), "")
    assert diagnosis is not None
    assert diagnosis.failure_class == "not_as_requested"
    assert "rank 1 found 4.0 for all_reduce_sum, not 3.0" in diagnosis.summary


def test_p2p_that_nccl_used_all_the_same_is_no_measurement(tmp_path: Path) -> None:
    case = probe_case(device="cuda", p2p=False, interface="eth0")
    nccl = NcclFacts(transports={"P2P/CUMEM": 2}, interfaces=("eth1",))
    seen = seen_of(tmp_path, case).model_copy(update={"nccl": nccl})
    diagnosis = triage.diagnose(case, [OUTCOME], seen, "")
    assert diagnosis is not None
    assert diagnosis.failure_class == "not_as_requested"
    assert "P2P was to be off, and NCCL connects ranks by P2P/CUMEM" in diagnosis.summary
    shared = seen.model_copy(update={"nccl": NcclFacts(transports={"SHM/direct/direct": 2}, interfaces=("eth0",))})
    assert triage.diagnose(case, [OUTCOME], shared, "") is None


def test_a_probe_that_stopped_halfway_is_a_failure(tmp_path: Path) -> None:
    case = probe_case()
    script = Script(tmp_path / "job.1", 0)
    run_probe(script, case)
    script.close()
    path = script.folder / "events.rank1.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-2]) + "\n")
    diagnosis = triage.diagnose(case, [OUTCOME], observe.observe(case, [script.folder]), "")
    assert diagnosis is not None
    assert "1 of 2 sizes were not measured on every rank" in diagnosis.summary


@given(st.integers(0, 4000))
def test_files_cut_at_any_byte_are_observed(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    case = probe_case()
    folder = tmp_path_factory.mktemp("cut") / "job.1"
    script = Script(folder, 0)
    run_probe(script, case)
    script.close()
    path = folder / "events.rank0.jsonl"
    path.write_bytes(path.read_bytes()[:cut])
    seen = observe.observe(case, [folder])
    summarize(record_of(case, seen))


@example([1e-307])
@given(st.lists(st.one_of(st.none(), st.floats(), st.text(), st.integers(), st.lists(st.floats()))))
def test_columns_of_anything_are_taken_or_left(tmp_path_factory: pytest.TempPathFactory, values: list[Any]) -> None:
    folder = tmp_path_factory.mktemp("odd") / "job.1"
    script = Script(folder, 0)
    script.write(0, "collective", size_bytes=1024, time_s=values)
    script.write(0, "arrival", work_s=values, wait_s=7)
    script.write(0, "check", name=values, ok=1)
    script.close()
    case = probe_case(sizes_bytes=(1024,))
    seen = observe.observe(case, [folder])
    summarize(record_of(case, seen))


def test_a_record_of_many_ranks_stays_small_and_says_what_it_left_out(tmp_path: Path) -> None:
    case = probe_case(devices=64, sizes_bytes=tuple(4 * 2**n for n in range(20)), iterations=500)
    seen = seen_of(tmp_path, case)
    assert any("ranks' times" in note for note in seen.notes)
    assert len(record_of(case, seen).model_dump_json(indent=1)) < 200_000


# ---------------------------------------------------------------- statistics and report


def test_bandwidth_is_that_of_the_slowest_rank_by_the_median(tmp_path: Path) -> None:
    case = probe_case(iterations=3)
    found = summarize(record_of(case, seen_of(tmp_path, case)))
    assert found is not None
    assert found.probe is not None
    large = found.probe.sizes[-1]
    assert (large.n, large.warmup) == (3, 5)
    assert large.median_s == pytest.approx(2 * 2**20 * 1e-9, rel=1e-5)
    assert large.min_s == pytest.approx(2**20 * 1e-9, rel=1e-5)
    assert large.algorithm_bytes_per_s == pytest.approx(5e8, rel=1e-5)
    assert large.bus_bytes_per_s == large.algorithm_bytes_per_s  # two ranks: 2(n-1)/n is 1
    assert found.probe.latency_s == found.probe.sizes[0].median_s


@pytest.mark.parametrize(("ranks", "factor"), [(2, 1.0), (4, 1.5), (8, 1.75)])
def test_bus_bandwidth_is_scaled_by_the_ranks(ranks: int, factor: float) -> None:
    assert bus_factor(ranks) == factor


def test_a_rank_that_comes_late_is_named(tmp_path: Path) -> None:
    case = probe_case()
    late = record_of(case, seen_of(tmp_path, case, late=1))
    found = summarize(late)
    assert found is not None
    assert found.probe is not None
    assert (found.probe.late_rank, found.probe.work_s, found.probe.rounds) == (1, {0: 0.01, 1: 0.02}, 4)
    assert found.probe.wait_s[0] > found.probe.wait_s[1]
    even = summarize(record_of(case, seen_of(tmp_path / "even", case)))
    assert even is not None
    assert even.probe is not None
    assert even.probe.late_rank is None


def printed(part: Any) -> str:
    from rich.console import Console

    out = Console(width=80, record=True, file=io.StringIO())
    out.print(part)
    return out.export_text()


def test_the_terminal_says_bandwidth_and_who_comes_late(tmp_path: Path) -> None:
    case = probe_case()
    record = record_of(case, seen_of(tmp_path, case, late=1))
    line = printed(terminal.line(record, 1, 1))
    assert "GB/s bus" in line
    shown = printed(terminal.case(record, tmp_path))
    for words in ("1.00 MiB", "bus GB/s", "rank 1: its work takes 1.33", "TCP over lo", "2 of 2 known results"):
        assert words in shown, shown


def test_the_page_has_a_table_of_probes(tmp_path: Path) -> None:
    case = probe_case()
    records = (record_of(case, seen_of(tmp_path, case)),)
    page = html_of([ReportRun("run", BEGAN, records, str(tmp_path))], tmp_path)
    assert "Probes of the communication between ranks" in page
    entry = entries("run", records)[0]
    assert entry.subject == f"gloo {TIMES} 2"
    assert entry.subject in page


def test_a_probe_round_trips_as_json() -> None:
    case = probe_case(interface="eth0", p2p=True, debug=True)
    assert ProbeCase.model_validate_json(case.model_dump_json()) == case
    assert json.loads(case.model_dump_json())["kind"] == "probe"
    assert case_id(case).startswith("probe-gloo2-eth0-debug-")


def test_a_figure_draws_bandwidth_over_size(tmp_path: Path) -> None:
    case = probe_case()
    drawn = figures.bus_bandwidth(entries("run", [record_of(case, seen_of(tmp_path, case))]))
    assert drawn is not None
    (line,) = drawn.figure["data"]
    assert line["x"] == [1024, 2**20]
    assert all(0.3 < value < 0.5 for value in line["y"])
    assert figures.bus_bandwidth([]) is None


def test_a_probe_measured_elsewhere_stands_for_one_here(tmp_path: Path) -> None:
    case = probe_case()
    record = record_of(case, seen_of(tmp_path, case)).model_copy(update={"provenance": provenance(case)})
    folder = tmp_path / "old" / "cases" / record.case_id
    folder.mkdir(parents=True)
    (folder / "record.json").write_text(record.model_dump_json())
    here = evidence.Place(provenance(case).environments, (), "Xeon")
    found = evidence.below([tmp_path / "old"])
    assert evidence.standing(case, found, here) == folder / "record.json"
    assert evidence.standing(case, found, evidence.Place(here.environments, (), "another")) is None
