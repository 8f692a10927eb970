"""The page of a data set's questions: what it holds, and how it behaves in a real browser."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import CONTRAST, overflow
from PIL import Image

from medbridge.data import Item, PromptSettings
from medbridge.errors import MedbridgeError
from medbridge.report import questions
from medbridge.report.questions import write_questions

HOSTILE = "</bdi><script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'>\u202e\x00"


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Item]:
    def item(index: int, split: str = "train", **changes: Any) -> Item:
        path = tmp_path / f"{index}.png"
        Image.fromarray(np.random.default_rng(index).integers(0, 256, (60, 80), np.uint8)).save(path)
        values: dict[str, Any] = {
            "id": f"demo/{split}/{index}", "dataset": "demo", "split": split, "question": f"What is shown in {index}?",
            "answer": "Mass", "options": ("Edema", "Mass", "Nodule"), "images": (str(path),),
            "tags": {"modality": "CT" if index % 2 else "MRI"}, "floor": 1 / 3,
        }  # fmt: skip
        return Item(**{**values, **changes})

    return item


@pytest.fixture
def page_of(tmp_path: Path) -> Callable[..., Path]:
    def write(items: list[Item], **options: Any) -> Path:
        settings = PromptSettings(answer_style="text")
        values = {"total": len(items), "strata": ["modality"], "settings": settings, **options}
        return write_questions(items, tmp_path / "pages" / "questions.html", **values)

    return write


def test_pictures_stay_in_their_budget_and_broken_ones_are_notes(
    make: Callable[..., Item], page_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "IMAGE_BYTES", 25_000)
    (tmp_path / "bad.png").write_bytes(b"no image")
    items = [make(0, images=(str(tmp_path / "bad.png"), "/nowhere.png")), *(make(index) for index in range(1, 9))]
    text = page_of(items, total=1234).read_text()
    uris = re.findall(r'src="(data:image/[^"]+)"', text)
    assert 2 <= len(uris) < 8 and sum(map(len, uris)) <= 25_000
    assert text.count("Left out to keep this file small") == 8 - len(uris)
    assert "can&#39;t be read" in text and "The image file is missing" in text
    assert "9 of 1,234 questions" in text
    assert re.findall(r"(?:src|href)=\"(?!data:|#)", text) == [] and str(tmp_path) not in text


def test_many_images_and_none(make: Callable[..., Item], page_of: Callable[..., Path]) -> None:
    six = make(0).images * 6
    text = page_of([make(1, images=six), make(2, images=(), options=None, answer="3 cm", floor=0.0)]).read_text()
    assert text.count("<img ") == 4 and "and 2 more images" in text
    assert "A question without an image" in text and "Right answer: <bdi>3 cm</bdi>" in text
    assert "There are no questions here" in page_of([]).read_text()


def test_what_can_not_be_written_is_said(make: Callable[..., Item], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    options: dict[str, Any] = {"total": 1, "settings": PromptSettings()}
    with pytest.raises(MedbridgeError, match="can't be written"):
        write_questions([make(0)], tmp_path / "file" / "page.html", **options)
    (tmp_path / "folder").mkdir()
    with pytest.raises(MedbridgeError, match="can't be written"):
        write_questions([make(0)], tmp_path / "folder", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "file", "folder"]
    with pytest.raises(MedbridgeError, match="has no tag 'organ'"):
        write_questions([make(0)], tmp_path / "page.html", strata=["organ"], **options)


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_filters_by_mouse_and_keyboard(
    show: Callable[..., Any], make: Callable[..., Item], page_of: Callable[..., Path], width: int, scheme: str
) -> None:
    items = [make(index, "test" if index > 5 else "train") for index in range(9)]
    page = show(page_of(items), width, scheme)
    cards = page.locator("article.item:visible")
    count = page.locator("#count")
    assert cards.count() == 9 and count.inner_text() == "9 of 9 questions shown"
    sizes = page.locator("article.item img").evaluate_all("all => all.map(e => e.complete && e.naturalWidth)")
    assert sizes == [80] * 9
    assert cards.first.locator(".right-answer").inner_text() == "Mass right answer"

    page.select_option("select[name=split]", "test")
    assert [card.get_attribute("data-split") for card in cards.all()] == ["test"] * 3
    page.select_option("select[name=stratum]", label="CT (4)")
    assert count.inner_text() == "1 of 9 questions shown"
    page.click("button[type=reset]")
    page.locator("#count", has_text="9 of 9").wait_for()

    page.keyboard.press("/")
    page.keyboard.type("SHOWN 7")
    assert count.inner_text() == "1 of 9 questions shown" and cards.first.locator("h2").inner_text() == "demo/test/7"
    page.keyboard.type(" nothing like it")
    assert count.inner_text() == "0 of 9 questions shown"
    page.keyboard.press("Escape")
    assert count.inner_text() == "9 of 9 questions shown"

    page.evaluate("document.activeElement.blur()")
    for key, focused in (("j", 0), ("j", 1), ("j", 2), ("k", 1)):
        page.keyboard.press(key)
        assert page.evaluate("document.activeElement.querySelector('h2').textContent") == f"demo/train/{focused}"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # the fold of the second question
    target = page.locator("article.item").nth(1).locator("details p.text").last
    assert target.is_visible() and target.inner_text() == "<answer>Mass</answer>"

    assert overflow(page) <= 0
    assert page.evaluate(CONTRAST) == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", ground)[0]) > 128) == (scheme == "light")


@pytest.mark.browser
def test_hostile_texts_run_nothing(
    show: Callable[..., Any], make: Callable[..., Item], page_of: Callable[..., Path]
) -> None:
    hostile = make(
        0, id=f"d/{HOSTILE}", dataset=HOSTILE, question=HOSTILE, options=(HOSTILE, "b\">'"), answer=HOSTILE,
        tags={"modality": HOSTILE, HOSTILE: "x"}, trace=HOSTILE, images=(f"/nowhere/{HOSTILE[:30]}.png",),
    )  # fmt: skip
    page = show(page_of([hostile, make(1)]), 390)
    assert page.evaluate("window.pwned") is None
    assert page.locator("script").count() == 1 and page.locator("img").count() == 1
    assert "<script>window.pwned = 1</script>" in page.locator(".asked").first.inner_text()
    page.locator("details").first.locator("summary").click()
    assert overflow(page) <= 0
    page.select_option("select[name=stratum]", index=1)
    assert page.locator("#count").inner_text() == "1 of 2 questions shown"


@pytest.mark.browser
def test_no_script_but_its_own_runs(browser: Any, make: Callable[..., Item], page_of: Callable[..., Path]) -> None:
    """Should a text ever slip through unescaped, the page's own policy still stops it."""
    path = page_of([make(0)])
    path.write_text(path.read_text().replace("</main>", "<script>window.pwned = 1</script></main>"))
    context = browser.new_context()
    try:
        page = context.new_page()
        page.goto(path.as_uri())
        assert page.evaluate("window.pwned") is None
        assert page.locator("#count").inner_text() == "1 of 1 questions shown"
    finally:
        context.close()
