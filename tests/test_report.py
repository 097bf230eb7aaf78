"""The report: everything escaped, nothing fetched, nothing dropped; comparison; what a terminal shows."""

from __future__ import annotations

import base64
import csv
import hashlib
import html.parser
import io
import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import plotly.graph_objects as go
import pytest
from fakes import records as fakes
from fakes.hostile import NASTY, hostile, with_last
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from syrupy.assertion import SnapshotAssertion

from harness import report
from harness.report import compare, drawing, figures, headline, page, parts, sections, tables, terminal, words
from harness.report.entry import counts, entries, number_label, verdict
from harness.schema import Attempt, GpuSeries, GpuSteady, NcclFacts, Record, TrainCase, case_id


class Elements(html.parser.HTMLParser):
    """The elements of a page in order, with their attributes, and the text of each script and style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = (dict(attrs).get("type") or tag) if tag in ("script", "style") else ""
        if self.inside:
            self.texts.append((self.inside, ""))

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside:
            kind, text = self.texts.pop()
            self.texts.append((kind, text + data))


@pytest.fixture(scope="module")
def named() -> dict[str, Record]:
    return fakes.named()


def run_of(records: Sequence[Record], folder: Path, name: str = "quickstart") -> report.ReportRun:
    return report.ReportRun(name, fakes.BEGAN, tuple(records), str(folder))


def rendered(records: Sequence[Record], folder: Path, name: str = "quickstart") -> str:
    out = folder / "index.html"
    report.render([run_of(records, folder, name)], out)
    return out.read_text(encoding="utf-8")


def data_of(text: str, name: str = "data") -> Any:
    """The JSON that the page's script reads."""
    match = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', text, re.DOTALL)
    assert match
    return json.loads(match[1])


def rows_of(text: str) -> dict[int, dict[str, Any]]:
    return {row["i"]: row for table in data_of(text)["tables"] for row in table["rows"]}


def cell_of(record: Record, kind: str, title: str) -> words.Cell:
    one = entries("run", [record])[0]
    return next(column for column in tables.COLUMNS[kind] if column.title == title).of(one)


def repeated(record: Record, times: Sequence[float]) -> list[Record]:
    """A training record as repeats whose steps take so many times as long."""
    found = []
    for index, factor in enumerate(times):
        assert isinstance(record.case, TrainCase)
        assert record.last
        ranks = []
        for rank in record.last.observation.ranks:
            slower = tuple(None if time is None else time * factor for time in rank.steps.step_time_s)
            ranks.append(rank.model_copy(update={"steps": rank.steps.model_copy(update={"step_time_s": slower})}))
        seen = record.last.observation.model_copy(update={"ranks": tuple(ranks)})
        case = record.case.model_copy(update={"repeat": index})
        one = with_last(record, observation=seen)
        found.append(one.model_copy(update={"case": case, "case_id": f"{record.case_id}-{index}"}))
    return found


# ---------------------------------------------------------------- the page


def test_every_record_has_a_row_and_a_detail(named: dict[str, Record], tmp_path: Path) -> None:
    text = rendered(list(named.values()), tmp_path)
    rows = rows_of(text)
    assert sorted(rows) == list(range(len(named)))
    for index, record in enumerate(named.values()):
        assert rows[index]["s"] == record.status
        assert data_of(text, f"detail-{index}")["head"]["id"] == record.case_id


def test_the_page_fetches_nothing_and_runs_only_its_own_two_scripts(named: dict[str, Record], tmp_path: Path) -> None:
    text = rendered(list(named.values()), tmp_path)
    found = Elements(text)
    policy = next(a["content"] for t, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    running = [content for kind, content in found.texts if kind in ("script", "style")]
    assert len(running) == 3
    for content in running:
        assert f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" in policy
    assert not [
        tag for tag, attributes in found.tags if tag in ("link", "img", "iframe", "object") or "src" in attributes
    ]
    assert not [attributes for _, attributes in found.tags if re.match(r"(?i)\w+:|//", attributes.get("href") or "")]
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]


