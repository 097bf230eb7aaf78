"""The figures over all cases: each is one function rows -> figure, and one line in a list.

`None` where the rows have nothing to draw. Only equal set-ups on equal GPUs of one run share a line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from harness.frontier import OUT_OF_MEMORY
from harness.report.cards import card_gib
from harness.report.drawing import (
    MAX_CASES,
    MAX_LINES,
    MAX_RANKS,
    OKABE_ITO,
    Drawn,
    axis,
    escaped,
    groups,
    left_out,
    length_axis,
    line_name,
    medians,
    rounded,
    steps_layout,
    style,
    styles,
    thin,
    whiskers,
)
from harness.report.entry import Entry, full_label, peak_row
from harness.report.load_figures import bus_bandwidth, serving, trade_off
from harness.report.setups import training_setup, where
from harness.report.words import GIB
from harness.summary import TrainSummary, spread

CARDS_GIB = (24, 40, 48, 80)
"""Sizes of cards that people choose among, drawn beside those that were used."""
Groups = dict[tuple[str, str], list[Entry]]


def _set_up(entry: Entry) -> tuple[str, str]:
    assert entry.training is not None
    return training_setup(entry.training), where(entry.record, entry.beside)


def _longest_first(found: Groups) -> Groups:
    """The lines that say most in front: those of most lengths; at most as many as one figure bears."""

    def lengths(item: tuple[tuple[str, str], list[Entry]]) -> int:
        return len({row.training.seq_len for row in item[1] if row.training})

    return dict(sorted(found.items(), key=lengths, reverse=True)[:MAX_LINES])


def _by_length(rows: Sequence[Entry], value: Callable[[Entry], float | None]) -> dict[int, list[float]]:
    points: dict[int, list[float]] = {}
    for row in rows:
        if row.training and (found := value(row)) is not None:
            points.setdefault(row.training.seq_len, []).append(found)
    return points


def _lines(shown: Groups, value: Callable[[Entry], float | None]) -> list[dict[str, Any]]:
    """A line per set-up and place over the lengths."""
    looks = styles(list(shown))
    return [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": line_name(name),
            **look,
            **medians(_by_length(rows, value)),
        }
        for look, (name, rows) in zip(looks, shown.items(), strict=True)
    ]


# ---------------------------------------------------------------- speed


def _tokens_per_s(row: Entry) -> float | None:
    return row.train.tokens_per_s if row.train else None


def throughput(rows: Sequence[Entry]) -> Drawn | None:
    """Tokens per second over the sequence length, a line per set-up and GPU; equal points as their median."""
    known = [row for row in rows if row.case.kind == "train" and _tokens_per_s(row) is not None]
    found = groups(known, _set_up)
    if not found:
        return None
    lengths = [row.training.seq_len for row in known if row.training]
    if len(set(lengths)) == 1:
        return _throughput_bars(found, lengths[0])
    shown = _longest_first(found)
    layout = {"xaxis": length_axis(lengths), "yaxis": axis("tokens/s, all devices", rangemode="tozero")}
    lines = _lines(shown, _tokens_per_s)
    spans = "Bars span equal cases, whose median is drawn. " if any("error_y" in line for line in lines) else ""
    return Drawn({"data": lines, "layout": layout}, (spans + left_out(len(shown), len(found), "group")).strip())


def _throughput_bars(found: Groups, length: int) -> Drawn:
    """A bar per group, where there is one sequence length only."""
    shown = list(found.items())[:MAX_CASES]
    points = [spread([value for row in rows if (value := _tokens_per_s(row)) is not None]) for _, rows in shown]
    bars: dict[str, Any] = {"type": "bar", "orientation": "h", "name": "tokens/s", "width": 0.6,
                            "y": [line_name(name) for name, _ in shown], "x": rounded([point.p50 for point in points]),
                            "marker": {"color": OKABE_ITO[0]}}  # fmt: skip
    if any(point.n > 1 for point in points):
        bars["error_x"] = whiskers(points)
    title = f"tokens/s, all devices, samples of {length:,} tokens"
    layout = {"xaxis": axis(title, rangemode="tozero"), "yaxis": {"autorange": "reversed"},
              "meta": {"wide_labels": True}, "height": 110 + 34 * len(shown)}  # fmt: skip
    return Drawn({"data": [bars], "layout": layout}, left_out(len(shown), len(found), "group"))


def step_times(rows: Sequence[Entry]) -> Drawn | None:
    """The slowest rank's time of each step, a line per case, the most restless first; shared warm-up shaded."""
    known = [row for row in rows if row.train and row.train.step_time_s.n]
    if not known:
        return None
    restless = known if len(known) <= MAX_LINES else sorted(known, key=_restless, reverse=True)
    shown = restless[:MAX_LINES]
    data = [_slowest_line(row, index) for index, row in enumerate(shown)]
    warmups = {row.train.warmup_steps for row in shown if row.train}
    layout = steps_layout(warmups.pop() if len(warmups) == 1 else 0, [y for line in data for y in line["y"]])
    chosen = "Those with the largest spread are drawn. " if len(known) > len(shown) else ""
    return Drawn({"data": data, "layout": layout}, chosen + left_out(len(shown), len(known), "case"))


