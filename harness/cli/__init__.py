"""argv -> one call per verb -> exit code. The only package that prints."""

from __future__ import annotations

import signal
import sys

from harness.cli import runs  # importing a module registers its verbs, in the order in which --help lists them

# isort: split
from harness.cli import logs

# isort: split
from harness.cli import images

# isort: split
from harness.cli import drill
from harness.cli.common import app
from harness.errors import HarnessError

__all__ = ["app", "drill", "images", "logs", "main", "runs"]


def main() -> int:
    """The command line; returns the exit code."""
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        result = app(standalone_mode=False)
    except HarnessError as error:
        print(f"harness: {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  {error.hint}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:
        return _interrupted() if type(error).__name__ == "Abort" else _usage(error)
    if result == 130:  # what typer makes of a KeyboardInterrupt
        return _interrupted()
    return result if isinstance(result, int) else 0


def _interrupted() -> int:
    """After Ctrl-C, `cancel` or SIGTERM."""
    print("\nharness: interrupted; finished cases are kept, the same command goes on from here", file=sys.stderr)
    return 130


def _usage(error: Exception) -> int:
    """What typer's parser refused, shown its way; anything else is our bug and keeps its traceback."""
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if show is None or code is None:
        raise error
    show()
    return int(code)


def _as_interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
