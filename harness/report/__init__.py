"""Records -> one self-contained HTML page, a comparison as CSV, and what a terminal shows."""

from __future__ import annotations

from harness.report.compare import comparison_csv
from harness.report.entry import ReportRun
from harness.report.page import render

__all__ = ["ReportRun", "comparison_csv", "render"]