def _restless(row: Entry) -> float:
    return (row.train.step_time_s.coefficient_of_variation or 0.0) if row.train else 0.0


def _slowest_line(row: Entry, index: int) -> dict[str, Any]:
    ranks = row.record.last.observation.ranks if row.record.last else ()
    columns = [dict(zip(rank.steps.step, rank.steps.step_time_s, strict=True)) for rank in ranks]
    slowest = {step: max((c[step] or 0.0 for c in columns if step in c), default=0.0) for step in columns[0]}
    steps, times = thin(list(slowest), list(slowest.values()))
    return {"type": "scatter", "mode": "lines", "name": escaped(full_label(row)), "line": style(index)["line"],
            "x": steps, "y": rounded([time or None for time in times])}  # fmt: skip


# ---------------------------------------------------------------- memory


def _allocated_gib(row: Entry) -> float | None:
    peak = peak_row(row.train.memory, "allocated_bytes") if row.train else None
    return (peak.allocated_bytes or 0) / GIB if peak else None


def memory_by_length(rows: Sequence[Entry]) -> Drawn | None:
    """Peak allocated on the fullest GPU over the sequence length, with the sizes of cards; crosses for what ran out."""
    trained = [row for row in rows if row.case.kind == "train" and row.case.device == "cuda"]
    found = groups([row for row in trained if _allocated_gib(row) is not None], _set_up)
    if not found:
        return None
    shown = _longest_first(found)
    lines, failed = _lines(shown, _allocated_gib), _ran_out(trained)
    heights = [y for line in [*lines, *failed] for y in line["y"]]
    lengths = [row.training.seq_len for row in trained if row.training]
    sizes = _card_lines(max(heights), {round(gib) for row in trained if (gib := card_gib(row.record))})
    layout = {"xaxis": length_axis(lengths), "yaxis": axis("peak allocated on one GPU, GiB", rangemode="tozero"),
              "height": 400, **sizes}  # fmt: skip
    crosses = " A cross is a case that ran out of memory, at the size of its card." if failed else ""
    capped = " Capped cases are among the points." if any(row.cap_gib for row in trained) else ""
    note = ("Dotted: sizes of cards, of which the driver and libraries take 1 GiB and more for themselves."
            f"{capped}{crosses} {left_out(len(shown), len(found), 'group')}")  # fmt: skip
    return Drawn({"data": [*lines, *failed], "layout": layout}, note.strip())


def _ran_out(rows: Sequence[Entry]) -> list[dict[str, Any]]:
    """One trace of crosses: the cases that ran out of memory."""
    failed = [(row, gib) for row in rows if row.failure_class in OUT_OF_MEMORY and (gib := card_gib(row.record))]
    if not failed:
        return []
    names = [escaped(training_setup(row.training)) for row, _ in failed if row.training]
    return [{"type": "scatter", "mode": "markers", "name": "ran out of memory", "text": names,
             "x": [row.training.seq_len for row, _ in failed if row.training],
             "y": rounded([gib for _, gib in failed]),
             "marker": {"symbol": "x-open", "size": 10, "color": OKABE_ITO[5]}}]  # fmt: skip


