"""How long `harness report` takes and how large its page is; by hand: .venv/bin/python tests/bench_report.py [RECORDS]

Writes a run directory of made-up records, runs the verb in a process of its own, and prints its wall and CPU time, the
size of the page and, where a Chromium is installed, how long that page takes to show its table.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fakes import records as fakes  # noqa: E402

from harness import store  # noqa: E402

RECORDS = 2_000
BUDGET_S = 10.0


def write_run(folder: Path, amount: int) -> int:
    """A run directory of `amount` records; returns the bytes of their files."""
    run = store.Run(folder)
    info = store.RunInfo(name=folder.name, created_at=fakes.BEGAN, harness_version="0", matrix_source="made up",
                         matrix_sha256="0" * 64, backend="local", box="venv")  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(info.model_dump_json())
    total = 0
    for record in fakes.records(amount, seed=1):
        path = run.record_path(record.case_id)
        path.parent.mkdir(parents=True)
        total += path.write_text(record.model_dump_json(indent=1))
    return total


def measure(folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds of `harness report FOLDER`."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-P", "-m", "harness", "report", str(folder)], cwd=ROOT, check=True,
                   stdout=subprocess.DEVNULL)  # fmt: skip
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def in_a_browser(page_file: Path) -> tuple[float, float, float] | None:
    """Seconds until the table shows, until a filter is applied, and until a case is open; `None` without Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        return None
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        marks = [time.perf_counter()]
        page.goto(page_file.as_uri())
        page.locator("tr.row").first.wait_for()
        marks.append(time.perf_counter())
        page.select_option("#status", "failed")
        marks.append(time.perf_counter())
        page.locator(".opener").first.click()
        page.locator(".inside").wait_for()
        marks.append(time.perf_counter())
        browser.close()
    shown, filtered, opened = (marks[i + 1] - marks[i] for i in range(3))
    return shown, filtered, opened


def main() -> int:
    """Print the figures; 1 where the verb is over its budget."""
    amount = int(sys.argv[1]) if len(sys.argv) > 1 else RECORDS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "made-up"
        written = write_run(folder, amount)
        walls, cpus = zip(*(measure(folder) for _ in range(3)), strict=True)
        page = folder / "index.html"
        size = page.stat().st_size
        print(
            f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; {amount:,} records, {written / 1e6:.1f} MB of JSON"
        )
        print(f"harness report: wall {min(walls):.2f} to {max(walls):.2f} s, CPU {min(cpus):.2f} to {max(cpus):.2f} s, "
              f"n = 3; budget {BUDGET_S:.0f} s at {RECORDS:,} records")  # fmt: skip
        print(f"page: {size / 1e6:.1f} MB, of which plotly.js 4.8 MB; {(size - 4.82e6) / amount / 1e3:.1f} kB a record")
        if seen := in_a_browser(page):
            print(
                f"Chromium: table after {seen[0]:.2f} s, filter {seen[1]:.2f} s, a case opens in {seen[2]:.2f} s, n = 1"
            )
    return int(amount <= RECORDS and min(walls) > BUDGET_S)


if __name__ == "__main__":
    sys.exit(main())
