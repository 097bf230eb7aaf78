"""Injects faults for real on this machine, and checks that triage names them."""

from harness.drill.faults import Fault, chosen, faults
from harness.drill.run import Options, compare, run
from harness.drill.score import Drilled, Truth, exit_code, mistakes, summary
from harness.drill.show import line, listing, sentence, table

__all__ = [
    "Drilled",
    "Fault",
    "Options",
    "Truth",
    "chosen",
    "compare",
    "exit_code",
    "faults",
    "line",
    "listing",
    "mistakes",
    "run",
    "sentence",
    "summary",
    "table",
]
