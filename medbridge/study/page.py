"""The study as one HTML page that needs no network: drawings, tables, and the questions to look through."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from markupsafe import Markup

from medbridge.data.answers import Status
from medbridge.report.charts import Series, pass_at_k_chart
from medbridge.report.images import Embedder
from medbridge.report.page import environment, script_hash
from medbridge.report.text import clean
from medbridge.report.view import Estimate
from medbridge.study.answers import STATUSES, Answers, json_text
from medbridge.study.charts import MARKS, bottleneck_map, slopes, spectrum, transfer_map
from medbridge.study.result import FINDINGS, Cell, StudyResult

_TEMPLATES = Path(__file__).parent / "templates"

IMAGE_BYTES = 3_000_000
"""Budget of the embedded images."""

TEXT_BYTES = 3_000_000
"""Budget of the questions' own texts, answers and options."""

_LENGTHS = (4000, 2000, 1000, 500, 250, 120, 60)
"""Characters of one text that are kept: the most with which all questions fit their budget."""

_SCRIPTS = ("drawings.js", "questions.js")

MEANINGS = {
    "vision-limited": "the tower's features do not show the answers",
    "support-limited": "the answers are not within the model's reach: bridge (SFT)",
    "sampling-limited": "within reach, and not said first: sharpen (RL)",
    "solved": "reached, and said first",
    "undecided": "more items or samples would tell",
}


@dataclass(frozen=True, slots=True)
class Question:
    """One measured question.

    Attributes:
        images: their files, in the order in which they are asked about.
        counts: by model, right samples, all samples, and how the greedy completion came out.
        answers: completions of every model; None where they were left out.
    """

    id: str
    stratum: str
    question: str
    answer: str
    options: tuple[str, ...] | None
    images: tuple[str, ...]
    counts: Mapping[str, tuple[int, int, Status | None]]
    answers: Answers | None = None


@dataclass(frozen=True, slots=True)
class _Page:
    map: Markup
    transfer: Markup
    slopes: list[tuple[str, Markup]]
    curves: list[tuple[str, Markup]]
    cells: list[tuple[Cell, str, Markup]]
    shown: list[str]
    items: Markup
    questions: int
    answered: int
    whole: int


def render(study: StudyResult, questions: Sequence[Question]) -> str:
    """The page as HTML text."""
    templates = environment(_TEMPLATES)
    page = _Page(
        map=bottleneck_map(study, lambda model, stratum: _anchor(study, model, stratum)),
        transfer=transfer_map(study) if study.changes else Markup(""),
        slopes=[(name, slopes(study, name)) for name in study.strata],
        curves=[(name, _curves(study, name)) for name in study.strata],
        cells=[(cell, _anchor(study, cell.model, cell.stratum), spectrum(cell)) for cell in study.cells],
        shown=[row.name for row in study.models],
        items=_data(study, questions),
        questions=len(questions),
        answered=sum(entry.answers is not None for entry in questions),
        whole=sum(entry.answers is not None and entry.answers.whole for entry in questions),
    )
    script = "\n".join((_TEMPLATES / name).read_text(encoding="utf-8").strip() for name in _SCRIPTS)
    return templates.get_template("study.html.j2").render(
        study=study, page=page, findings=FINDINGS, marks=MARKS, meanings=MEANINGS, script=script,
        script_hash=script_hash(script),
    )  # fmt: skip


def _curves(study: StudyResult, stratum: str) -> Markup:
    cells = [(number, cell) for number, row in enumerate(study.models) if (cell := study.cell(row.name, stratum))]
    ks = sorted({k for _, cell in cells for k in cell.ks})
    series = []
    for number, cell in cells:
        at = dict(zip(cell.ks, cell.pass_at_k, strict=True))
        nothing: list[float | None] = [None] * len(ks)
        style = f"m{number % 6}"
        series.append(Series(cell.model, style, [at.get(k) for k in ks], nothing, nothing, _greedy(cell.acc_at_1)))
    guess = dict(zip(cells[0][1].ks, cells[0][1].floors, strict=True)) if cells else {}
    return pass_at_k_chart(
        ks, series, [guess.get(k) for k in ks], gate_k=None, title=f"{stratum}: Pass@k by model",
        description="With guessing; Acc@1 stands left of k = 1.",
    )  # fmt: skip


def _greedy(interval: Estimate | None) -> tuple[float, float | None, float | None] | None:
    return None if interval is None else (interval.value, None, None)


def _anchor(study: StudyResult, model: str, stratum: str) -> str:
    names = [row.name for row in study.models]
    return f"cell-{names.index(model)}-{study.strata.index(stratum)}"


def _data(study: StudyResult, questions: Sequence[Question]) -> Markup:
    """What the script reads: models and strata are named by their places."""
    names = [row.name for row in study.models]
    length = _length(questions)
    pictures = _pictures(questions)
    place = {path: at for at, path in enumerate(pictures)}
    items: list[dict[str, Any]] = []
    for entry in questions:
        item_id, question, answer, *options = (_cut(text, length) for text in _texts(entry))
        items.append(
            {
                "id": item_id,
                "stratum": study.strata.index(entry.stratum),
                "question": question,
                "answer": answer,
                "options": None if entry.options is None else options,
                "right": None if entry.options is None else entry.options.index(entry.answer),
                "pictures": [place.get(path) for path in entry.images],
                "counts": [_count(entry.counts.get(name)) for name in names],
                "answers": None if entry.answers is None else entry.answers.records,
                "whole": entry.answers is not None and entry.answers.whole,
            }
        )
    models, strata = ([clean(name) for name in names] for names in (names, study.strata))
    shown = list(pictures.values())
    return Markup(json_text({"models": models, "strata": strata, "pictures": shown, "items": items}))


def _pictures(questions: Sequence[Question]) -> dict[str, str]:
    """Data URIs of image files, empty for one that can't be shown; the first image of each question comes first."""
    embedder = Embedder(IMAGE_BYTES)
    found: dict[str, str] = {}
    paths = [entry.images[:1] for entry in questions] + [entry.images[1:] for entry in questions]
    for path in chain.from_iterable(paths):
        if embedder.full:
            break
        if path not in found:
            found[path] = embedder.embed(path).uri
    return found


def _texts(question: Question) -> tuple[str, ...]:
    return (question.id, question.question, question.answer, *(question.options or ()))


def _length(questions: Sequence[Question]) -> int:
    for length in _LENGTHS:
        total = sum(len(json_text(_cut(text, length)).encode()) for entry in questions for text in _texts(entry))
        if total <= TEXT_BYTES:
            return length
    return _LENGTHS[-1]


def _cut(text: str, length: int) -> str:
    shown = clean(text[:length])
    return shown if len(text) <= length else f"{shown}…"


def _count(found: tuple[int, int, Status | None] | None) -> list[int | None] | None:
    if found is None:
        return None
    right, samples, greedy = found
    return [right, samples, None if greedy is None else STATUSES.index(greedy)]