def test_no_text_of_a_log_becomes_an_element(named: dict[str, Record], tmp_path: Path) -> None:
    plain = [named["failed_oom"], named["failed_hostile"]]
    clean_page = Elements(rendered([hostile(record, "plain") for record in plain], tmp_path))
    nasty = rendered([hostile(record, NASTY) for record in plain], tmp_path)
    assert [tag for tag, _ in Elements(nasty).tags] == [tag for tag, _ in clean_page.tags]
    assert "<img" not in nasty.split("<script>/**\n* plotly.js")[0]
    for index in range(2):
        assert "alert(1)" in json.dumps(data_of(nasty, f"detail-{index}"))


def test_hostile_text_reaches_no_address(named: dict[str, Record], tmp_path: Path) -> None:
    text = rendered([hostile(named["failed_oom"], "javascript:alert(1)")], tmp_path)
    detail = data_of(text, "detail-0")
    links = [href for _, href in detail["head"]["links"]]
    links += [cell[2] for part in detail["sections"] for row in part.get("r", []) for cell in row if len(cell) > 2]
    assert links
    assert not [href for href in links if re.match(r"(?i)[a-z][a-z0-9+.-]*:|//", href)]


def test_links_lead_from_the_page_to_the_run_and_never_out_of_it(named: dict[str, Record], tmp_path: Path) -> None:
    run, out = tmp_path / "runs" / "a run #1", tmp_path / "reports"
    record = named["lora"]
    job = record.attempts[0].jobs[0]
    for path in (run / "cases" / record.case_id / "record.json", run / job.dir / "stderr.log"):
        path.parent.mkdir(parents=True)
        path.write_text("x")
    out.mkdir()
    link = page.linker(run_of([record], run), out)
    for path in (f"cases/{record.case_id}/record.json", f"{job.dir}/stderr.log"):
        assert (out / unquote(link(path))).resolve() == (run / path).resolve()
    assert page.linker(run_of([record], tmp_path), out)(f"{job.dir}/stderr.log") == "", "records without their logs"
    assert link("../../etc/passwd") == ""
    assert link("/etc/passwd") == ""


LEAVES = st.none() | st.booleans() | st.text() | st.integers()


@given(st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8))
def test_embedded_json_reads_back_and_cannot_end_its_element(value: Any) -> None:
    text = page.compact(value)
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == value


def test_a_detail_keeps_to_its_limit_and_names_what_it_leaves_out(named: dict[str, Record]) -> None:
    one = entries("run", [hostile(named["failed_oom"], NASTY)])[0]
    whole = page.detail(one, parts.no_link, 10**9)
    assert json.loads(whole)["head"]["left_out"] == []
    cut = page.detail(one, parts.no_link, 8_000)
    assert len(cut.encode()) < 9_500
    assert json.loads(cut)["head"]["left_out"]
    assert "Diagnosis" in [part["t"] for part in json.loads(cut)["sections"]]
    assert len(whole.encode()) < 40_000, "what one record may add to a page, whatever its log holds"


def test_a_page_that_cannot_be_written_leaves_the_old_one(named: dict[str, Record], tmp_path: Path) -> None:
    out = tmp_path / "index.html"
    out.write_text("old")
    broken = named["lora"].model_copy(update={"finished_at": float("nan")})
    with pytest.raises(ValueError, match="NaN"):
        report.render([run_of([broken], tmp_path)], out)
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_the_headline_counts_planned_cases_and_apart_from_them_the_added(named: dict[str, Record]) -> None:
    added = named["qlora"].model_copy(update={"parent": named["lora"].case_id})
    found = counts([named["lora"], named["failed_oom"], named["skipped"], added])
    assert found == {"planned": 3, "measured": 1, "failed": 1, "skipped": 1, "added": 1}


