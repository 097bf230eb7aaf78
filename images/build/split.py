"""Part a lock in two: what is compiled for a GPU here (`*.sources.txt`), and all else (`*.wheels.txt`)."""

from __future__ import annotations

import re
import sys
from pathlib import Path

COMPILED = ("mamba-ssm", "causal-conv1d")


def split(lock: str) -> tuple[str, str]:
    """The lock's entries that are compiled here, and the others."""
    entries = re.split(r"(?m)^(?=\S)", lock)
    compiled = [entry for entry in entries if entry.split("==")[0] in COMPILED]
    return "".join(compiled), "".join(entry for entry in entries if entry not in compiled)


if __name__ == "__main__":
    lock = Path(sys.argv[1])
    for part, text in zip(("sources", "wheels"), split(lock.read_text()), strict=True):
        lock.with_suffix(f".{part}.txt").write_text(text)
