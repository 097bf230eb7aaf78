"""`harness fetch`: a variant's weights and tokenizer onto this machine, before anything is measured.

The hub's own client does it, in the training (or serving) environment: its version is pinned there, it reads at run
time what it wrote, and the control plane needs no other.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from harness import boxes, catalog, scrub
from harness.boxes.variables import allowed
from harness.boxes.venv import CHECKOUT
from harness.errors import HarnessError
from harness.files import write_atomically
from harness.schema import Frozen

NOTE = "harness-fetch.json"
"""Beside weights that were fetched into a folder of their own: what they are."""
PASSED = ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT", "HF_HUB_DISABLE_XET",
          "HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY", "https_proxy", "http_proxy", "all_proxy", "no_proxy",
          "SSL_CERT_FILE", "SSL_CERT_DIR")  # fmt: skip
"""What fetching may see beside what every payload may."""

Say = Callable[[str], None]


class Fetched(Frozen):
    """What lies here now."""

    variant: str
    checkpoint: str
    revision: str
    """As it was asked for."""
    commit: str
    path: str
    files: int
    bytes: int
    fetched_bytes: int
    """Of them, those that were not here."""
    seconds: float


def fetch(name: str, revision: str | None, to: Path | None, say: Say) -> Fetched:
    """Fetch the variant `name` into the hub's cache, or into the folder `to`; HarnessError where it does not come."""
    began = time.monotonic()
    variant = catalog.variant(name)
    if variant.checkpoint is None:
        raise HarnessError(f"{name} has no published weights", "it only runs with `weights: random`")
    asked = {
        "checkpoint": variant.checkpoint,
        "revision": revision or variant.revision or "main",
        "to": str(to.absolute()) if to else None,
    }
    said = {line["state"]: line for line in _told(_lines(asked), say)}
    if "done" not in said:
        raise _failure(said.get("failed", {}), asked)
    resolved = said["resolved"]
    found = Fetched(
        variant=name,
        checkpoint=variant.checkpoint,
        revision=asked["revision"] or "",
        commit=said["done"]["commit"],
        path=said["done"]["path"],
        files=resolved["files"],
        bytes=resolved["bytes"],
        fetched_bytes=resolved["missing_bytes"],
        seconds=round(time.monotonic() - began, 1),
    )
    if to:
        write_atomically(to / NOTE, found.model_dump_json(indent=1) + "\n")
    elif asked["revision"] != (variant.revision or "main"):
        _mean(variant.checkpoint, variant.revision or "main", found.commit)
    return found


def _mean(checkpoint: str, revision: str, commit: str) -> None:
    """What was fetched last by another name is what `weights: hub` means on this machine."""
    from harness import hub

    write_atomically(hub.folder_of(checkpoint) / "refs" / revision, commit)


def _python() -> Path:
    """An interpreter that has the hub's client."""
    for name in ("train", "serve"):
        python = boxes.environments_root() / name / "bin" / "python"
        if python.exists():
            return python
    raise HarnessError("no environment here has the hub's client", "make one with ./tools/setup train")


def _lines(asked: dict[str, str | None]) -> Iterator[dict[str, Any]]:
    """What the fetching process says; its own errors as a last line `failed`."""
    env = allowed(os.environ) | {name: os.environ[name] for name in PASSED if name in os.environ}
    env |= {"PYTHONPATH": str(CHECKOUT), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    argv = [str(_python()), "-P", "-m", "harness.payload.fetch", json.dumps(asked)]
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        ended = False
        for text in process.stdout:
            line: dict[str, Any] = json.loads(text)
            ended = ended or line["state"] in ("done", "failed")
            yield line
        if not ended:
            last = process.stderr.read().strip().splitlines()[-1:] or ["it said nothing"]
            yield {"state": "failed", "why": "other", "message": last[0]}


def _told(lines: Iterator[dict[str, Any]], say: Say) -> Iterator[dict[str, Any]]:
    """The same lines, those that a person wants to see said."""
    missing = 0
    for line in lines:
        if line["state"] == "resolved":
            missing = line["missing_bytes"]
            say(f"commit {line['commit']}: {line['files']} files, {line['bytes'] / 1e9:.2f} GB, "
                f"{missing / 1e9:.2f} GB of them to fetch")  # fmt: skip
        elif line["state"] == "progress":
            say(f"{line['bytes'] / 1e9:.2f} of {missing / 1e9:.2f} GB")
        yield line


def _failure(failed: dict[str, Any], asked: dict[str, str | None]) -> HarnessError:
    """The one message for a fetch that failed, and what to do."""
    checkpoint, revision = asked["checkpoint"], asked["revision"]
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    token = "the token in HF_TOKEN has no access" if os.environ.get("HF_TOKEN") else "no token is set"
    known = {
        "gated": (f"{checkpoint} is gated, and {token}",
                  f"ask for access at {endpoint}/{checkpoint}, then set HF_TOKEN to a token of that account"),
        "no_repository": (f"{endpoint} has no {checkpoint}, or shows it only to those who may see it ({token})",
                          "look at the name in the catalog, and at HF_TOKEN"),
        "no_revision": (f"{checkpoint} has no revision {revision!r}", "name a branch, a tag or a commit of it"),
        "unreachable": (f"{endpoint} cannot be reached or broke off",
                        "look at the network and the proxy (HTTPS_PROXY); HF_ENDPOINT names a mirror. Whole files are "
                        "kept: the same command goes on from there"),
    }  # fmt: skip
    message = scrub.scrub(str(failed.get("message", "")))[:500]
    if failed.get("why") == "disk":
        return HarnessError(message.removeprefix("NoSpace: "), "free some disk space, or name another disk with --to")
    what, hint = known.get(str(failed.get("why")), (f"{checkpoint} could not be fetched", ""))
    return HarnessError(what, "\n  ".join(filter(None, (hint, message))))
