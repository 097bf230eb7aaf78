"""Event files become an observation, whatever is in them; a glance at a running job reads only their tails."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from fakes import records
from fakes import script as job
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness import observe
from harness.events import EventLog, file_of
from harness.schema import Observation, case_id

CASE = records.train_case(devices=2, strategy="ddp", steps=8, warmup_steps=2)


def written(folder: Path, case: Any = CASE) -> Path:
    """A job directory with the events of a training case that went well."""
    script = job.Script(folder / f"{case_id(case)}.1", seed=0)
    job.run_training(script, case)
    job.finish(script, case.devices)
    script.close()
    return script.folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("whole"))


def lines(folder: Path, *events: dict[str, Any], rank: int = 0) -> Path:
    """A job directory in which one rank wrote `events`."""
    folder.mkdir(parents=True, exist_ok=True)
    log = EventLog(str(folder), rank)
    for event in events:
        log.write(**event)
    log._file.close()
    return folder


# ---------------------------------------------------------------- what is there


def test_all_that_ranks_wrote_is_observed(whole: Path) -> None:
    seen = observe.observe(CASE, [whole])
    assert [rank.rank for rank in seen.ranks] == [0, 1]
    assert all(rank.ended and rank.steps.step == tuple(range(1, 9)) for rank in seen.ranks)
    assert seen.train is not None
    assert seen.train.warmup_steps == 2
    assert seen.train.eval_loss == 0.71
    assert seen.train.reload_ok is True
    assert seen.train.proof["trainable_parameters"] == 98_304
    assert {row.phase for row in seen.ranks[1].memory} >= {"load", "backward", "save"}
    assert seen.train.phases_s["load"] == 2.5
    assert seen.libraries["torch"] == "2.13.0+cpu"
    assert not seen.problems


def test_a_serving_job_shared_by_cases_gives_each_its_own_load_point(tmp_path: Path) -> None:
    cases = [records.serve_case(concurrency=n) for n in (1, 4)]
    script = job.Script(tmp_path / "shared.1", seed=0)
    job.run_serving(script, [(case_id(case), case) for case in cases])
    script.write(
        0, "error", case_id=case_id(cases[0]), phase="bench", type="BenchmarkFailed", message="x", traceback=""
    )
    script.close()
    first, second = (observe.observe(case, [script.folder]) for case in cases)
    assert first.serve
    assert first.serve.load
    assert first.serve.load.concurrency == 1
    assert second.serve
    assert second.serve.load
    assert second.serve.load.concurrency == 4
    assert first.serve.smoke == second.serve.smoke
    assert first.errors
    assert not second.errors
    stranger = observe.observe(records.serve_case(concurrency=8), [script.folder])
    assert stranger.serve
    assert stranger.serve.load is None


def test_a_chain_is_read_from_both_its_jobs() -> None:
    record = records.named()["chain_merged"]
    seen = record.attempts[0].observation
    assert seen.train
    assert seen.train.merge_s == 1.4
    assert seen.serve
    assert seen.serve.load
    assert seen.serve.ready_s == 31.0
    assert len(seen.ranks) == 1
    assert seen.ranks[0].steps.step


def test_nothing_gives_an_empty_observation(tmp_path: Path) -> None:
    assert observe.observe(CASE, []) == Observation()
    assert observe.observe(CASE, [tmp_path / "absent"]) == Observation()
    (tmp_path / "events.rank0.jsonl").touch()
    assert observe.observe(CASE, [tmp_path]).ranks[0].steps.step == ()


def test_a_folder_in_the_place_of_a_file_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "events.rank0.jsonl").mkdir()
    assert "cannot be read" in observe.observe(CASE, [tmp_path]).problems[0]


# ---------------------------------------------------------------- what is not


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_file_cut_at_any_byte_loses_only_its_last_line(whole: Path, data: st.DataObject) -> None:
    content = Path(file_of(str(whole), 1)).read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    folder = whole.parent / "cut"
    folder.mkdir(exist_ok=True)
    Path(file_of(str(folder), 0)).write_bytes(Path(file_of(str(whole), 0)).read_bytes())
    Path(file_of(str(folder), 1)).write_bytes(content[:cut])
    seen = observe.observe(CASE, [folder])
    left = [json.loads(line) for line in content[:cut].split(b"\n")[:-1]]
    last = content[:cut].split(b"\n")[-1]
    if last and content[cut : cut + 1] == b"\n":
        left.append(json.loads(last))
    assert len(seen.ranks[1].steps.step) == sum(event["kind"] == "step" for event in left)
    assert len(seen.problems) <= 1
    assert seen.ranks[0].ended
    observe.peek(folder)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from(["nan", "inf", "-inf", 10**400, -1, 0, 1, 2**63, 1e308, "\ud800", "<b>", "\x1b[31m", "end"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=8), inner, max_size=4)),
    max_leaves=8,
)
FIELDS = (
    "rank", "host", "pid", "libraries", "device", "baseline_rss_bytes", "name", "state", "duration_s", "phase", "step",
    "peak_allocated_bytes", "peak_rss_bytes", "mismatches", "warmup", "start", "step_time_s", "data_wait_s", "tokens",
    "before_collective_s", "padded_tokens", "loss", "grad_norm", "bytes", "writer_rank", "ok", "checks", "what", "argv",
    "max_abs_logit_difference", "ready_s", "facts", "kv_cache_bytes", "case_id", "concurrency", "input_len", "ttft",
    "output_len", "requests", "completed", "failed", "output_tokens", "text", "type", "message", "traceback", "t",
)  # fmt: skip
KINDS = ("start", "phase", "memory", "proof", "step", "eval", "save", "reload", "merge", "nonfinite", "server", "ready",
         "load_point", "smoke", "server_memory", "alive", "note", "error", "end", "nonsense", "")  # fmt: skip
EVENTS = st.builds(
    lambda kind, fields: {**fields, "kind": kind},
    st.sampled_from(KINDS),
    st.dictionaries(st.sampled_from(FIELDS), VALUES),
)
LINES = st.one_of(EVENTS.map(json.dumps), VALUES.map(json.dumps), st.text(max_size=40), st.just("[" * 3000))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=st.lists(LINES, max_size=12), serve=st.booleans())
def test_no_line_whatever_raises(tmp_path: Path, found: list[str], serve: bool) -> None:
    text = "\n".join(found).encode("utf-8", "surrogatepass")
    Path(file_of(str(tmp_path), 0)).write_bytes(text)
    (tmp_path / "job.json").write_bytes(text)
    case = records.serve_case() if serve else CASE
    seen = observe.observe(case, [tmp_path])
    assert Observation.model_validate_json(seen.model_dump_json()) == seen
    observe.peek(tmp_path)


@pytest.mark.parametrize("value", ["nan", "inf", "3", True, None, [1.0], {"a": 1}, 10**400, -1.0, math.inf])
def test_only_a_real_number_is_a_duration(tmp_path: Path, value: Any) -> None:
    folder = lines(tmp_path, {"kind": "step", "step": 1, "step_time_s": value, "tokens": value})
    steps = observe.observe(CASE, [folder]).ranks[0].steps
    assert steps.step_time_s == (None,)
    assert steps.tokens == (None,)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_known_by_step_and_rank(tmp_path: Path, value: float) -> None:
    lines(tmp_path, {"kind": "step", "step": 4, "loss": value}, {"kind": "step", "step": 5, "loss": value}, rank=1)
    lines(tmp_path, {"kind": "step", "step": 5, "loss": value}, rank=0)
    seen = observe.observe(CASE, [tmp_path])
    assert seen.train
    assert seen.train.nonfinite
    assert (seen.train.nonfinite.step, seen.train.nonfinite.rank) == (4, 1)
    assert seen.ranks[1].steps.loss == (None, None)


def test_an_evaluation_that_is_not_finite_is_no_loss(tmp_path: Path) -> None:
    seen = observe.observe(CASE, [lines(tmp_path, {"kind": "eval", "loss": math.nan})])
    assert seen.train
    assert seen.train.eval_loss is None
    assert seen.train.nonfinite
    assert seen.train.nonfinite.what == "eval_loss"


def test_problems_name_file_and_line_and_are_bounded(tmp_path: Path) -> None:
    Path(file_of(str(tmp_path), 3)).write_text('{"kind":"end","ok":true}\n' + "junk\n" * 1000)
    problems = observe.observe(CASE, [tmp_path]).problems
    assert problems[0] == f"{tmp_path.name}/events.rank3.jsonl:2: no event"
    assert len(problems) == observe.MAX_PROBLEMS + 1
    assert problems[-1] == "and 980 more"


def test_no_secret_and_no_terminal_control_gets_through(tmp_path: Path) -> None:
    secret = "hf_abcdefghijklmnopqrstuvwx"
    folder = lines(
        tmp_path,
        {"kind": "error", "type": "E\x1b[31m", "message": f"token={secret}", "traceback": f"x {secret}"},
        {"kind": "note", "text": secret}, {"kind": "server", "argv": ["vllm", secret]},
        {"kind": "proof", "adapter": {secret: secret}}, {"kind": "smoke", "ok": True, "text": secret},
    )  # fmt: skip
    for case in (CASE, records.serve_case()):
        text = observe.observe(case, [folder]).model_dump_json()
        assert "abcdefgh" not in text
        assert "\\u001b" not in text


def test_errors_stand_in_order_of_time_and_within_a_budget(tmp_path: Path) -> None:
    for rank in range(30):
        event = {"kind": "error", "t": 100.0 - rank, "type": "E", "message": "m" * 9000, "traceback": "t" * 9000}
        lines(tmp_path, event, rank=rank)
    seen = observe.observe(CASE, [tmp_path])
    assert [error["rank"] for error in seen.errors] == list(range(29, 13, -1))
    assert len(json.dumps(seen.errors)) < 40_000
    assert any("14 later errors" in problem for problem in seen.problems)


# ---------------------------------------------------------------- size


def test_a_payload_that_floods_every_field_makes_no_large_record(tmp_path: Path) -> None:
    long, wide = "x" * 9000, {f"{number}{'y' * 90}": "z" * 2000 for number in range(400)}
    for rank in range(2):
        flood: list[dict[str, Any]] = [{"kind": "start", "host": long, "libraries": wide, "device": wide}]
        flood += [{"kind": "proof", "adapter": wide, "x": [wide] * 9, "mismatches": [long + str(n) for n in range(99)]}]
        flood += [{"kind": "note", "text": f"{n}{long}"} for n in range(99)]
        flood += [{"kind": "memory", "phase": f"{n}{long}", "peak_rss_bytes": 2**62} for n in range(99)]
        flood += [{"kind": "phase", "name": f"{n}{long}", "state": "end", "duration_s": 1} for n in range(99)]
        flood += [{"kind": "error", "type": long, "message": long, "traceback": long} for _ in range(40)]
        flood += [{"kind": long} for _ in range(99)]
        flood += [{"kind": "ready", "facts": wide}, {"kind": "server", "argv": [long] * 99}]
        flood += [{"kind": "smoke", "ok": True, "text": long, "checks": dict.fromkeys(wide, True)}]
        lines(tmp_path, *flood, rank=rank)
    for case in (CASE, records.serve_case()):
        assert len(observe.observe(case, [tmp_path]).model_dump_json(indent=1)) < 150_000


def test_a_long_run_is_thinned_to_blocks_that_all_ranks_share(tmp_path: Path) -> None:
    case = records.train_case(devices=8, strategy="fsdp", steps=1000)
    record = records.measured_train(case, tmp_path)
    seen = record.attempts[0].observation
    kept = seen.ranks[0].steps.step
    assert len(record.model_dump_json(indent=1)) < 160_000
    assert all(rank.steps.step == kept for rank in seen.ranks)
    assert (kept[0], kept[-1]) == (1, 1000)
    assert f"keeps {len(kept)} of 1000 steps" in seen.notes[0]
    assert record.status == "measured"


@given(st.integers(0, 3000), st.integers(20, 400))
def test_thinning_keeps_whole_blocks_from_the_first_step_to_the_last(count: int, limit: int) -> None:
    steps = list(range(1, count + 1))
    kept = sorted(observe.kept_steps(steps, limit))
    if count <= limit:
        assert kept == steps
        return
    assert limit - observe.BLOCK < len(kept) <= limit
    assert (kept[0], kept[-1]) == (1, count)
    blocks = [kept[start : start + observe.BLOCK] for start in range(0, len(kept), observe.BLOCK)]
    assert all(block[-1] - block[0] == observe.BLOCK - 1 for block in blocks)
    gaps = [after[0] - before[0] for before, after in itertools.pairwise(blocks)]
    assert max(gaps) - min(gaps) <= 1


def test_numbers_keep_six_digits(tmp_path: Path) -> None:
    event = {"kind": "step", "step": 1, "loss": 1.23456789, "start": 1790000000.123456, "step_time_s": 0.000123456789}
    steps = observe.observe(CASE, [lines(tmp_path, event)]).ranks[0].steps
    assert (steps.loss, steps.start, steps.step_time_s) == ((1.23457,), (1790000000.123,), (0.000123457,))


# ---------------------------------------------------------------- a glance


def test_a_glance_at_training_shows_the_last_step_of_all_ranks(whole: Path) -> None:
    job = {"role": "train", "case": CASE.model_dump(mode="json")}
    (whole / "job.json").write_text(json.dumps(job))
    live = observe.peek(whole)
    steps = observe.observe(CASE, [whole]).ranks
    slowest = max(rank.steps.step_time_s[-1] or 0 for rank in steps)
    assert (live.step, live.total_steps, live.ended) == (8, 8, True)
    assert live.step_time_s == pytest.approx(slowest, rel=1e-5)
    assert live.tokens_per_s == pytest.approx(2 * 256 / slowest, rel=1e-5)
    assert live.loss == pytest.approx(steps[0].steps.loss[-1], rel=1e-5)


def test_a_glance_reads_only_tails(tmp_path: Path) -> None:
    events = [{"kind": "phase", "name": "train", "state": "begin"}]
    events += [{"kind": "step", "step": step, "step_time_s": 0.5, "tokens": 100} for step in range(1, 3000)]
    live = observe.peek(lines(tmp_path, *events))
    assert (live.phase, live.step, live.tokens_per_s) == ("train", 2999, 200.0)


def test_a_glance_at_serving_shows_the_load_points_done(tmp_path: Path) -> None:
    cases = [(name, records.serve_case(concurrency=n)) for n, name in enumerate("abc", 1)]
    (tmp_path / "job.json").write_text(json.dumps({"role": "serve", "cases": [{"id": name} for name, _ in cases]}))
    script = job.Script(tmp_path, seed=0)
    job.start_ranks(script, cases[0][1], 1)
    script.begin(1, "start_server")
    assert observe.peek(tmp_path).ready is False
    job.run_serving(script, cases[:2])
    live = observe.peek(tmp_path)
    assert (live.ready, live.load_points_done, live.load_points) == (True, 2, 3)
    script.close()


def test_a_glance_at_nothing_is_empty(tmp_path: Path) -> None:
    assert observe.peek(tmp_path / "absent") == observe.Live()


# ---------------------------------------------------------------- logs


def test_the_log_text_names_file_and_line_of_what_the_job_printed(tmp_path: Path) -> None:
    rank = tmp_path / "logs" / "x" / "attempt_0" / "1"
    rank.mkdir(parents=True)
    (rank / "stderr.log").write_text("one\ntwo\n")
    (tmp_path / "stderr.log").write_text("HF_TOKEN=abcdefgh\n\x1b[31mred\n")
    (tmp_path / "pids.log").write_text("4711 1\n")
    text = observe.log_text([tmp_path, tmp_path / "absent"])
    assert text == (
        f"==> {tmp_path.name}/logs/x/attempt_0/1/stderr.log:1 <==\none\ntwo\n"
        f"==> {tmp_path.name}/stderr.log:1 <==\nHF_TOKEN=***\nred\n"
    )
    assert observe.tail(text).endswith("HF_TOKEN=***\nred")


def test_of_a_long_log_both_ends_are_read_and_line_numbers_hold(tmp_path: Path) -> None:
    from harness.logs import split

    count = 150_000
    (tmp_path / "stdout.log").write_text("".join(f"line {n} of the log\n" for n in range(1, count + 1)))
    text = observe.log_text([tmp_path])
    found = list(split(text.rstrip("\n")))
    whole = [line for line in found if line.text.startswith("line ") and line.text.endswith(" of the log")]
    assert len(text) < 1_500_000
    assert whole[0].number == 1
    assert whole[-1].number == count
    assert all(line.text == f"line {line.number} of the log" for line in whole)
    assert len(found) - len(whole) <= 2
    assert len(observe.tail(text)) <= 12_000
