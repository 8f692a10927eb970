"""The study's page in Chromium: it can be clicked through, saved from, and holds 10,000 questions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages import CONTRAST, overflow
from PIL import Image

from medbridge.report.view import Estimate
from medbridge.study.findings import find
from medbridge.study.page import Question, render
from medbridge.study.result import Cell, ChangeCell, ModelRow, Sight, StudyResult

NAMES = ("base", "after SFT", "after RL")
STRATA = ("CT / CLOSED", "<b>X-Ray</b> & more")


def cell(model: str, stratum: str, verdict: str) -> Cell:
    sight = Sight(40, 50, 2, 0.8, 0.6, Estimate(0.5, 0.3, 0.7))
    support = Estimate(0.4, 0.3, 0.5)
    return Cell(
        model, stratum, verdict, "because", 50, 8, 4, support, Estimate(0.3, 0.2, 0.4), (1, 2, 4, 8),
        (0.3, 0.4, 0.5, 0.6), (0.25, 0.4, 0.5, 0.55), Estimate(0.1, -0.1, 0.3), sight, (9, *[2] * 9, 23),
        find(verdict, sight, None, threshold=0.2, reason="the gate's reason", support="0.4", accuracy="0.3"),
    )  # fmt: skip


def study() -> StudyResult:
    verdicts = ("bridge", "sharpen", "done")
    models = (ModelRow("base", "a"), ModelRow("after SFT", "b", "base", STRATA), ModelRow("after RL", "c", "after SFT"))
    changes = [
        ChangeCell(name, "base", stratum, True, 50, Estimate(change, change - 0.1, change + 0.1), None, 4, 1)
        for name, change in (("after SFT", 0.3), ("after RL", -0.2))
        for stratum in STRATA
    ]
    cells = [cell(n, s, v) for n, v in zip(NAMES, verdicts, strict=True) for s in STRATA]
    return StudyResult(
        "A study </script><script>alert(1)</script>", 0.9, 0.5, 0.2, "test", models, STRATA, tuple(cells),
        tuple(changes), {name: cells[0].sight for name in STRATA}, "efficientnet-lite0",
    )  # fmt: skip


def questions(count: int, image: str | None = None) -> list[Question]:
    return [
        Question(
            f"d/test/{n}", STRATA[n % 2], f"Is number {n} </script> here?", "Yes", ("Yes", "No"), image,
            {"base": (n % 9, 8, n % 2 == 0), "after SFT": (8, 8, True)},
        )
        for n in range(count)
    ]  # fmt: skip


@pytest.fixture
def open_study(show: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    def open_it(count: int, *window: Any) -> Any:
        picture = tmp_path / "picture.png"
        Image.new("L", (40, 30), 128).save(picture)
        page = tmp_path / "study.html"
        page.write_text(render(study(), questions(count, str(picture))), encoding="utf-8")
        return show(page, *window)

    return open_it


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(open_study: Callable[..., Any], width: int, scheme: str) -> None:
    page = open_study(12, width, scheme)
    assert overflow(page) <= 0
    assert page.evaluate(CONTRAST) == []
    assert page.inner_text("h1") == "A study </script><script>alert(1)</script>"


@pytest.mark.browser
def test_the_map_leads_to_its_cells_by_keyboard(open_study: Callable[..., Any]) -> None:
    page = open_study(3)
    assert page.locator("svg.map a.cell").count() == 6
    first = page.locator("svg.map a.cell").first
    assert first.get_attribute("aria-label").startswith("base, CT / CLOSED: support-limited.")
    first.focus()
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#cell-0-0"
    assert "base on CT / CLOSED" in page.inner_text("#cell-0-0 h3")


@pytest.mark.browser
@pytest.mark.parametrize("kind", ["SVG", "PNG"])
def test_drawings_are_saved(open_study: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    page = open_study(3)
    with page.expect_download() as waited:
        page.click(f'[aria-label="Save bottleneck-map as {kind}"]')
    saved = tmp_path / waited.value.suggested_filename
    waited.value.save_as(saved)
    assert saved.name == f"bottleneck-map.{kind.lower()}"
    if kind == "PNG":
        with Image.open(saved) as image:
            assert image.width > 600 and len(image.convert("RGB").getcolors(1 << 20) or []) > 20
    else:
        assert "support-limited" in saved.read_text(encoding="utf-8")


@pytest.mark.browser
def test_ten_thousand_questions(open_study: Callable[..., Any]) -> None:
    """Only those in view are in the page, whatever is filtered and wherever it is scrolled to."""
    page = open_study(10_000)
    entries = page.locator(".entry")
    assert page.inner_text("#count") == "10,000 of 10,000 questions"
    assert 5 < entries.count() < 40
    page.evaluate("document.getElementById('viewport').scrollTop = 77 * 5000")
    page.wait_for_function("document.querySelector('.entry .what').textContent.includes('number 4996 ')")
    assert entries.count() < 40
    page.fill("#filter-text", "number 9999 ")
    assert page.inner_text("#count") == "1 of 10,000 questions"
    assert "Is number 9999 </script> here?" in entries.first.inner_text()
    page.fill("#filter-text", "")
    page.select_option("#filter-stratum", STRATA[1])
    assert page.inner_text("#count") == "5,000 of 10,000 questions"
    page.select_option("#filter-stratum", "")
    page.select_option("#filter-fate", "never")
    assert page.inner_text("#count") == "1,112 of 10,000 questions"
    page.select_option("#filter-model", "after SFT")
    assert page.inner_text("#count") == "0 of 10,000 questions"
    assert entries.count() == 0


def test_what_the_script_reads_is_json_whatever_the_texts() -> None:
    text = render(study(), questions(2))
    content = text.split('<script type="application/json" id="items">')[1].split("</script>")[0]
    assert json.loads(content)["items"][1]["question"] == "Is number 1 </script> here?"


def test_an_empty_study() -> None:
    empty = StudyResult("empty", 0.9, 0.5, 0.2, "test", (), (), (), ())
    assert "empty" in render(empty, [])
