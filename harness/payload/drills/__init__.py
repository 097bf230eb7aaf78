"""Faults for `harness drill`, made for real: programs that fail in one known way, and the stage that runs them."""