def test_answers_carry_their_n_and_lead_to_their_case(named: dict[str, Record], tmp_path: Path) -> None:
    text = rendered(list(named.values()), tmp_path)
    answers = re.findall(r'<a class="answer" href="#case-(\d+)">\s*<span class="q">(.*?)</span>\s*<span class="v">(.*?)'
                         r'</span>\s*<span class="b">(.*?)</span>', text)  # fmt: skip
    fastest = next(answer for answer in answers if answer[1] == "Fastest training, tiny-hybrid on CPU")
    assert "n = 15 steps" in fastest[3]
    assert fastest[3].endswith("; measured, random weights")
    row = rows_of(text)[int(fastest[0])]
    assert fastest[2].removesuffix(" tokens/s") in [cell[0] for cell in row["c"]]


def test_what_a_page_says_of_each_kind(named: dict[str, Record], snapshot: SnapshotAssertion) -> None:
    for kind, names in {"train": ("lora", "fsdp", "gpu", "failed_oom", "skipped"), "serve": ("serve_4", "failed_serve"),
                        "chain": ("chain_merged",)}.items():  # fmt: skip
        rows = entries("run", [named[name] for name in names])
        shown = {"columns": [column.title for column in tables.columns_of(kind, rows)],
                 "rows": [[column.of(row).text for column in tables.columns_of(kind, rows)] for row in rows],
                 "verdicts": [verdict(row) for row in rows]}  # fmt: skip
        assert shown == snapshot(name=kind)


# ---------------------------------------------------------------- numbers


def test_what_was_not_measured_is_a_dash_with_a_reason_and_never_zero(named: dict[str, Record]) -> None:
    failed, skipped = cell_of(named["failed_nan"], "train", "Tokens/s"), cell_of(named["skipped"], "train", "Step p50")
    assert (failed.text, failed.sort, failed.why) == (words.MISSING, None, "not measured: the case failed")
    assert (skipped.text, skipped.why) == (words.MISSING, "not measured: the case was skipped")
    on_cpu = cell_of(named["lora"], "train", "Alloc. GiB")
    assert on_cpu.text == words.MISSING
    assert "no rank stated" in on_cpu.why
    assert words.count(0).text == "0"


def test_a_failed_case_yields_no_number_though_its_steps_were_seen(named: dict[str, Record]) -> None:
    one = entries("run", [named["failed_nan"]])[0]
    assert one.summary
    assert one.summary.train
    assert one.summary.train.tokens_per_s is not None
    assert one.train is None
    assert number_label(one) == "no number"
    assert figures.throughput([one]) is None


def test_memory_columns_follow_the_device(named: dict[str, Record]) -> None:
    def titles(*names: str) -> list[str]:
        rows = entries("run", [named[name] for name in names])
        return [column.title for column in tables.columns_of("train", rows) if "GiB" in column.title]

    assert titles("lora") == ["RSS+ GiB"]
    assert titles("gpu") == ["Alloc. GiB", "Resvd. GiB", "Device GiB"]
    assert cell_of(named["gpu"], "train", "Alloc. GiB").why.endswith("rank 1, phase backward")


def test_a_case_is_told_apart_by_what_is_unusual_in_it(named: dict[str, Record]) -> None:
    found = entries("run", [named["lora"], named["ddp"], named["full"], named["failed_nan"]])
    assert [entry.differs for entry in found] == ["", "", "param_dtype fp32", "learning_rate 0.3"]