def _card_lines(highest_gib: float, used_gib: set[int]) -> dict[str, Any]:
    """A dotted line for each card up to the first that is larger than all that was seen."""
    sizes = sorted({*CARDS_GIB, *(gib for gib in used_gib if all(abs(gib - size) > 2 for size in CARDS_GIB))})
    over = next((size for size in sizes if size >= highest_gib), sizes[-1])
    drawn = [size for size in sizes if size <= over]
    shapes = [{"type": "line", "xref": "paper", "yref": "y", "x0": 0, "x1": 1, "y0": size, "y1": size, "layer": "below",
               "line": {"dash": "dot", "width": 1, "color": "#8C8C8C"}} for size in drawn]  # fmt: skip
    names = [{"xref": "paper", "yref": "y", "x": 1, "xanchor": "right", "y": size, "yanchor": "bottom",
              "showarrow": False, "text": f"{size} GiB", "font": {"size": 10}} for size in drawn]  # fmt: skip
    return {"shapes": shapes, "annotations": names}


def memory_gpu(rows: Sequence[Entry]) -> Drawn | None:
    """Each rank's peak of allocated GPU memory, a row of bars per case."""
    return _memory_by_case(rows, "allocated_bytes", "peak allocated per rank, GiB")


def memory_cpu(rows: Sequence[Entry]) -> Drawn | None:
    """Each rank's peak growth of resident memory, a row of bars per case."""
    on_cpu = [row for row in rows if row.training and row.training.device == "cpu"]
    return _memory_by_case(on_cpu, "rss_growth_bytes", "peak growth of resident memory per rank, GiB")


def _memory_by_case(rows: Sequence[Entry], field: str, title: str) -> Drawn | None:
    peaks = {full_label(row): _rank_peaks(row.train, field) for row in rows if row.train}
    known = {name: ranks for name, ranks in peaks.items() if ranks}
    if not known:
        return None
    several = {name: ranks for name, ranks in known.items() if len(ranks) > 1} if len(known) > MAX_CASES else {}
    shown = dict(list((several or known).items())[:MAX_CASES])
    ranks = sorted({rank for peaks in shown.values() for rank in peaks})[:MAX_RANKS]
    data = [_rank_bars(rank, shown) for rank in ranks]
    height = 100 + (14 + 16 * len(ranks)) * len(shown)
    layout = {"barmode": "group", "xaxis": axis(title, rangemode="tozero"), "height": height,
              "yaxis": {"autorange": "reversed"}, "meta": {"wide_labels": True}}  # fmt: skip
    chosen = "Those of several ranks are drawn. " if several else ""
    return Drawn({"data": data, "layout": layout}, chosen + left_out(len(shown), len(known), "case"))


def _rank_peaks(train: TrainSummary, field: str) -> dict[int, int]:
    peaks: dict[int, int] = {}
    for row in train.memory:
        value = getattr(row, field)
        if value is not None:
            peaks[row.rank] = max(peaks.get(row.rank, 0), value)
    return peaks


def _rank_bars(rank: int, cases: dict[str, dict[int, int]]) -> dict[str, Any]:
    names = [name for name, ranks in cases.items() if rank in ranks]
    return {
        "type": "bar", "orientation": "h", "name": f"rank {rank}", "y": [escaped(name) for name in names],
        "x": rounded([cases[name][rank] / GIB for name in names]), "marker": {"color": OKABE_ITO[rank % 8]},
    }  # fmt: skip


FIGURES: tuple[tuple[str, Callable[[Sequence[Entry]], Drawn | None]], ...] = (
    ("Training throughput over sequence length", throughput),
    ("Peak GPU memory over sequence length", memory_by_length),
    ("Serving latency and throughput against load", serving),
    ("Serving: latency against throughput", trade_off),
    ("Bus bandwidth over the size of an all-reduce", bus_bandwidth),
    ("Step time over steps", step_times),
    ("Peak GPU memory by case and rank", memory_gpu),
    ("Peak CPU memory by case and rank", memory_cpu),
)
