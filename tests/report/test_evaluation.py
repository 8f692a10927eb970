"""The page of an evaluation, in Chromium."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pages import CONTRAST, overflow

from medbridge.evaluation import evaluate_logs, read_logs
from medbridge.report.evaluation import render, write_evaluation

HOSTILE = "</bdi><script>window.pwned = 1</script> \u202eleft {{ 7 * 7 }}"


@pytest.fixture
def page_of(show: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """The page of logged completions: grades in order, open questions, and rows that are left out."""
    rows: list[Any] = []
    for n in range(24):
        texts = [f"<answer>{letter}</answer>" for letter in ("ABCD"[n % 4], "ABCD"[(n + 1) % 4], "ABCD"[n % 4], "?")]
        rows.append(
            {"id": f"g{n}", "question": "How severe?", "options": ["none", HOSTILE, "moderate", "severe"],
             "answer": "ABCD"[n % 4], "completions": texts, "greedy": texts[0], "dataset_name": "grades"}
        )  # fmt: skip
        rows.append(
            {"id": f"o{n}", "question": "How large?", "answer": "1.5 cm", "dataset_name": f"open {HOSTILE}",
             "completions": ["<answer>15 mm</answer>", "<answer>15 cm</answer>"], "greedy": "<answer>3</answer>"}
        )  # fmt: skip
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(row) + "\n" for row in rows) + f"{HOSTILE}\n")
    found = evaluate_logs(list(read_logs([log])), ordered=["grades"], source=f"log {HOSTILE}")
    path = write_evaluation(found, tmp_path / "pages" / "evaluation.html")

    def open_it(*window: Any) -> Any:
        page = show(path, *window)
        page.evaluate("for (const fold of document.querySelectorAll('details')) fold.open = true")
        return page

    return open_it


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(page_of: Callable[..., Any], width: int, scheme: str) -> None:
    page = page_of(width, scheme)
    assert overflow(page) <= 0
    assert page.evaluate(CONTRAST) == []


@pytest.mark.browser
def test_what_it_says(page_of: Callable[..., Any]) -> None:
    page = page_of()
    assert page.evaluate("window.pwned") is None and page.locator("script").count() == 0
    assert page.locator("h1").inner_text().startswith("log </bdi><script>")
    cells = page.locator("table.figures tbody tr").first.locator("td").all_inner_texts()
    assert cells[0] == "24 \u00d7 4" and cells[1].startswith("1.00") and cells[2].startswith("0.50")
    assert cells[8] == "25 %" and cells[9] == "\u2013"  # none read of the fourth; logs don't say what was cut off
    matrix = page.locator(".confusion table tbody tr").first.locator("td").all_inner_texts()
    assert [int(cell) for cell in matrix] == [12, 6, 0, 0, 6]
    said = page.locator(".said").inner_text()
    assert "grades off on average" in said and "50 % of the 48 that were to give a quantity give it" in said
    assert page.locator("#curves svg").count() == 2
    assert "1 row of the logs" in page.locator("#skipped").inner_text()


def test_the_text_is_whole_without_a_browser(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(
        json.dumps({"question": "Where?", "answer": "lung", "completions": ["<answer>lung</answer>"]}) + "\n"
    )
    text = render(evaluate_logs(list(read_logs([log]))))
    assert text.count("<section") == 3 and "Scored otherwise" not in text and "Confusion" not in text