def test_a_capped_case_says_what_fits_and_never_how_fast(named: dict[str, Record]) -> None:
    assert isinstance(named["gpu"].case, TrainCase)
    case = named["gpu"].case.model_copy(update={"memory_cap_gib": 80.0})
    capped = named["gpu"].model_copy(update={"case": case, "case_id": case_id(case)})
    assert number_label(entries("run", [capped])[0]) == "capped at 80 GiB, random weights"
    for title in ("Tokens/s", "Step p50", "CV"):
        cell = cell_of(capped, "train", title)
        assert (cell.text, cell.why) == (words.MISSING, "memory capped at 80 GiB: says what fits, never how fast")
    assert cell_of(capped, "train", "Alloc. GiB").text == cell_of(named["gpu"], "train", "Alloc. GiB").text
    assert figures.throughput(entries("run", [capped])) is None
    assert (verdict(entries("run", [capped])[0])[1], tables.key_number(entries("run", [capped])[0]).text) == (
        "fits in 80 GiB", "fits in 80 GiB")  # fmt: skip
    titles = {part.title for part in sections.sections(entries("run", [capped])[0])}
    assert not titles & {"Step time over steps", "Phases"}
    assert {"Loss over steps", "Memory by phase and rank"} <= titles
    names = {row.measure.name for row in compared([capped], [capped]).rows}
    assert names == {"peak allocated", "peak reserved"}


def test_labels_say_measured_or_replayed_and_which_weights(named: dict[str, Record]) -> None:
    provenance = named["lora"].provenance
    assert provenance
    replayed = provenance.model_copy(update={"number_kind": "replayed", "weights": "hub@abc"})
    record = named["lora"].model_copy(update={"provenance": replayed})
    assert number_label(entries("run", [record])[0]) == "replayed, hub@abc weights"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0123456, "0.0123"), (0.999, "0.999"), (9.999, "10.0"), (99.96, "100"), (1234.5, "1,234"),
     (3e-7, "3.00e-07")],
)  # fmt: skip
def test_numbers_have_three_significant_digits(value: float, text: str) -> None:
    assert words.digits(value) == text


def test_what_the_sampler_saw_stands_in_the_detail(named: dict[str, Record]) -> None:
    assert named["gpu"].last
    steady = GpuSteady(start=fakes.BEGAN, duration_s=10.0, tokens=1000, energy_j=6000.0, energy_from="counter")
    one = GpuSeries(role="train", node=0, ordinal=0, name="NVIDIA H200", uuid=NASTY, memory_max_bytes=30 * 2**30,
                    steady=steady, throttle={"sw_power_cap": 0.25})  # fmt: skip
    series = (one, one.model_copy(update={"ordinal": 1}))
    nccl = NcclFacts(version="2.28.9", transports={"P2P/CUMEM": 24})
    seen = named["gpu"].last.observation.model_copy(update={"gpus": series, "nccl": nccl})
    record = with_last(named["gpu"], observation=seen)
    found = {part.title: part for part in sections.sections(entries("run", [record])[0])}
    together = dict(found["GPU energy and power over the measured time"].facts)
    assert (together["Joules per token"].text, together["Energy, J"].text) == ("12.0", "12,000")
    assert [row[3].text for row in found["GPUs as sampled"].rows] == ["30.0", "30.0"]
    assert found["GPUs as sampled"].rows[0][-1].text == "sw power cap 25.0 %"
    assert "P2P/CUMEM 24" in dict(found["How NCCL connected the ranks"].facts)["transports"].text
    page.compact([parts.as_json(part) for part in found.values()])


# ---------------------------------------------------------------- text of a log


