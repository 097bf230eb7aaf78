"""One process of a drill's program: `python -m harness.payload.drills MODULE.FUNCTION`."""

from __future__ import annotations

import importlib
import os
import sys


def main(name: str) -> None:
    """Import the module and call the function, with PyTorch's error files where they are asked for."""
    module, _, function = name.partition(".")
    program = getattr(importlib.import_module(f"harness.payload.drills.{module}"), function)
    if os.environ.get("DRILL_RECORD"):
        from torch.distributed.elastic.multiprocessing.errors import record

        program = record(program)
    program()


if __name__ == "__main__":
    main(sys.argv[1])
