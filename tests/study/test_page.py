"""The study's page in Chromium: it can be clicked through, saved from, and holds 10,000 questions with answers."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from pages import CONTRAST, overflow
from PIL import Image

from medbridge.report import images as report_images
from medbridge.report.view import Estimate
from medbridge.study import page as study_page
from medbridge.study.answers import STATUSES, Answers, choose_answers
from medbridge.study.findings import find
from medbridge.study.page import Question, render
from medbridge.study.result import Cell, ChangeCell, ModelRow, Sight, StudyResult

NAMES = ("base", "after SFT", "after RL")
STRATA = ("CT / CLOSED", "<b>X-Ray</b> & more")


def cell(model: str, stratum: str, verdict: str) -> Cell:
    sight = Sight(40, 50, 2, 0.8, 0.6, Estimate(0.5, 0.3, 0.7))
    support = Estimate(0.4, 0.3, 0.5)
    return Cell(
        model, stratum, verdict, "because", 50, 6, 8, 4, support, Estimate(0.3, 0.2, 0.4), (1, 2, 4, 8),
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


def questions(count: int, images: tuple[str, ...] = (), answers: Mapping[str, Answers] | None = None) -> list[Question]:
    return [
        Question(
            f"d/test/{n}", STRATA[n % 2], f"Is number {n} </script> here?", "Yes", ("Yes", "No"), images,
            {"base": (n % 9, 8, STATUSES[n % 3]), "after SFT": (n % 17, 16, STATUSES[n % 2])},
            (answers or {}).get(f"d/test/{n}"),
        )
        for n in range(count)
    ]  # fmt: skip


def data_of(page: str) -> Any:
    """What the script of a page reads."""
    return json.loads(page.split('<script type="application/json" id="items">')[1].split("</script>")[0])


@pytest.fixture
def open_study(show: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    def open_it(count: int, *window: Any, answers: Mapping[str, Answers] | None = None) -> Any:
        picture = tmp_path / "picture.png"
        Image.new("L", (40, 30), 128).save(picture)
        page = tmp_path / "study.html"
        page.write_text(render(study(), questions(count, (str(picture),), answers)), encoding="utf-8")
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
@pytest.mark.parametrize("name", ["slopes-1", "pass-at-k-1"])
def test_a_saved_drawing_stands_alone(open_study: Callable[..., Any], tmp_path: Path, name: str) -> None:
    """With its caption and its legend, which lie beside it in the page; and every part within its frame."""
    page = open_study(3)
    with page.expect_download() as waited:
        page.click(f'[aria-label="Save {name} as SVG"]')
    waited.value.save_as(tmp_path / "saved.svg")
    wanted = {"slopes-1": ["CT / CLOSED", "Acc@1", "support above the floor"], "pass-at-k-1": [*NAMES, "guessing"]}[
        name
    ]
    alone = page.context.new_page()
    alone.goto((tmp_path / "saved.svg").as_uri())
    shown = alone.locator("text").all_text_contents()
    assert set(wanted) <= set(shown)
    assert alone.evaluate(
        """() => {
          const frame = document.documentElement.getBoundingClientRect();
          return [...document.querySelectorAll("text")].every(text => {
            const box = text.getBoundingClientRect();
            return box.top >= frame.top && box.bottom <= frame.bottom && box.right <= frame.right + 1;
          });
        }"""
    )


ANSWERS = {
    "d/test/1": Answers(
        [
            [
                [-1, 1, 1, 0, "I think <answer>", ["No"], "</answer>"],
                [4, 0, 0, 0, ["Yes"]],
                [7, 2, None, 1, "what", {"gap": "9,000 characters left out"}, "?"],
            ],
            [[-1, 0, "an open answer", 0]],
            [],
        ],
        whole=True,
    ),
    "d/test/2": Answers([[[-1, 0, 0, 0, ["Yes"]]], [], []], whole=False),
}


def focused(page: Any) -> str:
    """The text of what has the focus."""
    found: str = page.evaluate("document.activeElement.textContent")
    return found


@pytest.mark.browser
def test_a_question_opens_by_mouse(open_study: Callable[..., Any]) -> None:
    page = open_study(12, answers=ANSWERS)
    assert "completions of 2 of the 12 questions, of 1 of them the greedy ones alone" in page.inner_text("#questions")
    button = page.locator(".entry button").nth(1)
    detail = page.locator("#detail")
    assert button.get_attribute("aria-expanded") == "false" and not detail.is_visible()
    button.click()
    assert button.get_attribute("aria-expanded") == "true" and button.get_attribute("aria-controls") == "detail"
    assert detail.locator("h3").inner_text() == "Is number 1 </script> here?"
    shown = detail.locator(".completions li")
    assert [entry.split("\n")[0] for entry in shown.all_inner_texts()] == [
        "✗ wrong",
        "✓ right",
        "\u2013 unreadable",
        "✓ right",
    ]
    assert [entry.get_attribute("class") for entry in shown.all()] == ["wrong", "correct", "abstain", "correct"]
    assert detail.locator(".read").all_inner_texts() == ["No", "Yes", "an open answer"]
    assert detail.locator("mark").all_inner_texts() == ["No", "Yes"]
    assert shown.locator(".text").all_inner_texts() == [
        "I think <answer>No</answer>", "Yes", "what[… 9,000 characters left out …]?", "[empty]",
    ]  # fmt: skip
    assert "sample 5" in shown.nth(1).inner_text() and "cut off" in shown.nth(2).inner_text()
    assert detail.locator("h4").all_inner_texts() == [
        "base 1 of 8 right, greedy wrong", "after SFT 1 of 16 right, greedy wrong", "after RL not asked",
    ]  # fmt: skip
    assert detail.locator(".left-out").count() == 0 and "shown" in page.inner_text("#said")
    page.locator(".entry button").nth(2).click()
    assert button.get_attribute("aria-expanded") == "false"
    assert "Sampled completions were left out" in detail.inner_text()
    page.locator(".entry button").nth(3).click()
    assert "The completions were left out" in detail.inner_text() and shown.count() == 0
    page.locator(".entry button").nth(3).click()  # once more closes it
    assert not detail.is_visible()
    page.locator(".entry button").nth(1).click()
    page.click("#detail-close")
    assert not detail.is_visible() and "number 1 " in focused(page)


@pytest.mark.browser
def test_a_question_opens_by_keyboard(open_study: Callable[..., Any]) -> None:
    page = open_study(100, answers=ANSWERS)
    detail = page.locator("#detail")
    page.focus("#filter-clear")
    page.keyboard.press("Tab")  # one stop for the whole list
    assert "number 0 " in focused(page)
    page.keyboard.press("ArrowDown")
    assert "number 1 " in focused(page)
    page.keyboard.press("Enter")
    assert detail.is_visible() and "number 1 " in focused(page)
    assert page.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "detail"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "detail-close"
    page.keyboard.press("Escape")
    assert not detail.is_visible() and "number 1 " in focused(page)
    page.keyboard.press("Space")
    assert detail.is_visible()
    page.keyboard.press("End")
    assert "number 99 " in focused(page) and page.locator('.entry[aria-posinset="100"]').count() == 1
    page.keyboard.press("ArrowDown")
    assert "number 99 " in focused(page)
    page.focus("#detail")
    page.keyboard.press("Escape")  # its row had left the page
    assert not detail.is_visible() and "number 1 " in focused(page)
    page.keyboard.press("PageDown")
    page.keyboard.press("ArrowUp")
    assert "number 6 " in focused(page)
    page.evaluate("document.getElementById('viewport').scrollTop = 77 * 60")
    page.wait_for_function("document.querySelector('#list').textContent.includes('number 61 ')")
    assert "number 6 " in focused(page)  # scrolled away, not lost
    page.keyboard.press("Home")
    assert "number 0 " in focused(page) and page.evaluate("document.getElementById('viewport').scrollTop") == 0


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_open_question_can_be_read_and_printed(open_study: Callable[..., Any], width: int, scheme: str) -> None:
    page = open_study(12, width, scheme, answers=ANSWERS)
    page.locator(".entry button").nth(1).click()
    assert overflow(page) <= 0
    assert page.evaluate(CONTRAST) == []
    page.emulate_media(media="print")
    assert page.locator("#detail .completions").count() == 2 and page.locator("#detail mark").first.is_visible()
    assert not page.locator("#viewport").is_visible() and not page.locator("#filters").is_visible()
    inner, outer = page.evaluate("(d => [d.scrollHeight, d.clientHeight])(document.getElementById('detail'))")
    assert inner <= outer + 1  # nothing of it is cut off on paper
    page.emulate_media(media="screen")
    page.click("#detail-close")
    page.emulate_media(media="print")
    assert not page.locator("#questions").is_visible()


@pytest.mark.browser
def test_hostile_completions(open_study: Callable[..., Any], answered: Callable[..., Any]) -> None:
    text = "</script><img src=x onerror=alert(1)>\u202egnp.exe " + "long " * 2000 + "<b>Yes</b>"
    ledger, stages = answered({"d/test/0": [(-1, "correct", text, "Yes"), (0, "wrong", "\x00" + "x" * 10_000, None)]})
    answers = choose_answers(ledger, [*stages, *stages, *stages], {STRATA[0]: ["d/test/0"]})
    page = open_study(2, answers=answers)
    page.locator(".entry button").first.click()
    first, second = page.locator("#detail .text").all_inner_texts()[:2]
    assert first.startswith("</script><img src=x onerror=alert(1)>\ufffdgnp.exe long ") and first.endswith("<b>Yes</b>")
    assert second.startswith("\ufffdxxx") and "characters left out" in second
    assert max(len(first), len(second)) < 1000 and overflow(page) <= 0
    assert page.locator("#detail img").count() == 1 and page.locator("#detail b").count() == 0


def heights(page: str, kind: str) -> list[float]:
    """Where the dots of a kind stand in the first drawing of slopes."""
    drawing = page[page.index('class="chart slopes"') :].split("</svg>")[0]
    group = drawing[drawing.index(f'<g class="{kind}"') :].split("</g>")[0]
    return [float(value) for value in re.findall(r'cy="([0-9.]+)"', group)]


def test_supports_far_below_guessing_stand_where_they_are(answered: Callable[..., Any]) -> None:
    low = replace(study().cells[0], support=Estimate(-1.0, -1.33, -0.5))
    whole = replace(study(), cells=(low, *study().cells[1:]))
    supports = heights(render(whole, questions(2)), "after")
    # support -1, 0.4 and 0.4 on one scale with Acc@1 of 0.3
    accuracy = heights(render(whole, questions(2)), "before")[0]
    assert supports[1] == supports[2] < accuracy < supports[0] < 190 - 30
    assert (supports[0] - supports[1]) / (accuracy - supports[1]) == pytest.approx(1.4 / 0.1, rel=0.05)


def test_a_change_of_what_got_no_verdict_is_marked() -> None:
    loss = ChangeCell("after SFT", "base", STRATA[0], True, 50, Estimate(-1.0, -1.3, -0.2), None, 0, 0, trusted=False)
    page = render(replace(study(), changes=(loss,)), questions(2))
    drawing = page[page.index('class="chart transfer"') :].split("</svg>")[0]
    assert "(not trusted)</td>" in page and "50 items in 6 clusters" in page
    assert "not trusted" in drawing and 'class="cell open' in drawing and "lost" not in drawing.split("items")[0]


def test_long_names_differ_at_their_ends() -> None:
    names = [f"qwen2.5-vl-7b-instruct-{end}" for end in ("base", "sft", "rl")]
    models = tuple(ModelRow(name, name) for name in names)
    cells = tuple(replace(cell(n, s, "bridge")) for n in names for s in STRATA)
    page = render(replace(study(), models=models, cells=cells, changes=()), questions(2))
    for kind in ("map", "slopes"):
        drawing = page[page.index(f'class="chart {kind}"') :].split("</svg>")[0]
        shown = re.findall(r">(qwen[^<]*)</text>", drawing)
        assert len(set(shown)) == 3 and all("…" in name for name in shown)


@pytest.mark.browser
@pytest.mark.parametrize("family", ["DejaVu Sans", "Liberation Sans", "monospace"])
def test_what_a_tile_says_fits_into_it(open_study: Callable[..., Any], family: str) -> None:
    page = open_study(3)
    page.add_style_tag(content=f"svg text.kind, svg text.mark {{ font-family: '{family}', {family} !important; }}")
    assert page.evaluate(
        """[...document.querySelectorAll("svg.map a.cell")].every(cell => {
          const edge = cell.querySelector(".tile").getBoundingClientRect().right;
          return [...cell.querySelectorAll("text")].every(text => text.getBoundingClientRect().right <= edge);
        })"""
    )


@pytest.mark.browser
def test_a_wide_map_is_scrolled_on_a_phone_and_buttons_are_not_printed(open_study: Callable[..., Any]) -> None:
    page = open_study(3, 390)
    width = page.locator(".map").evaluate("map => map.getBoundingClientRect().width")
    assert width == page.locator(".map").evaluate("map => Number(map.getAttribute('width'))") > 390
    assert overflow(page) <= 0
    page.emulate_media(media="print")
    assert page.locator("figure .export:visible").count() == 0


@pytest.mark.browser
def test_every_image_of_a_question_in_its_order(show: Callable[..., Any], tmp_path: Path) -> None:
    paths = [tmp_path / f"{shade}.png" for shade in (10, 200, 120)]
    for path in paths:
        Image.new("L", (8, 8), int(path.stem)).save(path)
    names = tuple(map(str, paths))
    several, missing = replace(questions(1)[0], images=names), (names[2], str(tmp_path / "gone.png"))
    page_file = tmp_path / "study.html"
    page_file.write_text(render(study(), [several, replace(several, id="d/test/1", images=missing)]), encoding="utf-8")
    page = show(page_file)
    assert "d/test/0 · 3 images" in page.locator(".entry").first.inner_text()
    page.locator(".entry button").first.click()
    shown = page.locator("#detail .pictures img")
    shown.last.wait_for()
    shades = shown.evaluate_all(
        """found => found.map(image => {
          const canvas = Object.assign(document.createElement("canvas"), {width: 8, height: 8});
          canvas.getContext("2d").drawImage(image, 0, 0);
          return canvas.getContext("2d").getImageData(4, 4, 1, 1).data[0];
        })"""
    )
    assert shades == [10, 200, 120]
    assert shown.nth(1).get_attribute("alt") == "Image 2 of 3 of the question"
    page.locator(".entry button").nth(1).click()
    assert page.locator("#detail .pictures li").all_inner_texts() == ["", "Image 2 of 2 is not in this page."]
    assert page.locator(".entry img").count() == 2 and overflow(page) <= 0


def test_first_images_come_before_others_and_reading_stops_with_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [str(tmp_path / f"{n}.png") for n in range(8)]
    for n, file in enumerate(files):
        Image.frombytes("L", (64, 64), random.Random(n).randbytes(64 * 64)).save(file)
    read: list[str] = []
    real = report_images.load_image
    monkeypatch.setattr(report_images, "load_image", lambda path: read.append(path) or real(path))
    monkeypatch.setattr(study_page, "IMAGE_BYTES", 20_000)  # three of them
    many = [replace(entry, images=(files[n], files[n + 4])) for n, entry in enumerate(questions(4))]
    content = data_of(render(study(), many))
    assert read == files[:4]
    assert [bool(uri) for uri in content["pictures"]] == [True, True, True, False]
    assert [item["pictures"] for item in content["items"]] == [[0, None], [1, None], [2, None], [3, None]]


@pytest.mark.browser
def test_filters_let_through_what_they_say(open_study: Callable[..., Any]) -> None:
    page = open_study(200)
    known = [question.counts for question in questions(200)]

    def gained(counts: Any) -> float:
        (c, n, _), (d, m, _) = counts["base"], counts["after SFT"]
        return float(Fraction(d, m) - Fraction(c, n))

    wanted: dict[tuple[tuple[str, str], ...], Callable[[Any], bool]] = {
        (("greedy", "right"),): lambda c: c["base"][2] == "correct",
        (("greedy", "wrong"), ("model", "after SFT")): lambda c: c["after SFT"][2] == "wrong",
        (("greedy", "unreadable"), ("model", "base")): lambda c: c["base"][2] == "abstain",
        (("greedy", "right"), ("model", "after RL")): lambda c: False,
        (("change", "gained"),): lambda c: gained(c) > 0,
        (("change", "lost"),): lambda c: gained(c) < 0,
        (("change", "lost"), ("before", "after SFT"), ("after", "base")): lambda c: gained(c) > 0,
        (("change", "gained"), ("after", "after RL")): lambda c: False,
        (("change", "lost"), ("greedy", "right"), ("fate", "some")): lambda c: (
            gained(c) < 0 and c["base"][2] == "correct" and 0 < c["base"][0] < 8
        ),
    }
    for chosen, holds in wanted.items():
        for name, label in chosen:
            page.select_option(f"#filter-{name}", label=label)
        right = [number for number, counts in enumerate(known) if holds(counts)]
        assert page.inner_text("#count") == f"{len(right)} of 200 questions", chosen
        if right:
            assert f"number {right[0]} " in page.locator(".entry").first.inner_text()
        page.click("#filter-clear")
        assert page.inner_text("#count") == "200 of 200 questions"
    page.locator(".entry button").nth(4).click()
    page.fill("#filter-text", "number 4 ")
    assert page.locator("#detail").is_visible()
    page.fill("#filter-text", "number 5 ")
    assert not page.locator("#detail").is_visible()  # the question that was open is not among them


@pytest.mark.browser
def test_ten_thousand_questions(open_study: Callable[..., Any], answered: Callable[..., Any], tmp_path: Path) -> None:
    """Only those in view are in the page, whatever is filtered and wherever it is scrolled to."""
    text = "because of this and that " * 10 + "<answer>Yes</answer>"
    said = {f"d/test/{n}": [(-1, "correct", text, "Yes"), (0, "wrong", text, "Yes")] for n in range(10_000)}
    ledger, stages = answered(said, said)
    names = {stratum: [f"d/test/{n}" for n in range(place, 10_000, 2)] for place, stratum in enumerate(STRATA)}
    answers = choose_answers(ledger, [*stages, stages[0]], names)
    assert 2000 < len(answers) < 10_000
    page = open_study(10_000, answers=answers)
    assert (tmp_path / "study.html").stat().st_size < 12_000_000
    entries = page.locator(".entry")
    assert page.inner_text("#count") == "10,000 of 10,000 questions"
    assert 5 < entries.count() < 40
    page.evaluate("document.getElementById('viewport').scrollTop = 77 * 5000")
    page.wait_for_function("document.querySelector('.entry .what').textContent.includes('number 4994 ')")
    assert entries.count() < 40
    page.locator(".entry button").nth(8).click()
    assert entries.count() < 40 and page.locator("#detail").is_visible()
    page.fill("#filter-text", "number 9999 ")
    assert page.inner_text("#count") == "1 of 10,000 questions"
    assert "Is number 9999 </script> here?" in entries.first.inner_text()
    page.fill("#filter-text", "")
    page.select_option("#filter-stratum", label=STRATA[1])
    assert page.inner_text("#count") == "5,000 of 10,000 questions"
    page.select_option("#filter-stratum", label="all")
    page.select_option("#filter-fate", "never")
    assert page.inner_text("#count") == "1,112 of 10,000 questions"
    page.select_option("#filter-model", label="after RL")
    assert page.inner_text("#count") == "0 of 10,000 questions"
    assert entries.count() == 0


def test_whatever_the_texts_the_page_of_many_questions_stays_small(answered: Callable[..., Any]) -> None:
    """Without pictures, which have a budget of 3 MB."""
    hostile = "<</script>> " * 300
    said = {f"d/test/{n}": [(-1, "wrong", hostile, None), (0, "wrong", "n\u00f6 " * 500, None)] for n in range(10_000)}
    ledger, stages = answered(said)
    answers = choose_answers(ledger, stages * 3, {STRATA[0]: list(said)})
    many = [
        replace(question, question=hostile, options=("Yes", "n\u00f6 " * 500))
        for question in questions(10_000, answers=answers)
    ]
    page = render(study(), many)
    assert 6_000_000 < len(page.encode()) < 9_000_000
    cut = data_of(page)["items"][0]["question"]
    assert 60 < len(cut) < 200 and cut.endswith("…")
    few = data_of(render(study(), many[:5]))["items"][0]["question"]
    assert few == hostile


def test_what_the_script_reads_is_json_whatever_the_texts() -> None:
    content = data_of(render(study(), questions(2)))
    assert content["items"][1]["question"] == "Is number 1 </script> here?"


def test_an_empty_study() -> None:
    empty = StudyResult("empty", 0.9, 0.5, 0.2, "test", (), (), (), ())
    assert "empty" in render(empty, [])
