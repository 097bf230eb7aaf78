"""The programs that install Python packages, and how this machine is told to reach its index."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from harness.containers.imagelock import CHECKOUT
from harness.errors import HarnessError


def _uv_home() -> Path:
    return Path(os.environ.get("HARNESS_ENVS") or CHECKOUT / ".envs") / "uv" / "bin"


def uv_program() -> str:
    """uv's path: that of `./tools/setup uv`, else the one on PATH; HarnessError where there is none."""
    ours = _uv_home() / "uv"
    found = str(ours) if ours.exists() else shutil.which("uv")
    if found is None:
        raise HarnessError(f"uv is missing: {ours}", "make it with ./tools/setup uv")
    return found


@cache
def pip_settings() -> dict[str, str]:
    """What pip is configured with, by option; uv reads none of it. An environment variable wins over a file."""
    settings: dict[str, str] = {}
    for line in sorted(_pip_config().splitlines(), reverse=True):  # ":env:" sorts before "global" and "install"
        key, found, value = line.partition("=")
        if found:
            settings[key.rpartition(".")[2]] = str(ast.literal_eval(value))
    return settings


def _pip_config() -> str:
    """`pip config list` of the first Python that has a pip: an environment made by uv has none."""
    for python in (str(_uv_home() / "python"), sys.executable, "python3"):
        try:
            shown = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if shown.returncode == 0:
            return shown.stdout
    return ""
