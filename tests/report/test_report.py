"""The HTML report of finished, unfinished, hostile, huge and empty runs: what it says and must not hold."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import medbridge.report.html
from medbridge.errors import MedbridgeError
from medbridge.report import write_report
from medbridge.report.samples import excerpt

VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """A parsed report: its tags, its texts, and whether it nests as it should."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def check_self_contained(page: Page, html: str) -> None:
    """No script, no event handler, nothing to load, no way out of the file."""
    allowed = {
        "html",
        "head",
        "meta",
        "link",
        "title",
        "style",
        "body",
        "main",
        "header",
        "footer",
        "nav",
        "section",
    }
    allowed |= {
        "article",
        "figure",
        "figcaption",
        "h1",
        "h2",
        "h3",
        "p",
        "ul",
        "ol",
        "li",
        "dl",
        "dt",
        "dd",
        "div",
        "a",
    }
    allowed |= {"span", "bdi", "mark", "strong", "small", "sup", "i", "pre", "details", "summary", "img"}
    allowed |= {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    allowed |= {"svg", "symbol", "use", "path", "line", "rect", "circle", "g", "text", "desc"}
    assert {tag for tag, _ in page.tags} <= allowed
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "data", "srcset", "poster"):
                assert value is not None and value.startswith(("#", "data:"))
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)
    assert style is not None and "url(" not in style.group(1) and "@import" not in style.group(1)
    anchors = {a["href"] for a in page.all("a")} | {a["href"] for a in page.all("use")}
    ids = {f"#{attributes['id']}" for _, attributes in page.tags if "id" in attributes}
    assert anchors <= ids


def report(run: Any) -> tuple[Page, str]:
    path = write_report(run.folder)
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    check_self_contained(page, html)
    return page, html


def test_a_finished_run_is_told_whole(finished_run: Path) -> None:
    path = write_report(finished_run)
    assert path == finished_run / "report.html"
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    check_self_contained(page, html)
    text = " ".join(page.text.split())
    assert "brain demo" in text and "Finished" in text and "stages per stratum are used up for level" in text
    assert re.search(r"plane .{0,20}done bridged, then sharpened; Acc@1 0\.\d\d → \d\.\d\d on test items", text)
    assert "one average brain" in text and "made from nothing" in text
    assert "2.13.0" in text and "format_steps: 40" in text
    assert text.count("replayed items of others") == 1
    assert "most frequent answer" in text and "above base model, intervals apart" in text
    for chart in [a for a in page.all("svg") if "viewbox" in a and "chart" in (a["class"] or "")]:
        assert chart.get("role") == "img" or chart.get("aria-hidden") == "true"
    assert sum("curve" in (a.get("class") or "") for a in page.all("svg")) == 4
    images = page.all("img")
    assert len(images) == 16 and all((a["src"] or "").startswith("data:image/png;base64,") and a["alt"] for a in images)
    assert len(page.all("mark")) > 16
    tables = page.all("table")
    assert len(page.all("caption")) == len(tables) and all("scope" in a for a in page.all("th"))


def test_the_reason_and_the_interval_of_each_verdict_are_shown(finished_run: Path) -> None:
    page = read(write_report(finished_run))
    text = " ".join(page.text.split())
    assert text.count("Support above the guessing floor at k =") == 8  # base and latest of four strata
    assert re.search(r"\d\.\d\d to \d\.\d\d at k = 3", text)
    assert "threshold 0.50" in text


def test_the_same_run_gives_the_same_report(finished_run: Path, tmp_path: Path) -> None:
    first, second = (write_report(finished_run, tmp_path / name).read_text() for name in ("a.html", "b.html"))
    strip = re.compile(r"Written by medbridge on [^<]*")
    assert strip.sub("", first) == strip.sub("", second)


def test_the_file_is_replaced_in_one_step(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "new" / "report.html"
    assert write_report(finished_run, out) == out
    before = out.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_report(finished_run, out)
    assert out.read_bytes() == before
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]


def test_no_run_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(MedbridgeError, match=r"no such run database"):
        write_report(tmp_path)


def test_a_damaged_run_database_is_a_clear_error(fabricate: Callable[..., Any]) -> None:
    run = fabricate()
    run.sql("INSERT INTO meta VALUES ('name', CAST(x'22ff22' AS TEXT))")
    with pytest.raises(MedbridgeError, match=r"run\.sqlite: the run database can't be read"):
        write_report(run.folder)


# -- at any moment of a run's life ---------------------------------------------------------------------------


