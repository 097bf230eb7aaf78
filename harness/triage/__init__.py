"""Names what failed, who began it, and what to change first."""

from harness.triage.verdict import diagnose

__all__ = ["diagnose"]
