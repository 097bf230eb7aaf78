"""A real training job that its memory limit ends climbs to one that fits."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import boxes, pipeline
from harness.boxes.venv import VenvBox
from harness.schema import Command, Job, TrainCase
from harness.session import Options

pytestmark = pytest.mark.payload

LIMIT_BYTES = 3000 * 2**20
"""Of private memory: 4 sequences of 4,096 tokens take more, of 2,048 less (seen, torch 2.13 on a CPU)."""
MATRIX = """\
version: 1
name: limited
defaults: {device: cpu, variant: tiny-hybrid, method: lora, steps: 2, warmup_steps: 1}
train:
  - {seq_len: 4096, micro_batch: 4, activation_checkpointing: false, ladder: oom}
"""


class LimitedBox(VenvBox):
    """The environments as they are, with a limit on each process's data (setrlimit's RLIMIT_DATA)."""

    name = "limited"

    def wrap(self, job: Job, job_dir: Path, payload_root: Path) -> Command:
        command = super().wrap(job, job_dir, payload_root)
        return command.model_copy(update={"argv": ("prlimit", f"--data={LIMIT_BYTES}", *command.argv)})


def test_a_job_that_its_memory_limit_ends_is_rerun_until_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(boxes.REGISTRY, "limited", lambda _: LimitedBox())
    matrix = tmp_path / "limited.yaml"
    matrix.write_text(MATRIX)
    result = pipeline.run(matrix, Options(runs=tmp_path / "runs", box="limited"))
    first, *added = result.records
    assert first.last is not None
    assert first.last.diagnosis is not None
    assert (first.status, first.last.diagnosis.failure_class) == ("failed", "oom_host")
    assert [one.parent for one in added] == [one.case_id for one in result.records[:-1]]
    assert next(one.rung.name for one in added if one.rung) == "seq_len"
    fitted = added[-1]
    assert fitted.status == "measured"
    assert isinstance(fitted.case, TrainCase)
    assert fitted.case.seq_len * fitted.case.micro_batch < 4096 * 4
    assert result.failed[0].case_id == first.case_id