def test_an_empty_run(fabricate: Callable[..., Any]) -> None:
    page, _ = report(fabricate())
    text = " ".join(page.text.split())
    assert "Not begun" in text and "No stage has begun" in text and "No diagnosis is finished yet" in text


def test_only_a_base_diagnosis(fabricate: Callable[..., Any]) -> None:
    run = fabricate(samples=4)
    run.describe()
    run.draw("plane", "validation", 10, ("axial", "coronal"), "Which plane?")
    run.measure("diagnose", {"plane": (0.5, 60, 0.0)})
    text = " ".join(report(run)[0].text.split())
    assert "not trained; Acc@1 0." in text and "Nothing was trained" in text
    assert "Diagnosis is done, and the next stage has not begun" in text


def test_a_diagnosis_that_is_running(fabricate: Callable[..., Any]) -> None:
    run = fabricate(samples=4)
    run.describe()
    run.draw("plane", "validation", 10, ("axial", "coronal"), "Which plane?")
    run.measure("diagnose", {"plane": (0.5, 60, 0.0)}, finish=False)
    text = " ".join(report(run)[0].text.split())
    assert "Running Diagnosis has begun: 40 completions; the last entry is" in text


def test_a_training_stage_that_was_cut_off(fabricate: Callable[..., Any]) -> None:
    run = fabricate(samples=4)
    run.describe()
    for split in ("train", "validation"):
        run.draw("plane", split, 10, ("axial", "coronal"), "Which plane?")
    run.measure("diagnose", {"plane": (0.5, 60, 0.0)})
    run.train("bridge", ["plane"], steps=30, planned=100, finish=False)
    run.ledger.close()
    for path in run.folder.glob("run.sqlite*"):
        os.utime(path, (1e9, 1e9))
    text = " ".join(report(run)[0].text.split())
    assert "Stopped Bridge has begun: 30 of 100 steps; the last entry is" in text
    assert "30 of 100" in text


def test_a_base_model_tested_before_any_training(fabricate: Callable[..., Any]) -> None:
    run = fabricate(samples=4)
    run.describe()
    for split in ("validation", "test"):
        run.draw("plane", split, 10, ("axial", "coronal"), "Which plane?")
    run.measure("diagnose", {"plane": (0.5, 60, 0.0)})
    run.measure("evaluate", {"plane": (0.5, 60, 0.0)})
    run.finish("the budget of 0 training stages is used up")
    text = " ".join(report(run)[0].text.split())
    assert "most frequent answer, intervals overlap" in text and "final model" not in text.split("In words")[1][:400]


def test_strata_without_items_open_questions_and_unknown_numbers(fabricate: Callable[..., Any]) -> None:
    run = fabricate(samples=4)
    run.describe()
    run.draw("open", "validation", 10, None, "What is this?")
    run.draw("sure", "validation", 10, ("only", "other"), "Which one?")
    run.draw("train only", "train", 3, ("a", "b"), "Which one?")
    run.measure("diagnose", {"open": (0.5, 4, 0.3), "sure": (0.5, 4, 0.0), "no items": (0.5, 4, 0.0)})
    run.train("sharpen", ["train only"], steps=4)
    nothing = {"value": None, "low": None, "high": None}
    run.sql("UPDATE items SET options = '[\"only\"]', answer = 'only', floor = 1 WHERE stratum = 'sure'")
    ((stored,),) = run.ledger._db.execute("SELECT support FROM verdicts WHERE stratum = 'sure'").fetchall()
    support = json.loads(stored) | {"k": None, "support": None, "floor": [1.0] * 4, "acc_at_1": nothing}
    support["above_floor"] = {name: [None] * 4 for name in nothing}
    support["pass_at_k"]["low"] = [None] * 4
    support |= {"abstain_rate": None}
    run.sql("UPDATE verdicts SET support = ? WHERE stratum = 'sure'", json.dumps(support))
    run.sql("UPDATE metrics SET value = NULL WHERE name = 'reward' OR step = 2")
    page, _ = report(run)
    text = " ".join(page.text.split())
    assert "fewer than the 8 that a verdict needs" in text  # the stratum without items
    assert "no finite values" in text
    assert "train only" in text and "sharpened; not measured" in text
    assert "nan" not in text.lower().split() and "None" not in text.split()


def test_a_run_database_with_none_of_the_expected_facts(fabricate: Callable[..., Any]) -> None:
    run = fabricate(samples=2)
    run.draw("s", "validation", 3, ("a", "b"), "Which?")
    run.measure("diagnose", {"s": (0.5, 4, 0.0)})
    run.sql("UPDATE verdicts SET support = '{}', verdict = '{}'")
    for key, value in (
        ("config", "[1]"),
        ("environment", '"x"'),
        ("outcome", "3"),
        ("finished", '"stopped by hand"'),
    ):
        run.sql("INSERT OR REPLACE INTO meta VALUES (?, ?)", key, value)
    text = " ".join(report(run)[0].text.split())
    assert "Finished stopped by hand" in text


