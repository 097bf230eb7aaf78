"""Names what failed, who began it, and what to change first."""

from harness.triage.anylog import as_json, triage
from harness.triage.verdict import diagnose

__all__ = ["as_json", "diagnose", "triage"]
