"""How many runs a search takes, over memory that was measured: halving alone, and guided by peaks.

`python tests/bench_frontier.py` prints the means; nothing is timed, so every machine says the same.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from fakes import surfaces

STEPS = (512, 1024, 2048)
"""Of a grid, in tokens."""
GRIDS = (6, 8, 12, 16, 24, 32)
UNUSED = ((0.0, 0.03), (0.0, 0.06), (0.06, 0.08), (-0.03, 0.0))
"""Shares of what PyTorch may hold that are left when memory runs out: as the search expects, twice that, more, none."""


def runs(count: int, unused: tuple[float, float], steps: Sequence[int] = STEPS) -> tuple[float, float, int]:
    """Mean runs of halving and of the guided search, and the guided one's most, over grids of `count` lengths.

    Every border (none fits, the first fits, ... all do) of every recorded surface, each with a share unused drawn
    from between the two.
    """
    halved, guided = zip(*_each(count, unused, steps), strict=True)
    return sum(halved) / len(halved), sum(guided) / len(guided), max(guided)


def _each(count: int, unused: tuple[float, float], steps: Sequence[int]) -> Iterator[tuple[int, int]]:
    dice = random.Random(count)
    for load, known in surfaces.recorded().values():
        peak = surfaces.through(known)
        for step in steps:
            values = range(step, step * count + 1, step)
            for border in range(count + 1):
                capacity = peak(step * border) + (peak(step) - peak(0)) * dice.random() * 0.999
                room = capacity / (1 - dice.uniform(*unused))
                fits = {value: peak(value) <= capacity for value in values}
                found, done = surfaces.searched(
                    values, lambda value, fits=fits: None if fits[value] else "oom_gpu_backward", peak, load, room
                )
                halving, _ = surfaces.searched(
                    values, lambda value, fits=fits: None if fits[value] else "oom_gpu_backward"
                )
                assert (found.fits and found.fits.value) == (halving.fits and halving.fits.value)
                yield halving.tries, len(done)


def main() -> int:
    print("| values | unused of what is allowed | halving, mean runs | with peaks, mean | with peaks, most |")
    print("|---:|---|---:|---:|---:|")
    for unused in UNUSED:
        for count in GRIDS:
            halving, guided, most = runs(count, unused)
            print(
                f"| {count} | {unused[0]:.0%} to {unused[1]:.0%} | {halving:.2f} | {guided:.2f} | {most} |", flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