def test_sixty_strata_and_thousands_of_items_stay_small(fabricate: Callable[..., Any]) -> None:
    run = fabricate(samples=3)
    run.describe()
    names = [f"modality {index // 10} / organ {index}" for index in range(60)]
    for name in names:
        run.draw(name, "validation", 35, ("a", "b", "c", "d"), "Which one? " + "words " * 40, pictures=3)
    long = "<" * 3000
    run.measure(
        "diagnose",
        dict.fromkeys(names, (0.4, 4.0, 0.1)),
        write=lambda item, said, number: f"<think>{long}</think><answer>{said}</answer>",
    )
    run.train("bridge", names, steps=700)
    page, html = report(run)
    assert len(html.encode()) < 3_000_000
    text = " ".join(page.text.split())
    assert re.search(r"60 strata: (\d+ (done|sharpen|bridge|undecided)(, )?)+\.", text)
    assert all(name in text for name in names)


def test_large_pictures_stay_within_the_budget(fabricate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(medbridge.report.html, "IMAGE_BYTES", 200_000)
    run = fabricate(samples=2)
    run.describe()
    names = [f"s{index}" for index in range(4)]
    for name in names:
        run.draw(name, "validation", 4, ("a", "b"), "Which?", noise=260)
    run.measure("diagnose", dict.fromkeys(names, (0.5, 4.0, 0.0)))
    page, html = report(run)
    assert len(html.encode()) < 350_000
    assert max(int(a["width"] or 0) for a in page.all("img")) == 224
    assert "Left out to keep this file small." in page.text


# -- hostile texts -------------------------------------------------------------------------------------------


def test_hostile_texts_stay_texts(hostile_report: Path) -> None:
    html = hostile_report.read_text(encoding="utf-8")
    page = Page(html)
    check_self_contained(page, html)
    assert "window.pwned = 1" in page.text  # shown, as the text that it is
    assert "49" not in html.split("How to read this")[1].split("Configuration")[0]
    assert "\x00" not in html and "\x1b" not in html
    assert len(html.encode()) < 1_000_000  # although completions are 100 kB each
    assert "characters left out" in page.text


def test_text_can_not_turn_the_writing_direction_around_it(hostile_report: Path) -> None:
    html = hostile_report.read_text(encoding="utf-8")

    class Isolation(HTMLParser):
        depth = 0

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.depth += tag in ("bdi", "title", "desc")  # the latter two stand alone

        def handle_endtag(self, tag: str) -> None:
            self.depth -= tag in ("bdi", "title", "desc")

        def handle_data(self, data: str) -> None:
            assert "\u05d0" not in data or self.depth > 0, data[:200]

    assert "\u05d0" in html
    # Inside <bdi>, an isolate that the text closes or leaves open would still break out.
    assert not re.search("[\u202a-\u202e\u2066-\u2069]", html)
    Isolation().feed(html)


def test_a_missing_picture_is_a_note(fabricate: Callable[..., Any]) -> None:
    run = fabricate(samples=2)
    run.describe()
    run.draw("s", "validation", 2, ("a", "b"), "Which?", pictures=0)
    (run.folder / "pictures" / "s-validation-001.png").write_bytes(b"not a picture")
    run.measure("diagnose", {"s": (0.5, 4.0, 0.0)})
    page, html = report(run)
    assert page.all("img") == []
    assert "The image file is missing." in page.text and "The image can't be read" in page.text
    assert str(run.folder) not in html


# -- excerpts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 5, 100, 101, 5000])
@pytest.mark.parametrize("span", [None, (0, 3), (2, 2), (4, 3), (90, 120), (2500, 2504), (4990, 5000), (0, 5000)])
def test_an_excerpt_keeps_the_span_and_counts_what_it_leaves_out(length: int, span: tuple[int, int] | None) -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(length))
    pieces = excerpt(text, span, 100)
    shown = sum(len(piece.text) for piece in pieces if piece.kind != "gap")
    left_out = sum(int(piece.text.split()[0].replace(",", "")) for piece in pieces if piece.kind == "gap")
    assert shown + left_out == length
    assert shown <= 300
    marked = "".join(piece.text for piece in pieces if piece.kind == "mark")
    if span is not None and 0 <= span[0] < span[1] <= length:
        assert text[span[0] : span[1]].startswith(marked[:10]) and marked
    else:
        assert not marked
