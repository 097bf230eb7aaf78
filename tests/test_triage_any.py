"""Logs of any origin: the class of what began it, who, evidence that stands in the log, and a next step.

The log lines here are of our own wording around what a library prints.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from harness.schema import LogVerdict
from harness.triage import as_json, triage
from harness.triage.signature import kinds, signatures

ANY: dict[str, list[dict[str, Any]]] = YAML(typ="safe").load(Path(__file__).parent / "signatures" / "any.yaml")
CASES = [(name, index, case) for name, cases in ANY.items() for index, case in enumerate(cases)]


def of(tmp_path: Path, **files: str) -> LogVerdict:
    """The verdict over files of this text, by name."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return triage([tmp_path])


@pytest.mark.parametrize(("name", "index", "case"), CASES, ids=[f"{name}-{index}" for name, index, _ in CASES])
def test_a_log_of_each_class(tmp_path: Path, name: str, index: int, case: dict[str, Any]) -> None:
    found = of(tmp_path, log=case["log"])
    assert found.failure_class == name, found.evidence
    assert found.next.step
    assert as_json(found)["class"] == name
    for line in found.evidence:
        assert line.text in case["log"].split("\n")[line.line - 1]
    if name not in ("unknown", "coll_timeout"):
        assert found.evidence
    if "rank" in case:
        assert found.culprit
        assert found.culprit.rank == case["rank"]
    if "host" in case:
        assert found.culprit
        assert found.culprit.host == case["host"]
    if name in ("no_failure", "unknown"):
        assert found.culprit is None


def test_every_class_of_the_taxonomy_has_a_log() -> None:
    assert set(ANY) == set(kinds())
    assert {signature.failure_class for signature in signatures()} - set(kinds()) <= {"not_as_requested"}