@given(st.text())
def test_clean_text_shows_everything_it_holds(text: str) -> None:
    found = words.clean(text)
    assert not [c for c in found if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")]
    assert "\n" not in words.one_line(text)


def test_colour_codes_go_and_reordering_marks_are_named() -> None:
    assert words.clean("\x1b[1;31mred\x1b[0m \x1b]0;title\x07end") == "red end"
    assert words.clean("a\u202eb\u200f") == "a<U+202E>b<U+200F>"
    assert words.clean("שלום, 世界 é") == "שלום, 世界 é"


def test_long_lines_and_texts_are_cut_and_counted() -> None:
    line = words.clean("x" * 5_000)
    assert line == "x" * words.LINE_LIMIT + "… [4,600 more characters]"
    text = words.clean_end("\n".join(f"line {number}" for number in range(10_000)))
    assert text.endswith("line 9999")
    assert text.startswith("[")
    assert len(text) < 2 * words.TEXT_LIMIT


# ---------------------------------------------------------------- figures


@pytest.mark.parametrize(("title", "make"), figures.FIGURES, ids=[make.__name__ for _, make in figures.FIGURES])
def test_each_figure_is_one_that_plotly_accepts(
    title: str, make: Any, named: dict[str, Record], snapshot: SnapshotAssertion
) -> None:
    drawn = make(entries("run", list(named.values())))
    assert drawn is not None, title
    go.Figure(**drawn.figure)
    assert drawn.figure == snapshot
    assert make([]) is None


def test_each_figure_of_a_case_is_one_that_plotly_accepts(named: dict[str, Record]) -> None:
    for name in ("fsdp", "gpu"):
        drawn = [part.figure for part in sections.sections(entries("run", [named[name]])[0]) if part.figure]
        assert len(drawn) == 3
        for figure in drawn:
            go.Figure(**figure)
    bars = {trace["name"] for trace in drawn[2]["data"]}
    assert bars == {f"rank {rank}, {kind}" for rank in (0, 1) for kind in ("allocated", "reserved", "device used")}


def test_throughput_over_lengths_shows_the_range_of_repeats(named: dict[str, Record]) -> None:
    assert isinstance(named["lora"].case, TrainCase)
    longer = named["lora"].model_copy(update={"case": named["lora"].case.model_copy(update={"seq_len": 512})})
    drawn = figures.throughput(entries("run", [*repeated(named["lora"], (1, 2, 4)), longer]))
    assert drawn
    (line,) = drawn.figure["data"]
    assert line["x"] == [256, 512]
    assert line["error_y"]["array"][0] == pytest.approx(line["y"][0], rel=1e-3)
    assert line["error_y"]["arrayminus"][0] == pytest.approx(line["y"][0] / 2, rel=1e-3)


def on(record: Record, gpu: str, **changes: Any) -> Record:
    """The same training record on another GPU, of another case."""
    assert isinstance(record.case, TrainCase)
    assert record.provenance
    cards = tuple(one.model_copy(update={"name": gpu}) for one in record.provenance.gpus)
    case = record.case.model_copy(update={"optimizer": "adamw_torch_fused"} | changes)
    provenance = record.provenance.model_copy(update={"gpus": cards})
    return record.model_copy(update={"case": case, "case_id": case_id(case), "provenance": provenance})


def test_only_equal_set_ups_on_equal_gpus_of_one_run_share_a_line(named: dict[str, Record]) -> None:
    gpu = named["gpu"]
    records = [on(gpu, name, seq_len=length, activation_checkpointing=kept) for name in ("NVIDIA H100", "NVIDIA H200")
               for length in (2048, 4096) for kept in (True, False)]  # fmt: skip
    for make in (figures.throughput, figures.memory_by_length):
        drawn = make([*entries("a", records, name_run=True), *entries("b", records, name_run=True)])
        assert drawn
        lines = {line["name"]: (line["line"]["color"], line["line"]["dash"]) for line in drawn.figure["data"]}
        assert len(lines) == len(set(lines.values())) == 2 * 2 * 2
        assert {name.split(", ", 1)[1] for name in lines} == {
            f"ddp {words.TIMES} 2{options}, {card}, {run}"
            for card in ("H100", "H200") for run in "ab" for options in ("", ", no checkpointing")
        }  # fmt: skip
        colours = {name.rsplit(", ", 2)[0]: colour for name, (colour, _) in lines.items()}
        assert {colour for colour, _ in lines.values()} == set(colours.values())


def test_what_ran_out_of_memory_is_a_cross_at_the_size_of_its_card(named: dict[str, Record]) -> None:
    capped = on(named["gpu"], "NVIDIA H200", memory_cap_gib=80.0)
    failed = on(named["failed_oom"], "NVIDIA H200", memory_cap_gib=24.0)
    drawn = figures.memory_by_length(entries("run", [capped, failed, named["failed_nan"]]))
    assert drawn
    line, crosses = drawn.figure["data"]
    assert (crosses["name"], crosses["x"], crosses["y"]) == ("ran out of memory", [8192], [24.0])
    assert [shape["y0"] for shape in drawn.figure["layout"]["shapes"]] == [24, 40, 48, 80][
        : 2 if line["y"][0] < 40 else 4
    ]


def test_what_fits_which_card_is_what_ran_and_what_ran_out(named: dict[str, Record]) -> None:
    gpu, oom = named["gpu"], named["failed_oom"].last
    assert oom
    failed = gpu.model_copy(update={"status": "failed", "attempts": (oom,)})
    other = with_last(failed, diagnosis=oom.diagnosis and oom.diagnosis.model_copy(update={"failure_class": "nccl"}))
    rows = entries("run", [
        on(gpu, "NVIDIA H200", seq_len=4096), on(gpu, "NVIDIA H200", seq_len=2048, repeat=1),
        on(gpu, "NVIDIA H200", seq_len=2048, memory_cap_gib=24.0), on(failed, "NVIDIA H200", seq_len=9000),
        on(failed, "NVIDIA H200", seq_len=3000, memory_cap_gib=24.0),
        on(failed, "NVIDIA H200", seq_len=8192, memory_cap_gib=24.0), on(other, "NVIDIA H200", seq_len=5000),
        on(failed, "NVIDIA H200", seq_len=2048, memory_cap_gib=24.0, micro_batch=2), named["lora"], named["skipped"],
    ])  # fmt: skip
    found = headline.cards(rows)
    assert found["head"] == ["as 24 GiB", "H200"]
    setup = f"{gpu.case.variant} lora, ddp {words.TIMES} 2"  # type: ignore[union-attr]
    assert found["rows"] == [
        {"name": setup, "cells": [
            [("2,048 fits", "#case-2"), ("3,000 does not", "#case-4")],
            [("4,096 fits", "#case-0"), ("9,000 does not", "#case-3"), ("5,000 failed otherwise", "#case-6")]]},
        {"name": f"{setup}, batch 2", "cells": [[("2,048 does not", "#case-7")], []]},
    ]  # fmt: skip
    assert headline.cards(rows[:2])["rows"] == [], "one card used whole, and nothing ran out: no table"


def test_an_answer_says_by_which_options_it_was_reached(named: dict[str, Record]) -> None:
    gpu = named["gpu"]
    rows = entries("run", [on(gpu, "NVIDIA H200", activation_checkpointing=False, micro_batch=2)])
    fastest = next(one for one in headline.answers(rows) if one.question.startswith("Fastest training"))
    assert "batch 2, no checkpointing" in fastest.because


def test_a_server_is_drawn_by_what_it_gives_at_which_latency(named: dict[str, Record]) -> None:
    drawn = figures.trade_off(entries("run", [named["serve_1"], named["serve_4"]]))
    assert drawn
    upper, lower = drawn.figure["data"]
    assert (upper["text"], lower["text"]) == (["1", "4"], ["1", "4"])
    assert upper["x"] == lower["x"] == sorted(upper["x"])
    assert figures.trade_off(entries("run", [named["serve_1"]])) is None, "one load is no curve"


def test_a_long_series_keeps_its_spike() -> None:
    values: list[float | None] = [0.1] * 10_000
    values[7_777] = 9.0
    steps, shown = drawing.thin(list(range(1, 10_001)), values)
    assert len(steps) <= drawing.MAX_POINTS
    assert (steps[shown.index(9.0)], max(v for v in shown if v)) == (7_778, 9.0)


def test_lines_left_out_are_counted(named: dict[str, Record]) -> None:
    rows = entries("run", repeated(named["lora"], [1.0] * 20))
    drawn = figures.step_times(rows)
    assert drawn
    assert len(drawn.figure["data"]) == drawing.MAX_LINES
    assert "16 of 20 cases" in drawn.note


# ---------------------------------------------------------------- two runs


def compared(base: Sequence[Record], other: Sequence[Record]) -> compare.Compared:
    return compare.compare(entries("a", base), entries("b", other), ("a", "b"))


def throughput_row(found: compare.Compared) -> compare.Comparison:
    return next(row for row in found.rows if row.measure.name == "training throughput")


def test_repeats_are_one_row_with_n_median_and_range(named: dict[str, Record]) -> None:
    row = throughput_row(
        compared(repeated(named["lora"], (1.0, 1.02, 1.04)), repeated(named["lora"], (2.0, 2.02, 2.04)))
    )
    assert (row.base.n, row.other.n) == (3, 3)
    assert row.ratio == pytest.approx(1.02 / 2.02)
    assert row.base.min == pytest.approx((row.base.p50 or 0) * 1.02 / 1.04)
    assert row.judgement == "worse"


def test_a_difference_within_the_spread_is_not_called_one(named: dict[str, Record]) -> None:
    row = throughput_row(compared(repeated(named["lora"], (1.0, 1.3)), repeated(named["lora"], (1.1, 1.4))))
    assert row.judgement == "within the spread"
    single = throughput_row(compared([named["lora"]], repeated(named["lora"], (2.0,))))
    assert single.judgement == "spread unknown (n = 1)"


def test_ids_in_one_run_only_are_named(named: dict[str, Record]) -> None:
    found = compared([named["lora"], named["qlora"]], [named["lora"], named["serve_1"]])
    assert found.only_base == (named["qlora"].case_id,)
    assert found.only_other == (named["serve_1"].case_id,)


def test_a_case_that_failed_in_one_run_keeps_its_row_without_a_ratio(named: dict[str, Record]) -> None:
    failed = named["lora"].model_copy(update={"status": "failed"})
    row = throughput_row(compared([named["lora"]], [failed]))
    assert (row.other_status, row.other.n, row.ratio, row.judgement) == ("failed", 0, None, "newly failed")
    both = compared([failed], [failed])
    assert [(row.measure.name, row.base_status, row.judgement) for row in both.rows] == [
        ("status", "failed", "fails in both")
    ]
    assert throughput_row(compared([failed], [named["lora"]])).judgement == "no longer fails"


def test_what_fails_newly_stands_first_on_the_page_of_two_runs(named: dict[str, Record], tmp_path: Path) -> None:
    failed = named["ddp"].model_copy(update={"status": "failed"})
    where = named["lora"].provenance
    assert where
    later = named["lora"].model_copy(update={"provenance": where.model_copy(update={"commit": "f" * 40})})
    runs = [run_of([named["failed_nan"], named["lora"], named["ddp"]], tmp_path, "monday"),
            run_of([named["failed_nan"], later, failed], tmp_path, "tuesday")]  # fmt: skip
    found = [entries(run.name, run.records) for run in runs]
    both = compare.compare(*found, ("monday", "tuesday"))
    rows = [entry for of_run in found for entry in of_run]
    shown = headline.failures(rows, [both])["shown"]
    assert isinstance(shown, list)
    assert [one["new"] for one in shown] == ["Newly failed: did not fail in monday.", "", ""]
    first, ratio, *_ = headline.changes([both])
    assert (first.value, ratio.value) == ("1 case newly failed", f"{words.TIMES} 1.000")
    report.render(runs, tmp_path / "both.html")
    (table,) = data_of((tmp_path / "both.html").read_text(encoding="utf-8"))["compared"]
    assert [row["c"][5][0] for row in table["rows"]][:2] == ["newly failed"] * 2
    (differs,) = headline.differences(runs)
    assert (differs[0], [value[-6:] for value in differs[1]]) == ("Harness", ["000000", "ffffff"])


def test_the_csv_reads_back_and_holds_no_formula(named: dict[str, Record], tmp_path: Path) -> None:
    base = run_of([*repeated(named["lora"], (1.0, 1.1)), named["qlora"]], tmp_path, "=cmd()")
    other = run_of(repeated(named["lora"], (2.0,)), tmp_path, "b")
    found = list(csv.DictReader(io.StringIO(report.comparison_csv(base, other))))
    first = found[0]
    assert (first["measure"], first["base_n"], first["other_n"]) == ("training throughput", "2", "1")
    assert float(first["ratio"]) == pytest.approx(float(first["other_median"]) / float(first["base_median"]))
    assert first["base_run"] == "'=cmd()"
    assert (found[-1]["case_id"], found[-1]["base_status"], found[-1]["other_status"]) == (
        named["qlora"].case_id, "present", "absent")  # fmt: skip


def test_a_page_of_two_runs_holds_both_and_their_comparison(named: dict[str, Record], tmp_path: Path) -> None:
    runs = [run_of([named["lora"], named["ddp"]], tmp_path, "monday"), run_of([named["lora"]], tmp_path, "tuesday")]
    report.render(runs, tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    found = data_of(text)
    assert [row["apart"] for row in rows_of(text).values()] == ["monday", "monday", "tuesday"]
    (both,) = found["compared"]
    assert both["only"] == [["monday", [named["ddp"].case_id]], ["tuesday", []]]
    assert any(cell[0] == f"{words.TIMES} 1.000" for row in both["rows"] for cell in row["c"])


# ---------------------------------------------------------------- the terminal


def printed(renderable: Any, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    console.print(renderable)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


def test_a_case_is_readable_at_80_columns(named: dict[str, Record], tmp_path: Path) -> None:
    for record in named.values():
        text = printed(terminal.case(record, Path("runs/quickstart")))
        assert record.case_id in text
        assert max(map(len, text.splitlines())) <= 80
    assert "GPU memory ran out" in printed(terminal.case(named["failed_oom"], Path("runs/quickstart")))


def test_a_terminal_interprets_nothing_of_a_record(named: dict[str, Record]) -> None:
    text = printed(terminal.case(hostile(named["failed_oom"], NASTY), Path("runs/quickstart")))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "[bold red]markup[/]" in text.replace("\n", " ") or "[bold" in text


def test_a_run_lists_status_number_and_verdict_of_every_case(named: dict[str, Record]) -> None:
    text = printed(terminal.run_table(list(named.values())))
    for record in named.values():
        assert f"{record.status:8}  {record.case_id}" in text
    assert "3,821 tokens/s" in text
    assert "19 cases planned: 13 measured, 5 failed, 1 skipped" in text
    assert "numbers are measured; measured, random weights" in text


def test_a_line_for_a_case_that_ended(named: dict[str, Record]) -> None:
    assert printed(terminal.line(named["lora"], 3, 9), 120).strip() == (
        f"[3/9] measured {named['lora'].case_id}: 3,821 tokens/s")  # fmt: skip
    assert "GPU memory ran out" in printed(terminal.line(named["failed_oom"], 4, 9), 120)


# ---------------------------------------------------------------- whatever a record holds


@settings(max_examples=25)
@given(text=st.text(), count=st.integers(0, 3))
def test_any_text_in_any_place_makes_a_page(text: str, count: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    record = hostile(_failed(), text)
    several = record.model_copy(update={"attempts": tuple(_renumbered(record, count))})
    one = entries("run", [several])[0]
    assert json.loads(page.detail(one, parts.no_link, 60_000))["head"]["id"] == record.case_id


def _renumbered(record: Record, count: int) -> list[Attempt]:
    return [record.attempts[0].model_copy(update={"number": number + 1}) for number in range(count)]


_FAILED: list[Record] = []


def _failed() -> Record:
    """One failed record, made once."""
    if not _FAILED:
        _FAILED.append(fakes.named()["failed_oom"])
    return _FAILED[0]
