"""Fetch a checkpoint from a hub, ahead of time: the only payload that uses the network. Speaks JSON lines on stdout.

python -m harness.payload.fetch '{"checkpoint": ..., "revision": ..., "to": DIR or null}'

resolved   commit, files, bytes, missing_bytes
progress   bytes (that came so far)
done       commit, path
failed     why (gated, no_repository, no_revision, unreachable, disk, other), message
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

SAY_EVERY_S = 2.0
SPARE_BYTES = 1 << 28
"""Left free beyond what is fetched."""


def say(state: str, **fields: Any) -> None:
    """One line."""
    print(json.dumps({"state": state, **fields}), flush=True)


def main(asked: dict[str, Any]) -> int:
    """Fetch; the exit code."""
    try:
        fetch(asked["checkpoint"], asked["revision"], asked["to"])
    except Exception as error:
        why, message = reason(error)
        say("failed", why=why, message=message)
        return 1
    return 0


class NoSpace(Exception):
    """The disk does not hold it."""


def fetch(checkpoint: str, revision: str, to: str | None) -> None:
    """Resolve, look at the disk, and fetch what is missing."""
    from huggingface_hub import HfApi, constants, snapshot_download

    # False: a token that some tool left in the home directory is not used.
    token: str | bool = os.environ.get("HF_TOKEN") or False
    commit = HfApi(token=token).model_info(checkpoint, revision=revision).sha
    place: dict[str, Any] = {"repo_id": checkpoint, "local_dir": to, "token": token}
    plan = snapshot_download(**place, revision=commit, dry_run=True)
    missing = sum(file.file_size for file in plan if file.will_download)
    say("resolved", commit=commit, files=len(plan), bytes=sum(file.file_size for file in plan), missing_bytes=missing)
    target = Path(to or constants.HF_HUB_CACHE)
    check_space(missing, target)
    folder = target if to else target / f"models--{checkpoint.replace('/', '--')}"
    with Progress(folder):
        path = snapshot_download(**place, revision=commit)
    if to is None:
        name_commit(folder, revision, commit)
    say("done", commit=commit, path=str(path))


def check_space(missing: int, target: Path) -> None:
    """NoSpace where `missing` bytes do not fit on the disk of `target`, which need not exist yet."""
    there = next(path for path in (target, *target.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if missing and missing + SPARE_BYTES > free:
        raise NoSpace(f"{missing / 1e9:.1f} GB are to be fetched, {free / 1e9:.1f} GB are free at {there}")


def name_commit(folder: Path, revision: str, commit: str) -> None:
    """Let `revision` mean `commit` in the cache: what a run without the network then finds under that name."""
    if revision == commit:
        return
    ref = folder / "refs" / revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    temporary = ref.with_name(f".{ref.name}.{os.getpid()}")
    temporary.write_text(commit, encoding="utf-8")
    os.replace(temporary, ref)


class Progress:
    """Says every few seconds how much came, by what grew on disk: the library's own bars are for a terminal."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._before = folder, size(folder)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(SAY_EVERY_S):
            say("progress", bytes=max(0, size(self._folder) - self._before))


def size(folder: Path) -> int:
    """Bytes on disk below `folder`, links not followed."""
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(base, name)).st_size
            except OSError:
                continue
    return total


def reason(error: Exception) -> tuple[str, str]:
    """What kind of failure it is, and its own words."""
    from huggingface_hub import errors

    kinds: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
        (errors.GatedRepoError, "gated"),
        (errors.RevisionNotFoundError, "no_revision"),
        (errors.RepositoryNotFoundError, "no_repository"),
        (NoSpace, "disk"),
    )
    why = next((name for kind, name in kinds if isinstance(error, kind)), None)
    if why is None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        broken = isinstance(error, errors.LocalEntryNotFoundError) or "Connect" in type(error).__name__
        timed = "Timeout" in type(error).__name__ or "Protocol" in type(error).__name__
        why = "unreachable" if broken or timed or (status or 0) >= 500 else "other"
    return why, f"{type(error).__name__}: {' '.join(str(error).split())}"


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
