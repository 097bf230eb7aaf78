"""What stands in run directories is found by name, and two runs are told apart."""

from pathlib import Path

import pytest
from fakes.records import records

from harness import results, schema, store
from harness.errors import HarnessError
from harness.schema import Plan, Record


def run_of(folder: Path, found: list[Record]) -> store.Run:
    """A run directory with these records."""
    run = store.Run(folder)
    cases = tuple(record.case for record in found)
    plan = Plan(name=folder.name, source="m.yaml", matrix_sha256="0" * 64, cases=cases, skips=())
    run.begin(plan, backend="local", box="venv", environments=[])
    for record in found:
        run.save(record)
    return run


def test_two_nights_of_one_matrix_are_called_by_what_differs(tmp_path: Path) -> None:
    found = records(3, seed=1)
    nights = [run_of(tmp_path / night / "nightly", found) for night in ("monday", "tuesday")]
    page, table = results.make_report(nights, tmp_path / "out" / "page.html")
    text = page.read_text(encoding="utf-8")
    assert "monday/nightly" in text
    assert "tuesday/nightly" in text
    header, first, *_ = table.read_text(encoding="utf-8").splitlines()
    assert header.startswith("case_id,")
    assert "monday/nightly" in first


def test_a_case_is_found_by_folder_record_id_or_the_start_of_its_id(tmp_path: Path) -> None:
    found = records(4, seed=2)
    run = run_of(tmp_path / "runs" / "one", found)
    case_id = found[0].case_id
    for target in (run.record_path(case_id), run.record_path(case_id).parent, case_id, case_id[:-2]):
        assert results.find(str(target), tmp_path / "runs").case == found[0]
    assert len(results.find("one", tmp_path / "runs").records) == len({schema.case_id(r.case) for r in found})


def test_an_id_of_two_cases_names_them(tmp_path: Path) -> None:
    found = records(1, seed=3)
    for name in ("one", "two"):
        run_of(tmp_path / "runs" / name, found)
    with pytest.raises(HarnessError, match="names 2 cases") as raised:
        results.find(found[0].case_id, tmp_path / "runs")
    assert "folder" in raised.value.hint


def test_three_runs_are_too_many(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / name, records(1, seed=4)) for name in "abc"]
    with pytest.raises(HarnessError, match="one run, or two"):
        results.make_report(runs, None)
