"""Where a hub's files lie on this machine: the cache that huggingface_hub keeps, read without it."""

from __future__ import annotations

import os
import re
from pathlib import Path

_COMMIT = re.compile(r"^[0-9a-f]{40}$")


def cache() -> Path:
    """The folder of fetched models: `$HF_HUB_CACHE`, `$HF_HOME/hub`, or the library's default."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").absolute()


def folder_of(checkpoint: str) -> Path:
    """The cache's folder of one model."""
    return cache() / f"models--{checkpoint.replace('/', '--')}"


def commit_of(checkpoint: str, revision: str | None) -> str | None:
    """The commit that `revision` (default: main) means in the cache; `None` where it was not fetched."""
    name = revision or "main"
    ref = folder_of(checkpoint) / "refs" / name
    try:
        commit = ref.read_text(encoding="utf-8").strip()
    except OSError:
        commit = name
    return commit if _COMMIT.match(commit) and (folder_of(checkpoint) / "snapshots" / commit).is_dir() else None
