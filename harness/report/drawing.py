"""What figures are drawn with: lines that colour-blind readers tell apart, axes, and how much of it a page bears.

A figure is `{"data": [...], "layout": {...}}`, plotly's own JSON, with what is particular to it; fonts, colours and
margins are the page's. Sizes are GiB, times as the axis says.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

from harness.report.words import plural
from harness.summary import Spread, spread

Figure = dict[str, Any]

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C8C", "#B8A800")
"""Okabe and Ito's colours for colour-blind readers; black and pale yellow, unreadable on one of the two
backgrounds, as a grey and a darker yellow."""
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "x", "star", "triangle-down")
DASHES = ("solid", "dash", "dot", "dashdot")
MAX_LINES = 16
"""Lines of one figure; the note under it counts those left out."""
MAX_CASES = 24
MAX_POINTS = 240
"""Points of one line in a case's detail; longer series keep the slowest step of each stretch."""
MAX_RANKS = 16
Row = TypeVar("Row")


class Drawn(NamedTuple):
    """A figure, and what its reader should know."""

    figure: Figure
    note: str = ""


def escaped(text: str) -> str:
    """Text for plotly, which reads a little HTML in names and labels."""
    return html.escape(text, quote=False)


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with its title."""
    return {"title": {"text": title}, **more}


def style(index: int) -> dict[str, Any]:
    """Colour, symbol and dash of the `index`th line: no two among the first 32 share all three."""
    dash = DASHES[index // len(OKABE_ITO) % len(DASHES)]
    return {"line": {"color": OKABE_ITO[index % len(OKABE_ITO)], "dash": dash, "width": 2},
            "marker": {"color": OKABE_ITO[index % len(OKABE_ITO)], "symbol": SYMBOLS[index % len(SYMBOLS)],
                       "size": 8}}  # fmt: skip


def styles(names: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    """A style for each line named by what and where: one colour for one what, one dash for one where, if they suffice.

    Then the same set-up on two GPUs, or in two runs, is seen as that.
    """
    what, where = (list(dict.fromkeys(part)) for part in zip(*names, strict=True))
    if len(what) > len(OKABE_ITO) or len(where) > len(DASHES):
        return [style(index) for index in range(len(names))]
    return [style(what.index(one) + len(OKABE_ITO) * where.index(at)) for one, at in names]


def left_out(shown: int, of: int, noun: str) -> str:
    """The sentence that says how many are not drawn, if any."""
    return f"{shown} of {plural(of, noun)} are drawn; every case has its own figures in its row." if of > shown else ""


def groups(rows: Sequence[Row], key: Callable[[Row], tuple[str, str]]) -> dict[tuple[str, str], list[Row]]:
    """The rows by what and where."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return found


def line_name(name: tuple[str, str]) -> str:
    """What and where as one name of a line."""
    return escaped(f"{name[0]}, {name[1]}")


def medians(points: dict[int, list[float]]) -> dict[str, Any]:
    """x, y and error bars of a line: equal points as their median, the bar from the smallest to the largest."""
    found = [(x, spread(values)) for x, values in sorted(points.items())]
    line: dict[str, Any] = {"x": [x for x, _ in found], "y": rounded([of.p50 for _, of in found])}
    if any(of.n > 1 for _, of in found):
        line["error_y"] = whiskers([of for _, of in found])
    return line


def whiskers(of: Sequence[Spread]) -> dict[str, Any]:
    """Error bars from the smallest to the largest, about the median."""
    ends = [(one.min or 0.0, one.p50 or 0.0, one.max or 0.0) for one in of]
    return {"type": "data", "symmetric": False, "thickness": 1.5,
            "array": rounded([most - middle for _, middle, most in ends]),
            "arrayminus": rounded([middle - least for least, middle, _ in ends])}  # fmt: skip


def length_axis(lengths: Sequence[int]) -> dict[str, Any]:
    """Tokens per sample, logarithmic; each length has its label as long as they are few, else each doubling."""
    shown = sorted(set(lengths))
    if len(shown) > 6:
        shown = [2**power for power in range(math.floor(math.log2(shown[0])), math.ceil(math.log2(shown[-1])) + 1)]
    return axis("tokens per sample", type="log", tickvals=shown, ticktext=[f"{length:,}" for length in shown])


def log_axis(title: str, values: Sequence[float | None]) -> dict[str, Any]:
    """A logarithmic axis with every label in full, at 1, 2 and 5 of each decade."""
    known = [value for value in values if value]
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    ticks = [factor * 10.0**power for power in range(low, high + 1) for factor in (1, 2, 5)]
    return axis(title, type="log", tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])


def steps_layout(warmup_steps: int, times: Sequence[float | None]) -> Figure:
    """Axes of a figure over optimizer steps, warm-up shaded; the step times, where any, in seconds."""
    upright = log_axis("step time, s", times) if any(times) else axis("step time, s")
    layout: Figure = {"xaxis": axis("optimizer step"), "yaxis": upright}
    if warmup_steps:
        layout["shapes"] = [{"type": "rect", "xref": "x", "yref": "paper", "x0": 0.5, "x1": warmup_steps + 0.5,
                             "y0": 0, "y1": 1, "line": {"width": 0}, "fillcolor": "rgba(128,128,128,0.16)",
                             "layer": "below"}]  # fmt: skip
        layout["annotations"] = [{"xref": "x", "yref": "paper", "x": warmup_steps + 0.5, "y": 1, "xanchor": "right",
                                  "yanchor": "bottom", "showarrow": False, "text": "warm-up"}]  # fmt: skip
    return layout


def thin(steps: list[int], values: list[float | None]) -> tuple[list[int], list[float | None]]:
    """At most `MAX_POINTS` points: of each stretch the largest, so that a spike stays seen."""
    stretch = -(-len(steps) // MAX_POINTS)
    if stretch <= 1:
        return steps, values
    starts = range(0, len(steps), stretch)
    best = [max(range(at, min(at + stretch, len(steps))), key=lambda i: values[i] or float("-inf")) for at in starts]
    return [steps[i] for i in best], [values[i] for i in best]


def rounded(values: Sequence[float | None]) -> list[float | None]:
    """Five significant digits: more than a pixel shows, half the bytes."""
    return [None if value is None else float(f"{value:.5g}") for value in values]
