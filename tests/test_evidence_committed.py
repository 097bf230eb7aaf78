"""The evidence under reports/: it renders with no GPU and no network, it is small, and the README says what it says."""

import importlib
import json
import re
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fakes import records as fakes

from harness import drill, results, store
from harness.schema import TrainCase
from harness.summary import summarize

ROOT = Path(__file__).parent.parent
RUNS = sorted(path.parent for path in (ROOT / "reports").glob("*/run.json"))


@pytest.fixture
def results_table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("results_table")


@pytest.mark.parametrize("run", RUNS, ids=lambda path: path.name)
def test_a_committed_run_renders_from_its_records(run: Path, tmp_path: Path) -> None:
    (page,) = results.make_report([store.Run.existing(run)], tmp_path / "index.html")
    assert page.stat().st_size > 1_000_000
    assert (run / "report.png").is_file()


@pytest.mark.parametrize("run", RUNS, ids=lambda path: path.name)
def test_every_committed_number_knows_where_it_came_from(run: Path) -> None:
    for record in store.Run(run).records():
        if record.status == "skipped":
            continue
        where = record.provenance
        assert where is not None
        assert where.commit
        assert not where.commit.endswith("+dirty")
        assert all(environment.libraries.get("torch") for environment in where.environments)
        training = record.case.kind == "train"
        assert not (training and record.case.device == "cuda") or (where.gpus and where.driver)


def test_the_results_table_is_what_the_records_say(results_table: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert results_table.placed(readme, results_table.text(ROOT / "reports")) == readme


def test_every_number_of_the_results_table_links_to_its_record(results_table: ModuleType) -> None:
    lines = results_table.text(ROOT / "reports").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and "](" in line]
    assert len(rows) >= 20
    linked = [cell for row in rows for cell in row if "](" in cell]
    assert all(re.search(r"\]\(reports/[^)]+/record\.json\)", cell) for cell in linked)
    bare = [cell for row in rows for cell in [*row[4:], row[-1]] if re.search(r"\d", cell) and "](" not in cell]
    assert bare == [], "a number without its record"


def test_repeats_and_failures_share_a_cell_and_each_has_its_link(results_table: ModuleType, tmp_path: Path) -> None:
    named = fakes.named()
    gpu, oom = named["gpu"], named["failed_oom"].last
    assert isinstance(gpu.case, TrainCase)
    changes: list[dict[str, Any]] = [{"seq_len": 3000}, {"seq_len": 4096}]
    changes += [{"seq_len": 4096, "repeat": 1}, {"seq_len": 4096, "repeat": 2}]
    changes += [{"seq_len": 8192, "memory_cap_gib": 24.0}]
    records = [gpu.model_copy(update={"case": gpu.case.model_copy(update=change)}) for change in changes]
    records[3:] = [record.model_copy(update={"status": "failed", "attempts": (oom,)}) for record in records[3:]]
    found = [results_table.Measured(record, ROOT / f"r{number}") for number, record in enumerate(records)]
    *_, head, _, row = results_table.training(found)
    assert [cell.strip() for cell in head.split("|")[5:-1]] == ["4,096", "other lengths"]
    cell, other = (cell.strip() for cell in row.split("|")[5:-1])
    assert re.fullmatch(
        r"28\.6 / [\d,]+ \([\d,]+ to [\d,]+\) \[\[1]]\(r1\) \[\[2]]\(r2\) \[oom_gpu_backward]\(r3\)", cell
    )
    assert re.fullmatch(r"3,000: \[28\.6 / [\d,]+]\(r0\)", other)
    (*_, fit) = results_table.fits(found)
    assert "not [8,192](r4)" in fit


def test_the_evidence_stays_small() -> None:
    listed = subprocess.run(["git", "ls-files", "-z", "reports"], cwd=ROOT, capture_output=True, check=True).stdout
    sizes = [(ROOT / name).stat().st_size for name in listed.decode().split("\0") if name]
    assert sum(sizes) < 10 * 1024 * 1024


@pytest.mark.parametrize("path", sorted((ROOT / "reports").glob("build-*/*.json")), ids=lambda path: path.stem)
def test_a_built_image_was_verified_and_its_package_list_stands_beside_it(path: Path) -> None:
    built = json.loads(path.read_text(encoding="utf-8"))
    assert built["verify"]["image"] == built["image"]["image"]
    assert [check for check in built["verify"]["checks"] if check["state"] == "wrong"] == []
    assert not built["image"]["source_revision"].endswith("-dirty")
    listed = path.with_suffix(".packages.txt").read_text(encoding="utf-8").splitlines()
    assert len(listed) == built["package_list"]["python"] + built["package_list"]["debian"]


# ---------------------------------------------------------------- drills


def test_the_committed_scorecard_of_drills_is_what_the_readmes_say() -> None:
    folder = ROOT / "reports" / "drill-cpu"
    card = json.loads((folder / "scorecard.json").read_text())
    results = [drill.Drilled.model_validate(one) for one in card["drills"]]
    assert drill.summary(results) == card["summary"]
    for readme in (folder / "README.md", ROOT / "README.md"):
        assert drill.sentence(results) in " ".join(readme.read_text(encoding="utf-8").split()), readme


def test_the_committed_scorecard_holds_every_kind_of_drill_off_and_on() -> None:
    folder = ROOT / "reports" / "drill-cpu"
    text = (folder / "scorecard.json").read_text()
    assert not re.search(r"/(?:home|root|work|tmp)/", text)
    assert re.search(r"\b[0-9a-f]{40}\b", (folder / "README.md").read_text())
    found = {(one["name"], one["debug"]): one for one in json.loads(text)["drills"]}
    assert {name for name, _ in found} == {one for one, debug in found if debug}
    assert sum(one["expected_class"] != "no_failure" for one in found.values()) >= 2 * 18
    assert sum(one["expected_class"] == "no_failure" for one in found.values()) >= 2 * 10


def test_what_telemetry_costs_is_under_its_limit_and_the_readme_says_it() -> None:
    found = json.loads((ROOT / "reports/h200-overhead/overhead.json").read_text(encoding="utf-8"))
    ratios = sorted(pair["ratio"] for pair in found["pairs"])
    assert len(ratios) >= 5
    assert found["median_ratio"] == ratios[len(ratios) // 2] < 1.01
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{found['median_ratio']:.4f} of one without" in readme


def test_a_case_that_shared_its_process_took_the_memory_that_it_takes_alone() -> None:
    name = "train-nano-30b-a3b-qlora-s2048-b1-one-c30ca2a6"
    alone, shared = (store.Run(ROOT / "reports" / run).record(name) for run in ("h200-1gpu", "h200-grouped"))
    assert alone
    assert shared
    peaks = [summarize(record).train.peak.allocated_bytes for record in (alone, shared)]  # type: ignore[union-attr]
    assert peaks[1] == pytest.approx(peaks[0], rel=0.01)
    assert shared.last
    assert shared.last.jobs[0].job_id.startswith("shared-")
