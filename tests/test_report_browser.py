"""The report in a real browser: what shows, what a keyboard can do, and that nothing of a log runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fakes import climbed
from fakes import records as fakes
from fakes.hostile import NASTY, hostile, with_last

from harness import report
from harness.schema import Record, TrainCase, case_id

pytestmark = pytest.mark.browser


@dataclass
class Opened:
    """A page in a tab, and all that it complained of or asked for."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)

    def row(self, record: Record) -> Any:
        """The row of a case, which has its id as hover text of its first cell."""
        return self.page.locator("tr.row", has=self.page.locator(f'td[title="{record.case_id}"]'))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def named() -> dict[str, Record]:
    return fakes.named()


Open = Callable[..., Opened]


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens the report of some records at a width."""
    tabs = []

    def opened(records: Sequence[Record], width: int = 1280, scheme: str = "light", anchor: str = "") -> Opened:
        out = tmp_path / "index.html"
        report.render([report.ReportRun("quickstart", fakes.BEGAN, tuple(records), str(tmp_path))], out)
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        tabs.append(page)
        found = Opened(page)
        page.on("console", lambda message: found.complaints.append(message.text))
        page.on("pageerror", lambda error: found.complaints.append(f"error: {error}"))
        page.on("request", lambda request: found.requests.append(request.url))
        page.on("dialog", lambda dialog: (found.dialogs.append(dialog.message), dialog.dismiss()))
        page.goto(out.as_uri() + anchor)
        return found

    yield opened
    for page in tabs:
        page.close()


def shown_rows(opened: Opened) -> int:
    return int(opened.page.locator("#tables tr.row:visible").count())


def is_drawn(plot: Any) -> bool:
    return int(plot.locator("svg.main-svg").count()) > 0


def copies(record: Record, amount: int) -> list[Record]:
    """The same training record under different seeds and ids."""
    assert isinstance(record.case, TrainCase)
    cases = [record.case.model_copy(update={"seed": seed}) for seed in range(amount)]
    return [record.model_copy(update={"case": case, "case_id": case_id(case)}) for case in cases]


@pytest.mark.parametrize("width", [1280, 400])
def test_it_fits_its_width_asks_for_nothing_and_complains_of_nothing(
    width: int, show: Open, named: dict[str, Record]
) -> None:
    opened = show(list(named.values()), width)
    for record in (named["fsdp"], named["failed_oom"], named["chain_merged"]):
        opened.row(record).locator(".opener").click()
    for plot in opened.page.locator(".plot").all():
        plot.scroll_into_view_if_needed()
        plot.locator("svg.main-svg").first.wait_for()
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    assert [url for url in opened.requests if not url.startswith("file:")] == []
    # plotly.js brings a style sheet for maps, which the policy refuses; the report draws none
    assert [text for text in opened.complaints if "maplibre" not in text and "inline style" not in text] == []
    assert len(opened.complaints) <= 1


def test_every_case_has_a_row_that_says_how_it_ended(show: Open, named: dict[str, Record]) -> None:
    opened = show(list(named.values()))
    assert shown_rows(opened) == len(named)
    assert "3,821" in opened.row(named["lora"]).inner_text()
    assert "GPU memory ran out" in opened.row(named["failed_oom"]).inner_text()
    dash = opened.row(named["failed_oom"]).locator("td.empty").first
    assert (dash.inner_text(), dash.get_attribute("title")) == ("–", "not measured: the case failed")  # noqa: RUF001


def test_filters_by_text_status_and_kind(show: Open, named: dict[str, Record]) -> None:
    opened = show(list(named.values()))
    opened.page.fill("#q", "FSDP tiny")
    assert opened.page.locator("#shown").inner_text() == "3 of 19 cases"
    opened.page.select_option("#status", "measured")
    assert shown_rows(opened) == 1
    opened.page.fill("#q", "")
    opened.page.select_option("#kind", "serve")
    assert shown_rows(opened) == 3
    opened.page.fill("#q", "no such case")
    assert shown_rows(opened) == 0


def test_sorts_by_number_with_what_is_missing_last(show: Open, named: dict[str, Record]) -> None:
    opened = show([named[name] for name in ("failed_nan", "lora", "ddp", "fsdp", "skipped")])
    head = opened.page.get_by_role("button", name="Tokens/s", exact=True)

    def column() -> list[str]:
        return [str(text) for text in opened.page.locator('tr.row td[data-label="Tokens/s"]').all_inner_texts()]

    head.click()
    assert column() == ["7,603", "5,504", "3,821", "–", "–"]  # noqa: RUF001
    head.click()
    assert column() == ["3,821", "5,504", "7,603", "–", "–"]  # noqa: RUF001
    assert opened.page.locator("th[aria-sort]").get_attribute("aria-sort") == "ascending"


def test_a_keyboard_opens_a_case_and_its_figures_are_drawn_only_then(show: Open, named: dict[str, Record]) -> None:
    opened = show([named["fsdp"], named["lora"]])
    opener = opened.row(named["fsdp"]).locator(".opener")
    opener.focus()
    opened.page.keyboard.press("Enter")
    assert opener.get_attribute("aria-expanded") == "true"
    inside = opened.page.locator(".inside")
    inside.locator(".plot svg.main-svg").first.wait_for()
    assert inside.locator(".plot").count() == 1
    memory = inside.locator("details", has=opened.page.locator("summary", has_text="Memory by phase and rank"))
    memory.locator("summary").focus()
    opened.page.keyboard.press("Enter")
    memory.locator(".plot svg.main-svg").first.wait_for()
    opener.focus()
    opened.page.keyboard.press("Space")
    assert inside.count() == 0


def test_a_failed_case_shows_diagnosis_evidence_and_log(show: Open, named: dict[str, Record]) -> None:
    opened = show(list(named.values()))
    opened.page.locator("#failed a", has_text="nano-9b-v2").click()
    inside = opened.page.locator(".inside")
    inside.wait_for()
    text = inside.inner_text()
    for words in (
        "oom_gpu_backward",
        "stderr.log:5",
        "Halve micro_batch",
        "End of the log",
        "Tried to allocate 4.00 GiB",
    ):
        assert words in text
    record = named["failed_oom"]
    assert inside.get_by_role("link", name="record", exact=True).get_attribute("href") == (
        f"cases/{record.case_id}/record.json"
    )


def test_a_long_log_shows_its_end_first(show: Open, named: dict[str, Record]) -> None:
    log = "\n".join(f"line {number}" for number in range(400))
    opened = show([with_last(named["failed_oom"], log_tail=log)], anchor="#case-0")
    text = opened.page.locator(".inside pre")
    text.wait_for()
    opened.page.wait_for_function(
        "(() => { const p = document.querySelector('.inside pre'); return p.scrollTop > 0 })()"
    )
    assert text.evaluate("node => node.scrollHeight - node.scrollTop - node.clientHeight") < 2


@pytest.mark.parametrize("width", [1280, 400])
def test_a_failed_case_shows_its_timeline_its_ladder_and_what_fitted(show: Open, width: int) -> None:
    records = [*climbed.climbed(), *climbed.searched()]
    opened = show(records, width)
    page = opened.page
    assert "After 2 reruns it fitted with seq_len 512 → 256" in page.locator("#failed").inner_text()
    assert "seq_len 128 fits, 192 is the first that does not" in page.locator("#searches").inner_text()
    page.locator("#failed a").first.click()
    inside = page.locator(".inside")
    inside.wait_for()
    text = inside.inner_text()
    for words in ("INITIATING: OutOfMemoryError", "events.rank1.jsonl:7", "1. O1 seq_len", "2. O2+O3 micro_batch"):
        assert words in text
    links = [link.get_attribute("href") for link in inside.locator("a", has_text="train-tiny-hybrid").all()]
    assert {f"cases/{record.case_id}/record.json" for record in records[:3]} <= set(links)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert [text for text in opened.complaints if "inline style" not in text] == []


def test_nothing_of_a_log_runs_or_becomes_an_element(show: Open, named: dict[str, Record]) -> None:
    record = hostile(named["failed_oom"], NASTY)
    opened = show([record, hostile(named["fsdp"], NASTY)], anchor="#case-0")
    opened.page.locator(".inside").wait_for()
    for summary in opened.page.locator(".inside summary").all():
        if summary.locator("..").get_attribute("open") is None:
            summary.click()
    opened.page.wait_for_timeout(300)
    assert opened.dialogs == []
    assert opened.page.evaluate("window.broken") is None
    assert opened.page.locator("img").count() == 0
    assert opened.page.locator("script:not([type])").count() == 2
    assert "<img src=x onerror=alert(2)>" in opened.page.locator(".inside").inner_text()
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_a_long_table_is_paged_and_a_link_finds_its_page(show: Open, named: dict[str, Record]) -> None:
    opened = show(copies(named["lora"], 120), anchor="#case-110")
    assert opened.page.locator(".pager").first.inner_text().split("\n")[1:2] == ["page 3 of 3"] or (
        "page 3 of 3" in opened.page.locator(".pager").first.inner_text()
    )
    assert opened.page.locator("#case-110 .opener").get_attribute("aria-expanded") == "true"
    opened.page.get_by_role("button", name="Previous").click()
    assert shown_rows(opened) == 50


def test_a_figure_can_be_read_as_a_table(show: Open, named: dict[str, Record]) -> None:
    opened = show([named[name] for name in ("gpu", "failed_oom", "serve_1", "serve_4")])
    for name, numbers in (("Peak GPU memory over", ["28.568", "141"]), ("latency against throughput", ["1", "4"])):
        figure = opened.page.locator("figure", has_text=name)
        figure.locator(".numbers summary").click()
        text = figure.locator(".numbers table").inner_text()
        assert all(number in text for number in numbers), text
    assert "TTFT, ms, median" in text
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= 1280


@pytest.mark.parametrize("width", [1280, 400])
def test_what_fits_which_card_leads_to_the_case(show: Open, named: dict[str, Record], width: int) -> None:
    opened = show([named["gpu"], named["failed_oom"]], width)
    opened.page.locator("#cards a", has_text="8,192 does not").click()
    assert "GPU memory ran out" in opened.page.locator("#case-1 + tr .inside").inner_text()
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width


def test_it_follows_the_colour_scheme(show: Open, named: dict[str, Record]) -> None:
    def background(scheme: str) -> str:
        page = show([named["lora"]], scheme=scheme).page
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    assert background("light") == "rgb(255, 255, 255)"
    assert background("dark") == "rgb(20, 23, 27)"


def test_two_runs_side_by_side(browser: Any, tmp_path: Path, named: dict[str, Record]) -> None:
    runs = [report.ReportRun(name, fakes.BEGAN, records, str(tmp_path)) for name, records in
            (("monday", (named["lora"], named["ddp"])), ("tuesday", (named["lora"],)))]  # fmt: skip
    report.render(runs, tmp_path / "both.html")
    page = browser.new_page(viewport={"width": 400, "height": 900})
    page.goto((tmp_path / "both.html").as_uri())
    text = page.locator("#compared").inner_text()
    assert "tuesday against monday" in text
    assert "× 1.000" in text  # noqa: RUF001
    assert "Only in monday: 1" in text
    page.close()
