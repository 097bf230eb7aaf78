"""The evidence under reports/: it renders with no GPU and no network, it is small, and the README says what it says."""

import importlib
import json
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from harness import results, store

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
