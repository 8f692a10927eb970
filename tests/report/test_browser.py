"""The report in a real browser: it loads nothing, runs nothing, fits the window, and can be read.

Needs Chromium (`chromium` on the PATH, or its path in CHROMIUM). Without it the tests are skipped, unless
MEDBRIDGE_REQUIRE_BROWSER=1, which makes that a failure.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages import CONTRAST, overflow
from PIL import Image

from medbridge.report import write_report

pytestmark = pytest.mark.browser


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_of_a_finished_run(
    show: Callable[..., Any], finished_run: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    page = show(write_report(finished_run, tmp_path / "report.html"), width, scheme)
    assert overflow(page) <= 0
    table = page.locator("table.verdicts")
    assert table.is_visible() and table.locator(".badge").count() == 8
    charts = page.locator("svg.chart:visible")
    assert charts.count() > 40
    boxes = charts.evaluate_all("all => all.map(e => e.getBoundingClientRect()).map(r => [r.width, r.height])")
    assert all(wide > 40 and high > 4 for wide, high in boxes)
    pictures = page.locator("article.sample img").evaluate_all("all => all.map(e => e.complete && e.naturalWidth)")
    assert len(pictures) == 16 and all(size == 56 for size in pictures)
    assert page.evaluate(CONTRAST) == []
    with Image.open(io.BytesIO(page.screenshot())) as shot:
        colours = shot.convert("RGB").getcolors(maxcolors=1 << 24)
    assert len(colours) > 60
    assert (max(colours)[1][0] > 128) == (scheme == "light")


def test_every_fold_opens_without_overflow(show: Callable[..., Any], finished_run: Path, tmp_path: Path) -> None:
    page = show(write_report(finished_run, tmp_path / "report.html"), 390)
    folds = page.locator("details")
    assert folds.count() >= 5
    for index in range(folds.count()):
        folds.nth(index).locator("summary").click()
    assert overflow(page) <= 0
    assert page.locator("text=format_steps: 40").is_visible()
    assert page.evaluate(CONTRAST) == []


@pytest.mark.parametrize("width", [390, 1280])
def test_hostile_texts_run_nothing_and_break_nothing(
    show: Callable[..., Any], hostile_report: Path, width: int
) -> None:
    page = show(hostile_report, width)
    page.evaluate("for (const fold of document.querySelectorAll('details')) fold.open = true")
    assert page.evaluate("window.pwned") is None
    assert page.locator("script").count() == 0
    assert overflow(page) <= 0
    assert "<script>window.pwned" in page.locator("h1").inner_text()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("region", ["Checks", "Changes", "Outlook"])
def test_wide_tables_scroll_in_their_frame_and_name_their_cells(
    show: Callable[..., Any], finished_run: Path, tmp_path: Path, width: int, region: str
) -> None:
    page = show(write_report(finished_run, tmp_path / "report.html"), width)
    frame = page.locator(f"[role=region][aria-label={region}]")
    assert frame.count() == 1 and frame.get_attribute("tabindex") == "0"
    box = frame.bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= width
    table = frame.locator("table")
    assert table.locator("caption").inner_text().strip()
    assert table.locator("thead th:not([scope=col])").count() == 0
    assert table.locator("tbody th:not([scope=row]):not([scope=rowgroup])").count() == 0
    # Every row has as many cells as there are columns, those that span several counted so; and fits no other's place.
    columns = table.locator("thead th").count()
    grid = table.evaluate("""table => [...table.tBodies].map(body => {
      const rows = [...body.rows].map(() => 0);
      [...body.rows].forEach((row, at) => [...row.cells].forEach(cell => {
        for (let i = 0; i < cell.rowSpan; i++) rows[at + i] += cell.colSpan;
      }));
      return rows;
    })""")
    assert {count for body in grid for count in body} == {columns} and grid
    # The stratum stays in sight when a phone's frame is scrolled to its end.
    frame.evaluate("frame => { frame.scrollLeft = frame.scrollWidth }")
    name = table.locator(".sticky", has_text="plane").first.bounding_box()
    assert box["x"] - 1 <= name["x"] and name["x"] + name["width"] <= width
    assert overflow(page) <= 0


def test_an_empty_run_has_a_page(show: Callable[..., Any], fabricate: Callable[..., Any]) -> None:
    page = show(write_report(fabricate().folder), 390)
    assert page.locator("text=Not begun").is_visible()
    assert overflow(page) <= 0


def test_sixty_strata_fit_a_phone(show: Callable[..., Any], fabricate: Callable[..., Any]) -> None:
    run = fabricate(samples=3)
    run.describe()
    names = [f"modality-{index // 10} / a-rather-long-name-of-an-organ-{index}" for index in range(60)]
    for name in names:
        run.draw(name, "validation", 2, ("a", "b"), "Which one?", pictures=1)
    run.measure("diagnose", dict.fromkeys(names, (0.4, 4.0, 0.1)))
    page = show(write_report(run.folder), 390)
    assert overflow(page) <= 0
    assert page.locator("svg.curve").count() == 60
    checks = page.locator("details", has=page.locator("[aria-label=Checks]"))
    assert not checks.locator("table").is_visible()
    checks.locator("summary").click()
    assert checks.locator("table").is_visible() and checks.locator("tbody").count() == 60
    assert overflow(page) <= 0
