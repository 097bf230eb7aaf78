"""The job directories of recorded runs, given to `harness triage` as they are, say what their records say."""

from pathlib import Path

import pytest

from harness import store
from harness.schema import Record
from harness.triage import triage

CASSETTES = Path(__file__).parent / "cassettes"
JOBS = [
    (record, run.folder / job.dir)
    for run in (store.Run(CASSETTES / "cpu"), store.Run(CASSETTES / "h200"))
    for record in run.records()
    if record.last
    for job in record.last.jobs
]


@pytest.mark.parametrize(("record", "folder"), JOBS, ids=[folder.name for _, folder in JOBS])
def test_a_job_directory_says_what_its_record_says(record: Record, folder: Path) -> None:
    assert record.last is not None
    diagnosis = record.last.diagnosis
    found = triage([folder])
    assert found.failure_class == (diagnosis.failure_class if diagnosis else "no_failure"), found.evidence


def test_what_an_orderly_end_breaks_off_is_no_failure(tmp_path: Path) -> None:
    stopped = (
        "(APIServer pid=7) INFO 01-02 03:04:05 [launcher.py:1] [shutdown] API server: stopping\n"
        "(APIServer pid=7) ERROR 01-02 03:04:05 [async_llm.py:1] vllm.v1.engine.exceptions.EngineDeadError: dead\n"
        "INFO:     Application shutdown complete.\n"
    )
    log = tmp_path / "server.log"
    log.write_text(f"INFO:     Application startup complete.\n{stopped}")
    assert triage([log]).failure_class == "no_failure"
    crashed = "(EngineCore pid=8) ERROR 01-02 03:04:04 [core.py:1] RuntimeError: the engine's own reason\n"
    log.write_text(f"INFO:     Application startup complete.\n{crashed}{stopped}")
    assert triage([log]).failure_class != "no_failure"
