"""Copy the logs of drills to small anonymous fixtures, each with its truth, for the tests of triage.

    tools/drill_fixtures DRILL_DIR... OUT

A fixture replaces an older one of its name. Dumps of the Flight Recorder become JSON, which triage reads as well.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import cassette

from harness.drill import Truth, faults
from harness.drill.score import truth_of
from harness.scrub import scrub
from harness.triage import recorder

MAX_BYTES = 20_000
"""Of a file: the first quarter and the end."""
MAX_CHATTER_LINES = 40
"""Of a file's lines of one kind that tell nothing; more make a fixture large and no better."""
KEPT_EVENTS = ('"kind":"phase"', '"kind":"step"', '"kind":"nonfinite"', '"kind":"error"', '"kind":"end"')
_CHATTER = re.compile(r"TCPStoreLibUvBackend\.cpp|TCPStore\.cpp|socket\.cpp:\d+\] \[c10d - (?:debug|trace)\]")
_OF_TORCH = ("/__w/", "/pytorch/", "/opt/pytorch/")
_RUN_ID = re.compile(r"^(ranks|logs)/[\w-]{8,}/")


class Names:
    """What stands for each name of the machine that drilled."""

    def __init__(self, drill: Path) -> None:
        order = json.loads((drill / "job" / "supervisor.json").read_text())
        ended = json.loads((drill / "job" / "ended.json").read_text())
        environment = order["argv"][0].rpartition("/bin/")[0]
        checkout, found, _ = environment.rpartition("/.envs/")
        out = order["cwd"].rpartition(f"/{drill.name}/")[0]
        self._plain = {out: "/drill", **({checkout: "/harness"} if found else {environment: "/python"})}
        self._host = ended.get("host") or platform.node()

    def replaced(self, text: str) -> str:
        """`text` without them; the paths of PyTorch's own build stay, everybody's logs have them."""
        for old, new in self._plain.items():
            text = text.replace(old, new) if old else text
        if self._host and self._host != "localhost":
            text = re.sub(rf"(?<![\w.-]){re.escape(self._host)}(?![\w-])", "host1", text)
        text = re.sub(r"/tmp/drill-\w{8}(?=/)", "/tmp", text)
        text = cassette._GPU.sub("GPU-00000000-0000-0000-0000-000000000001", text)
        text = cassette._PATH.sub(_shorter, text).replace(f"{Path.home()}/", "/")  # a path that text runs into
        return scrub(cassette._ADDRESS.sub("192.0.2.1", re.sub(r"\r(?!\n)", "\n", text)))


def _shorter(path: re.Match[str]) -> str:
    plain = (*cassette.PLAIN_PATHS, *_OF_TORCH, "/drill/")
    if "/site-packages/" not in path[0] and path[0].startswith(plain):
        return path[0]
    return cassette._short(path[0])


def copy(drill: Path, out: Path) -> int:
    """One drill's logs and truth; the fixture's size in bytes."""
    names, target = Names(drill), out / drill.name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    truth = Truth.model_validate_json((drill / "truth.json").read_text())
    if fault := {one.name: one for one in faults()}.get(truth.fault):  # what a log can show may be known better by now
        shown = truth_of(fault, truth.debug)
        truth = truth.model_copy(
            update={name: getattr(shown, name) for name in ("shown_class", "shown_culprit", "why")}
        )
    (target / "truth.json").write_text(names.replaced(truth.model_dump_json(indent=1)) + "\n")
    for path in sorted((drill / "seen").rglob("*")):
        if path.is_file() and not path.is_symlink() and path.stat().st_size:
            _copy_file(path, target / "seen" / _named(path.relative_to(drill / "seen"), names), names)
    return sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def _named(path: Path, names: Names) -> str:
    """The file's name without the launcher's run id, the host and the process id."""
    name = _RUN_ID.sub(r"\1/", names.replaced(f"{path}"))
    return re.sub(r"nccl\.[\w.-]+\.(\d+)\.log$", r"nccl.host1.\1.log", name)


def _copy_file(path: Path, target: Path, names: Names) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    content = path.read_bytes()
    if recorder.looks_like_dump(content[:65_536]) and content[:1] == b"\x80":
        target.with_name(f"{target.name}.json").write_text(_dump(path, content))
        return
    text = content.decode("utf-8", "replace")
    if path.suffix == ".jsonl":
        text = "".join(line for line in text.splitlines(keepends=True) if any(word in line for word in KEPT_EVENTS))
    target.write_text(names.replaced(_cut(text)))


def _dump(path: Path, content: bytes) -> str:
    """What triage reads of a dump, as JSON."""
    dump = recorder.read(path.name, None, [content])
    entries: list[dict[str, Any]] = [
        {"process_group": call.group, "collective_seq_id": call.number, "profiling_name": call.operation,
         "input_sizes": call.sizes, "state": call.state} for call in (dump.calls if dump else ())]  # fmt: skip
    return json.dumps({"rank": dump.rank if dump else 0, "entries": entries[-60:]}, separators=(",", ":")) + "\n"


def _cut(text: str) -> str:
    """The telling part of a log: not all of PyTorch's chatter, and not the middle of a long one."""
    kept, chatter = [], 0
    for line in text.splitlines(keepends=True):
        chatter += bool(_CHATTER.search(line))
        if chatter <= MAX_CHATTER_LINES or not _CHATTER.search(line):
            kept.append(line)
    text = "".join(kept)
    if len(text) <= MAX_BYTES:
        return text
    start, end = text[: MAX_BYTES // 4], text[-MAX_BYTES * 3 // 4 :]
    return f"{start[: start.rfind(chr(10)) + 1]}[...]\n{end[end.find(chr(10)) + 1 :]}"


def main() -> int:
    """The command line; returns the exit code."""
    if len(sys.argv) < 3:
        print(__doc__)
        return 2
    out = Path(sys.argv[-1])
    for folder in map(Path, sys.argv[1:-1]):
        card = json.loads((folder / "scorecard.json").read_text())
        judged = [one for one in card["drills"] if one["status"] in ("right", "wrong")]
        size = sum(copy(folder / one["folder"], out) for one in judged)
        print(f"{folder}: {len(judged)} fixtures, {size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
