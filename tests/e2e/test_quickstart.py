"""The quickstart through the real command line, once, and what its real measurements have to be."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from harness import store
from harness.schema import ChainCase, RankObservation, Record, ServeCase, TrainCase
from harness.summary import ServeSummary, TrainSummary, summarize

pytestmark = [pytest.mark.payload, pytest.mark.server, pytest.mark.timeout(1800)]

ROOT = Path(__file__).resolve().parent.parent.parent
MATRIX = ROOT / "matrices" / "quickstart.yaml"
PHASES = {"load", "first_forward", "backward", "optimizer_step", "eval", "save"}


@dataclass(frozen=True)
class Called:
    """One call of the command line."""

    code: int
    output: str
    wall_s: float
    run: store.Run


def call(runs: Path, matrix: Path = MATRIX) -> Called:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "harness", "run", str(matrix), "--runs", str(runs)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    return Called(done.returncode, done.stdout, time.monotonic() - began, store.Run(runs / matrix.stem))


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Called:
    """The first call, which measures everything."""
    called = call(tmp_path_factory.mktemp("e2e"))
    tell(pytestconfig, f"quickstart, first call: {called.wall_s:.0f} s")
    return called


def tell(config: pytest.Config, line: str) -> None:
    """Print a figure that belongs into the log of a good run too."""
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print(f"\n{line}", flush=True)


def trained(run: store.Run) -> list[tuple[Record, TrainCase, TrainSummary]]:
    """Every training that was measured, those of chains too."""
    found = []
    for record in run.records():
        case = record.case.train if isinstance(record.case, ChainCase) else record.case
        summary = summarize(record)
        if isinstance(case, TrainCase) and summary and summary.train:
            found.append((record, case, summary.train))
    return found


def served(run: store.Run) -> list[tuple[Record, ServeCase, ServeSummary]]:
    """Every load point that was measured, those of chains too."""
    found = []
    for record in run.records():
        case = record.case.serve if isinstance(record.case, ChainCase) else record.case
        summary = summarize(record)
        if isinstance(case, ServeCase) and summary and summary.serve:
            found.append((record, case, summary.serve))
    return found


def proof(record: Record) -> dict[str, object]:
    assert record.last is not None
    assert record.last.observation.train is not None
    assert record.last.observation.train.proof_mismatches == ()
    return dict(record.last.observation.train.proof)


def ranks(record: Record) -> tuple[RankObservation, ...]:
    assert record.last is not None
    return record.last.observation.ranks


def test_it_succeeds_and_every_case_is_measured_or_a_skip_with_its_reason(first: Called) -> None:
    assert first.code == 0, first.output
    records = first.run.records()
    plan = first.run.plan()
    assert len(records) == len(plan.cases) + len(plan.skips)
    statuses = {record.case_id: record.status for record in records}
    assert set(statuses.values()) == {"measured", "skipped"}, statuses
    assert all(record.skip_reason for record in records if record.status == "skipped")
    kinds = {record.case.kind for record in records if record.status == "measured"}
    methods = {case.method for _, case, _ in trained(first.run)}
    assert (kinds, methods) == ({"train", "serve", "chain"}, {"lora", "qlora", "full"})
    assert all(record.last and all(job.outcome.ok for job in record.last.jobs) for record in records if record.last)


def test_ddp_and_fsdp_really_ran_on_two_ranks(first: Called) -> None:
    found = {case.strategy: (record, case) for record, case, _ in trained(first.run) if case.devices == 2}
    assert set(found) == {"ddp", "fsdp"}
    sharding = {strategy: proof(record)["sharding"] for strategy, (record, _) in found.items()}
    assert all(state["world_size"] == 2 for state in sharding.values())
    assert sharding["ddp"]["wrapper"] == "DistributedDataParallel"
    assert sharding["ddp"]["dtensor_parameters"] == 0
    assert sharding["fsdp"]["dtensor_parameters"] > 0
    assert sharding["fsdp"]["plain_parameters"] == 0
    for record, case in found.values():
        assert [rank.rank for rank in ranks(record)] == [0, 1]
        assert len({rank.pid for rank in ranks(record)}) == 2
        assert proof(record)["activation_checkpointing"] == {
            "blocks": 5,
            "on": 5 if case.activation_checkpointing else 0,
        }


def test_only_what_was_asked_is_trained(first: Called) -> None:
    for record, case, _ in trained(first.run):
        found = proof(record)
        share = found["trainable_parameters"] / found["total_parameters"]
        assert share == 1 if case.method == "full" else 0 < share < 0.5
        if case.method == "qlora":
            assert found["quantization"]["linear_4bit"] > 0


def test_losses_are_finite_and_fall(first: Called) -> None:
    for record, case, summary in trained(first.run):
        for rank in ranks(record):
            assert len(rank.steps.loss) == case.steps
            assert all(loss is not None and math.isfinite(loss) for loss in rank.steps.loss)
            assert all(norm is not None and 0 < norm < math.inf for norm in rank.steps.grad_norm)
        assert summary.loss_first is not None
        assert summary.loss_last is not None
        assert summary.loss_last < summary.loss_first, record.case_id
        assert summary.eval_loss is not None
        assert summary.eval_loss < summary.loss_first


def test_throughput_is_tokens_over_the_slowest_ranks_step_times_without_the_warm_up(first: Called) -> None:
    """From the raw series, by a second and plainer road than `summarize` takes."""
    for record, case, summary in trained(first.run):
        steps = [rank.steps for rank in ranks(record)]
        steady = range(case.warmup_steps, case.steps)
        assert summary.steady_steps == len(steady) == case.steps - case.warmup_steps
        slowest = sum(max(one.step_time_s[i] or 0.0 for one in steps) for i in steady)
        tokens = sum(one.tokens[i] or 0 for one in steps for i in steady)
        assert tokens == len(steady) * case.devices * case.micro_batch * case.grad_accum * case.seq_len
        assert summary.tokens_per_s == pytest.approx(tokens / slowest, rel=1e-3)
        assert summary.tokens_per_s_per_device == pytest.approx(tokens / slowest / case.devices, rel=1e-3)
        starts = [[start or 0.0 for start in one.start] for one in steps]
        for one, begun in zip(steps, starts, strict=True):
            assert begun == sorted(begun)
            covered = begun[-1] + (one.step_time_s[-1] or 0.0) - begun[case.warmup_steps]
            spent = sum(one.step_time_s[i] or 0.0 for i in steady)
            assert spent <= covered * 1.05, record.case_id  # step times are parts of the wall clock


def test_memory_peaks_are_there_for_each_rank_and_phase(first: Called) -> None:
    for record, _, _ in trained(first.run):
        for rank in ranks(record):
            assert {row.phase for row in rank.memory} >= PHASES
            assert rank.baseline_rss_bytes is not None
            assert all((row.peak_rss_bytes or 0) >= rank.baseline_rss_bytes * 0.9 for row in rank.memory)
            assert all(row.peak_allocated_bytes is None for row in rank.memory)  # no GPU, so no number of one


def test_the_saved_model_reads_back_equal(first: Called) -> None:
    for record, _, _ in trained(first.run):
        assert record.last is not None
        train = record.last.observation.train
        assert train is not None
        assert train.reload_ok is True
        assert train.reload_max_abs_logit_difference is not None
        assert train.reload_max_abs_logit_difference < 1e-3
        assert train.checkpoint_writer == 0
        assert (train.checkpoint_bytes or 0) > 10_000


def test_every_load_point_was_answered_in_full(first: Called) -> None:
    points = served(first.run)
    assert len(points) == 5
    for _, case, summary in points:
        load = summary.load
        assert load is not None
        assert (load.concurrency, load.input_len, load.output_len) == (
            case.concurrency,
            case.input_len,
            case.output_len,
        )
        assert (load.completed, load.failed) == (case.requests, 0)
        assert load.output_tokens == case.requests * case.output_len
        assert load.output_tokens_per_s == pytest.approx(load.output_tokens / load.duration_s, rel=0.02)
        assert load.ttft.p50_s is not None
        assert load.tpot.p50_s is not None
        assert 0 < load.ttft.p50_s <= (load.ttft.p95_s or 0) <= (load.ttft.p99_s or 0) < load.duration_s
        per_request = load.ttft.p50_s + load.tpot.p50_s * (case.output_len - 1)
        rounds = case.requests / case.concurrency
        assert per_request * rounds == pytest.approx(load.duration_s, rel=1.0)
        assert (summary.ready_s or 0) > 1
        assert (summary.kv_cache_bytes or 0) > 0
        assert (summary.peak_rss_bytes or 0) > 2**28


def test_load_points_share_one_server(first: Called) -> None:
    jobs = {
        record.last.jobs[-1].dir for record, _, _ in served(first.run) if record.last and record.case.kind == "serve"
    }
    assert len(jobs) == 1


def test_the_smoke_request_of_each_server_passed_and_adapters_change_the_answer(first: Called) -> None:
    adapters = set()
    for record, _, summary in served(first.run):
        assert summary.smoke is not None
        assert summary.smoke.ok
        assert (summary.smoke.generated_tokens or 0) > 0
        assert (summary.smoke.latency_s or 0) > 0
        assert all(summary.smoke.checks.values()), summary.smoke.checks
        if isinstance(record.case, ChainCase):
            adapters.add(record.case.serve.adapter)
            if record.case.serve.adapter == "adapter":
                assert summary.smoke.checks["adapter_differs_from_base"] is True
            else:
                assert record.last is not None
                assert record.last.observation.train is not None
                assert (record.last.observation.train.merge_s or 0) > 0
    assert adapters == {"adapter", "merged"}


def test_records_say_where_their_numbers_come_from(first: Called) -> None:
    for record in first.run.records():
        if record.status == "skipped":
            continue
        known = record.provenance
        assert known is not None
        assert (known.number_kind, known.weights, known.backend) == ("measured", "random", "local")
        assert {environment.name for environment in known.environments} == {"train", "serve"}
        assert known.environments[0].libraries["torch"]
        assert len(first.run.record_path(record.case_id).read_bytes()) < 200_000


def test_the_report_needs_nothing_from_the_network(first: Called) -> None:
    page = (first.run.folder / "index.html").read_text()
    assert str(first.run.folder / "index.html") in first.output
    assert not re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)\s*=\s*[\"']?(?:https?:)?//", page)
    assert not re.search(r"@import|url\(\s*[\"']?https?:", page)
    assert all(record.case_id in page for record in first.run.records() if record.status == "measured")


def test_nothing_large_stays_behind(first: Called) -> None:
    assert not list(first.run.folder.rglob("artifacts"))
    size = sum(path.stat().st_size for path in first.run.folder.rglob("*") if path.is_file())
    assert size < 30 * 2**20


def test_a_second_call_measures_nothing_in_under_ten_seconds(first: Called, pytestconfig: pytest.Config) -> None:
    before = {path: path.stat().st_mtime_ns for path in first.run.folder.glob("cases/*/record.json")}
    jobs = sorted(path.name for path in first.run.jobs_dir.iterdir())
    again = call(first.run.folder.parent)
    tell(pytestconfig, f"quickstart, second call: {again.wall_s:.1f} s")
    assert again.code == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert sorted(path.name for path in first.run.jobs_dir.iterdir()) == jobs
    assert again.wall_s < 10
