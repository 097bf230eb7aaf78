"""Drills: what they say they inject, what a scorecard counts, and triage over the logs that they left.

`tests/drills` holds logs of real faults (`harness drill`), made anonymous by `tools/drill_fixtures`;
`truth.json` beside each says what was done, with what, and when.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from harness import drill
from harness.drill import show
from harness.drill.faults import chosen, faults, job_of
from harness.drill.run import _not_injected
from harness.drill.score import Drilled, Truth, exit_code, mistakes, summary, truth_of
from harness.errors import HarnessError
from harness.payload.drills import stage
from harness.schema import Culprit, LogVerdict, NextStep
from harness.triage import triage
from harness.triage.signature import kinds

DRILLS = Path(__file__).parent / "drills"
FOLDERS = sorted(path.parent for path in DRILLS.glob("*/truth.json"))
PROGRAMS = Path(drill.__file__).parent.parent / "payload" / "drills"
ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------- triage over what drills left


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_triage_names_what_was_done(folder: Path) -> None:
    truth = Truth.model_validate_json((folder / "truth.json").read_text())
    verdict = triage([folder / "seen"])
    assert mistakes(truth, verdict) == [], verdict.evidence
    assert truth.libraries["torch"] or truth.libraries["vllm"]
    assert truth.when


def test_there_are_enough_of_them() -> None:
    names = {folder.name.rsplit("-", 1)[0] for folder in FOLDERS}
    faulty = {one.name for one in faults() if one.device == "cpu" and not one.healthy}
    assert len(names & faulty) >= 18
    assert len(names & {one.name for one in faults() if one.healthy}) >= 10
    for name in names & faulty:
        assert {f"{name}-on", f"{name}-off"} <= {folder.name for folder in FOLDERS}


def test_nothing_in_them_names_a_machine_or_a_secret() -> None:
    for path in DRILLS.rglob("*"):
        if path.is_file():
            text = path.read_text()
            assert len(text) < 40_000, path
            assert not re.search(r"/(?:home|root|work|tmp)/(?!vllm_dist_)", text), path
            assert not re.search(
                r"(?<![\d.\"])(?!127\.|0\.0\.0\.0|192\.0\.2\.1\b)\d{1,3}(?:\.\d{1,3}){3}(?![\d.])", text
            ), path


def test_the_readme_says_which_faults_of_gpus_were_never_injected() -> None:
    names = {folder.name.rsplit("-", 1)[0] for folder in FOLDERS}
    all_of_them = [one.name for one in faults() if one.device == "cuda"]
    absent = [name for name in all_of_them if name not in names]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"Of the {len(all_of_them)} for GPUs {len(all_of_them) - len(absent)} were injected" in readme
    assert f"not injected yet: {', '.join(f'`{name}`' for name in absent)}." in readme


# ---------------------------------------------------------------- the list of faults


def test_each_fault_has_a_class_a_sentence_and_a_program_that_is_there() -> None:
    found = [one.name for one in faults()]
    assert len(found) == len(set(found))
    for one in faults():
        assert one.failure_class in kinds(), one.name
        assert one.done.endswith("."), one.name
        assert bool(one.program) != (one.job is not None), one.name
        if one.program:
            module, function = one.program.split(".")
            source = (PROGRAMS / f"{module}.py").read_text()
            assert re.search(rf"^def {function}\(\) -> None:", source, re.MULTILINE), one.program
        assert one.off is None or one.off.why


def test_the_issues_share_of_faults_is_there() -> None:
    cpu = [one for one in faults() if one.device == "cpu" and not one.healthy]
    assert len(cpu) >= 18
    assert sum(one.healthy for one in faults() if one.device == "cpu") >= 10
    one_gpu = {one.failure_class for one in faults() if one.device == "cuda" and one.gpus == 1}
    assert one_gpu >= {
        "oom_gpu_load", "oom_gpu_forward", "oom_gpu_backward", "oom_gpu_optimizer", "oom_gpu_save_eval",
        "oom_gpu_contention", "cuda_illegal", "serve_kv_cache", "nccl_invalid_usage",
    }  # fmt: skip
    two = {one.failure_class for one in faults() if one.gpus == 2}
    assert two >= {"coll_timeout", "peer_lost", "coll_mismatch", "nccl_bootstrap_net", "oom_gpu_forward"}


def test_a_job_says_nothing_of_the_truth() -> None:
    for one in faults():
        for debug in (False, True):
            order = job_of(one, debug).payload["drill"]
            assert isinstance(order, dict)
            said = json.dumps({**order, "program": ""})
            assert one.failure_class not in said, one.name
            assert one.done not in said, one.name


def test_debug_variables_are_set_on_demand_alone() -> None:
    (fault,) = chosen("nccl-straggler", "cuda")
    on, off = (job_of(fault, debug).payload["drill"] for debug in (True, False))
    assert isinstance(on, dict)
    assert isinstance(off, dict)
    assert on["env"]["NCCL_DEBUG"] == "INFO"
    assert "NCCL_DEBUG" not in off["env"]


def test_a_fault_in_a_job_of_ours_wraps_its_entry_point_and_nothing_else() -> None:
    (fault,) = chosen("job-rank-killed", "cpu")
    job = job_of(fault, debug=False)
    order = job.payload["drill"]
    assert isinstance(order, dict)
    assert order["argv"][-2:] == ["harness.payload.drills.job", "job.json"]
    assert job.payload["fault"] == {"what": "kill", "rank": 1, "step": 3}
    assert job.payload["case"]["devices"] == 2  # type: ignore[index,call-overload]


def test_a_misspelt_fault_is_one_message_with_the_nearest() -> None:
    with pytest.raises(HarnessError, match="did you mean peer-killed"):
        chosen("peer-kiled", "cpu")


# ---------------------------------------------------------------- the scorecard


def verdict(name: str, rank: int | None = None) -> LogVerdict:
    culprit = None if rank is None else Culprit(rank=rank)
    return LogVerdict(failure_class=name, summary="", culprit=culprit, next=NextStep(step="x"))


def test_a_wrong_class_a_wrong_rank_and_a_rank_too_many_are_mistakes() -> None:
    (straggler,), (port,) = chosen("straggler", "cpu"), chosen("port-taken", "cpu")
    truth = truth_of(straggler, debug=False)
    assert mistakes(truth, verdict("coll_timeout", 1)) == []
    assert len(mistakes(truth, verdict("peer_lost", 0))) == 2
    assert mistakes(truth, verdict("coll_timeout")) == ["no rank named, but it was rank 1"]
    assert mistakes(truth_of(port, debug=False), verdict("port_in_use", 0)) == ["rank 0 named, but it was no rank"]


def test_what_a_log_cannot_show_is_not_asked_of_triage() -> None:
    (left,) = chosen("collective-left", "cpu")
    assert mistakes(truth_of(left, debug=False), verdict("peer_lost")) == []
    assert mistakes(truth_of(left, debug=True), verdict("peer_lost")) != []


def drilled(status: Any, expected: str = "peer_lost", found: str = "peer_lost") -> Drilled:
    return Drilled(name="x", debug=False, status=status, expected_class=expected, found_class=found)


def test_the_exit_code_says_whether_triage_was_right_wrong_or_not_asked() -> None:
    right, wrong = drilled("right"), drilled("wrong", found="unknown")
    assert exit_code([right, drilled("skipped")]) == 0
    assert exit_code([right, wrong]) == 1
    assert exit_code([drilled("skipped")]) == 2
    assert exit_code([right, drilled("not injected")]) == 2
    counts = summary([right, wrong, drilled("wrong", "no_failure", "peer_lost")])
    assert (counts["faults"], counts["class_right"], counts["healthy"], counts["false_alarms"]) == (2, 1, 1, 1)


def said(*parts: Any) -> str:
    """What stands on a terminal of 80 columns."""
    from rich.console import Console

    out = Console(width=80, file=io.StringIO(), record=True)
    out.print(*parts, sep="\n")
    text: str = out.export_text()
    assert max(map(len, text.splitlines())) <= 80
    return text


def test_every_fault_has_one_line_of_at_most_80_columns_with_both_results() -> None:
    found = [truth_of(one, debug) for one in faults() for debug in (False, True)]
    results = [
        drilled("right", one.shown_class, one.shown_class).model_copy(
            update={
                "name": one.fault,
                "debug": one.debug,
                "expected_culprit": one.shown_culprit,
                "seconds": 101.0,
                "why": one.why,
            }
        )
        for one in found
    ]
    rows = said(show.table(results, Path("drills/x"))).splitlines()
    for one in faults():
        assert sum(row.split()[:1] == [one.name] for row in rows) == 1, one.name
    assert "note: nccl-killed-off: The other rank waits" in " ".join(rows)
    assert len(said(*(show.line(one, 130, 130) for one in results)).splitlines()) == len(results)


def test_the_table_says_what_was_wrong_and_where_to_read_it_and_each_reason_once() -> None:
    wrong = drilled("wrong", found="unknown").model_copy(update={"reason": "class unknown", "folder": "x-off"})
    skips = [drilled("skipped").model_copy(update={"name": name, "reason": "no vLLM"}) for name in ("b", "a")]
    text = said(show.table([wrong, *skips], Path("drills/1")))
    assert "wrong: x-off: class unknown" in text
    assert "harness triage drills/1/x-off/seen" in text
    assert "skipped: a, b: no vLLM" in text


def test_the_list_says_what_is_really_done() -> None:
    text = said(show.listing(chosen(None, "cuda")))
    assert "gpu-oom-load-pretrained" in text
    assert "Rank 1 sends itself SIGKILL" in text


def test_a_program_that_failed_before_its_deed_counts_as_not_injected() -> None:
    (fault,) = chosen("gpu-oom-evaluate", "cuda")
    truth = truth_of(fault, debug=False)
    assert _not_injected(truth, {"exit_code": 1, "undone": "training failed"}) == "training failed"
    assert _not_injected(truth, {"exit_code": 1}) == ""
    assert "nothing were wrong" in _not_injected(truth, {"exit_code": 0})


def staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str) -> tuple[dict[str, Any], str]:
    """How a program of Python ended on the stage, and what it printed."""
    order = {"argv": ["-c", program], "env": {}, "needs": [], "prepare": "", "ranks": 0, "signal": None,
             "limit_s": 20.0, "debug": False}  # fmt: skip
    (tmp_path / "job.json").write_text(json.dumps({"drill": order}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert stage.main(["job.json"]) == 0
    return json.loads((tmp_path / "ended.json").read_text()), (tmp_path / "seen" / "console.log").read_text()


def test_what_a_program_leaves_in_temporary_folders_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, printed = staged(tmp_path, monkeypatch, "import tempfile; print(tempfile.mkdtemp())")
    assert ended["exit_code"] == 0
    assert not Path(printed.strip()).parent.exists()


def test_the_stage_says_of_a_program_that_it_never_came_to_its_deed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = "from harness.payload.drills.deed import done, intend; intend('no compiler'); "
    ended, _ = staged(tmp_path, monkeypatch, begin + "1 / 0; done()")
    assert (ended["exit_code"], ended["undone"]) == (1, "no compiler")
    ended, _ = staged(tmp_path, monkeypatch, begin + "done(); 1 / 0")
    assert "undone" not in ended


# ---------------------------------------------------------------- for real


@pytest.mark.payload
def test_quick_faults_are_injected_for_real_and_named(tmp_path: Path) -> None:
    if not (ROOT / ".envs" / "train").exists():
        pytest.skip("the training environment is missing: ./tools/setup train")
    quick = ",".join(one.name for one in faults() if one.quick)
    results = drill.run(drill.Options(tmp_path / "drill", only=quick, debug="off"))
    assert {one.status for one in results} <= {"right", "skipped"}, [one.reason for one in results if one.reason]
    assert len(results) == sum(one.quick for one in faults())
    assert json.loads((tmp_path / "drill" / "scorecard.json").read_text())["summary"]["culprit_wrong"] == 0


@pytest.mark.payload
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_every_fault_of_a_cpu_is_injected_for_real_and_named(tmp_path: Path) -> None:
    results = drill.run(drill.Options(tmp_path / "drill", debug="both"))
    assert {one.status for one in results} <= {"right", "skipped"}, [one for one in results if one.status != "right"]
