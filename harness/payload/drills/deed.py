"""Whether a program came as far as what it was to do: one that failed before shows nothing of its fault."""

from __future__ import annotations

from pathlib import Path

UNDONE = Path("undone")
"""In the job directory, for as long as the fault is not made; holds what went wrong if it never is."""


def intend(otherwise: str) -> None:
    """Say what is to be thought if the program ends before `done`."""
    UNDONE.write_text(otherwise, encoding="utf-8")


def done() -> None:
    """From here on, whatever happens is the fault."""
    UNDONE.unlink()
