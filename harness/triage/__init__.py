"""Names what failed, who began it, what to change first, and which case to try next."""

from harness.triage.anylog import as_json, triage
from harness.triage.held import held
from harness.triage.ladder import Next, Tried, next_rung
from harness.triage.probing import Probed, with_evidence
from harness.triage.rungs import Means
from harness.triage.verdict import diagnose

__all__ = ["Means", "Next", "Probed", "Tried", "as_json", "diagnose", "held", "next_rung", "triage", "with_evidence"]
