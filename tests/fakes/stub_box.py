"""A box whose jobs run the stub of a payload, and the command line with that box.

`python stub_box.py ARGUMENTS` is `harness ARGUMENTS` with a further box `stub`. What its jobs do stands in the file
that the variable STUBS names: a list of [pattern of `<job id>.<attempt>`, options of case_payload.py].
"""

from __future__ import annotations

import fnmatch
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from harness import boxes
from harness.schema import Command, DeviceType, Environment, EnvironmentName, Job

PAYLOAD = Path(__file__).resolve().parent / "case_payload.py"
Behaviour = Sequence[tuple[str, dict[str, Any]]]


class StubBox:
    """The interpreter that runs the tests, told how each attempt at a job shall go."""

    name = "stub"

    def __init__(self, behaviour: Behaviour = ()) -> None:
        self.behaviour = behaviour

    def environment(self, name: EnvironmentName, device: DeviceType = "cpu") -> Environment:
        return Environment(name=name, box="stub", digest="sha256:0", pinned=False, python="3", libraries={})

    def differences(self, name: EnvironmentName) -> tuple[str, ...]:
        return ()

    def wrap(self, job: Job, job_dir: Path, payload_root: Path) -> Command:
        fake: dict[str, Any] = {}
        for pattern, options in self.behaviour:
            if fnmatch.fnmatch(job_dir.name, pattern):
                fake |= options
        env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(payload_root), "FAKE": json.dumps(fake)}
        return Command(argv=(sys.executable, "-S", str(PAYLOAD)), env=env | job.env, cwd=str(job_dir))


if __name__ == "__main__":
    from harness import cli

    text = Path(os.environ["STUBS"]).read_text() if "STUBS" in os.environ else "[]"
    boxes.REGISTRY["stub"] = lambda _: StubBox(json.loads(text))
    sys.exit(cli.main())
