"""The harness's own training job with a fault planted into it: `fault` in job.json.

Started in the place of `harness.payload.train`, which itself knows of no faults.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from harness.payload import train


def main(argv: list[str]) -> int:
    """Run job.json with its fault; the exit code of the training job."""
    fault = json.loads(Path(argv[0]).read_text(encoding="utf-8")).get("fault")
    if fault and int(os.environ.get("RANK", "0")) == fault["rank"]:
        make = train.make_trainer

        def planted(*arguments: Any, **more: Any) -> Any:
            trainer = make(*arguments, **more)
            PLANTS[fault["what"]](fault, trainer)
            return trainer

        train.make_trainer = planted
    return train.main(argv)


def _at_step(trainer: Any, step: int, do: Any) -> None:
    """Do something at the start of one step (from 1)."""
    from transformers import TrainerCallback

    class AtStep(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step + 1 == step:
                do()

    trainer.add_callback(AtStep())


def _kill(fault: dict[str, Any], trainer: Any) -> None:
    _at_step(trainer, fault["step"], lambda: os.kill(os.getpid(), signal.SIGKILL))


def _raise(fault: dict[str, Any], trainer: Any) -> None:
    def fail() -> None:
        raise IndexError(f"sample {7 * fault['step']} has no labels")

    _at_step(trainer, fault["step"], fail)


def _poison(fault: dict[str, Any], trainer: Any) -> None:
    """Make an infinity of a weight that is trained, so that the next loss is not finite."""

    def poison() -> None:
        weight = next(one for one in trainer.model.parameters() if one.requires_grad)
        weight.data.fill_(float("inf"))

    _at_step(trainer, fault["step"], poison)


def _tear(fault: dict[str, Any], trainer: Any) -> None:
    """Cut what was saved in half."""
    from transformers import TrainerCallback

    class Tear(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            for path in Path(args.output_dir).rglob("*.safetensors"):
                os.truncate(path, path.stat().st_size // 2)

    trainer.add_callback(Tear())


PLANTS = {"kill": _kill, "raise": _raise, "poison": _poison, "tear": _tear}

if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as the training job itself ends
