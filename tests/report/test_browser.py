"""The report in a real browser: it loads nothing, runs nothing, fits the window, and can be read.

Needs Chromium (`chromium` on the PATH, or its path in CHROMIUM). Without it the tests are skipped, unless
MEDBRIDGE_REQUIRE_BROWSER=1, which makes that a failure.
"""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from medbridge.report import write_report

pytestmark = pytest.mark.browser

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]

# Contrast of every visible text with what lies behind it, by WCAG 2; returns the texts below 4.5.
CONTRAST = """() => {
  const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const linear = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const colour = parse(getComputedStyle(node).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return parse(getComputedStyle(document.body).backgroundColor);
  };
  const poor = [];
  for (const node of document.querySelectorAll('body *')) {
    const text = [...node.childNodes].filter(n => n.nodeType === 3).map(n => n.data).join('').trim();
    if (!text || !node.checkVisibility() || ['title', 'desc'].includes(node.tagName)) continue;
    const style = getComputedStyle(node);
    const ink = parse(node.namespaceURI.endsWith('svg') ? style.fill : style.color);
    const [a, b] = [light(ink), light(behind(node))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) poor.push([node.tagName, node.className, text.slice(0, 40)]);
  }
  return poor;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = os.environ.get("CHROMIUM") or shutil.which("chromium")
    missing = None if program else "no Chromium: install it, or name its program in CHROMIUM"
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing = "the Python package playwright is not installed"
    if missing:
        if os.environ.get("MEDBRIDGE_REQUIRE_BROWSER") == "1":
            pytest.fail(missing)
        pytest.skip(missing)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a file in a window of a given width; fails at the end if the page said or requested anything."""
    contexts, said, requested = [], [], []

    def open_page(path: Path, width: int = 1280, scheme: str = "light") -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: requested.append(request.url))
        page.goto(path.as_uri(), wait_until="load")
        loads = [url for url in requested if not url.startswith("data:")]
        assert loads == [path.as_uri()]
        requested.clear()
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert [url for url in requested if not url.startswith("data:")] == []


def overflow(page: Any) -> int:
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


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
