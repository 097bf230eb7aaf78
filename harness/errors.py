"""The one error that people see."""

from __future__ import annotations


class HarnessError(Exception):
    """A mistake that its reader can mend: what is wrong, and the next step. Printed without a traceback, exit 2."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
