"""A failed case's page and terminal view: what happened in time, the ladder as a chain of records, what fitted."""

from __future__ import annotations

import io
from pathlib import Path

from fakes import climbed
from rich.console import Console, RenderableType

from harness import matrix, report
from harness.report import headline, terminal
from harness.report.chain import answer, conclusion
from harness.report.entry import entries
from harness.report.parts import Section
from harness.report.sections import sections
from harness.report.words import MISSING
from harness.schema import LadderEnd, Record


def printed(*parts: RenderableType) -> str:
    out = Console(file=io.StringIO(), width=80, highlight=False)
    for part in parts:
        out.print(part)
    assert isinstance(out.file, io.StringIO)
    return " ".join(out.file.getvalue().split())


def section(record: Record, records: list[Record], title: str) -> Section:
    entry = next(one for one in entries("run", records) if one.record is record)
    return next(one for one in sections(entry, lambda path: path) if one.title == title)


def cells(found: Section) -> list[list[str]]:
    return [[cell.text for cell in row] for row in found.rows]


def test_the_chain_is_a_table_of_records_with_links() -> None:
    records = climbed.climbed()
    for record in records:  # whichever of them is opened
        table = section(record, records, "Ladder")
        assert [row[0] for row in cells(table)] == ["as planned", "1. O1 seq_len", "2. O2+O3 micro_batch"]
        assert [row[2] for row in cells(table)][1:] == ["failed: oom_gpu_backward in train", "ran as asked"]
        assert [row[3].href for row in table.rows] == [f"cases/{one.case_id}/record.json" for one in records]
    assert cells(section(records[0], records, "Rungs passed over")) == [["seq_len", "climbed often enough", "2"]]


def test_what_fitted_is_told_by_what_changed_altogether() -> None:
    (first, *_) = entries("run", climbed.climbed())
    assert conclusion(first.chain) == (
        "After 2 reruns it fitted with seq_len 512 → 256, micro_batch 4 → 2, grad_accum 1 → 2."
    )


def test_a_ladder_that_came_to_nothing_says_why() -> None:
    first, second, _ = climbed.climbed()
    end = LadderEnd(ladder="oom", reason="ladder_tries: 1 of 1 are spent")
    last = second.model_copy(update={"ladder_end": end})
    assert conclusion((first, last)) == "1 rerun, then the ladder ended: ladder_tries: 1 of 1 are spent."
    alone = first.model_copy(update={"ladder_end": LadderEnd(ladder="oom", reason="free the GPU")})
    assert conclusion((alone,)) == "The ladder was not climbed: free the GPU."


def test_the_timeline_has_all_ranks_in_order_and_marks_what_began_it() -> None:
    records = climbed.climbed()
    rows = cells(section(records[0], records, "Timeline"))
    assert [row[2].split(":")[0] for row in rows] == [
        "train job starts", "ends step 2, its last", "ends step 2, its last", "INITIATING", "cascade", "train job ends",
    ]  # fmt: skip
    assert [row[1] for row in rows[3:5]] == ["1", "0"]
    assert rows[3][0].endswith("+20.0 s")
    assert rows[3][3].endswith("events.rank1.jsonl:7")


def test_added_cases_are_counted_and_shown_apart() -> None:
    text = printed(terminal.run_table(climbed.climbed()))
    assert "1 case planned: 0 measured, 1 failed, 0 skipped; 2 added by a ladder" in text
    assert "added by a ladder: O1 seq_len 512 → 256" in text
    failures = headline.failures(entries("run", climbed.climbed()))
    assert failures["n"] == 1


def test_a_search_is_one_answer_and_no_list_of_failures() -> None:
    records = climbed.searched()
    found = entries("run", records)
    assert found[0].search is not None
    assert answer(found[0].search) == "seq_len 128 fits, 192 is the first that does not; 2 runs of a grid of 4"
    assert headline.failures(found)["n"] == 0
    (one,) = headline.searches(found)
    assert one["index"] == 1
    assert "search: seq_len 128 fits" in printed(terminal.run_table(records))
    assert cells(section(records[1], records, "Tried seq_len")) == [
        ["128", "fits", MISSING],
        ["192", "too large", "oom_host"],
    ]


def test_the_page_holds_them(tmp_path: Path) -> None:
    records = [*climbed.climbed(), *climbed.searched()]
    report.render([report.ReportRun("run", 0.0, tuple(records), str(tmp_path))], tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text()
    assert "After 2 reruns it fitted with" in text
    assert "192 is the first that does not" in text


def test_a_plan_says_how_few_runs_a_search_takes(tmp_path: Path) -> None:
    path = tmp_path / "m.yaml"
    path.write_text(
        "version: 1\nname: m\ndefaults: {device: cpu, variant: tiny-hybrid, method: lora}\ntrain:\n"
        "  - {seq_len: {from: 64, to: 2048, step: 64}, frontier: seq_len}\n  - {seq_len: 64, seed: 7, ladder: oom}\n"
    )
    text = printed(*terminal.plan(matrix.load(path)))
    assert "searches take at most 7 runs for 32 cases; the rest are skips" in text
    assert "1 case may climb a ladder" in text
