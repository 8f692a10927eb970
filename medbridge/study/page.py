"""The study as one HTML page that needs no network: drawings, tables, and the questions to look through."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from medbridge.report.charts import Series, pass_at_k_chart
from medbridge.report.images import Embedder
from medbridge.report.page import environment, script_hash
from medbridge.report.text import clean
from medbridge.report.view import Estimate
from medbridge.study.charts import MARKS, bottleneck_map, slopes, spectrum, transfer_map
from medbridge.study.result import FINDINGS, Cell, StudyResult

_TEMPLATES = Path(__file__).parent / "templates"

IMAGE_BYTES = 3_000_000
"""Budget of the embedded images."""

_WORDS = 400
"""Characters of a question, an answer or an option that the list of questions keeps."""

MEANINGS = {
    "vision-limited": "the tower's features do not show the answers",
    "support-limited": "the answers are not within the model's reach: bridge (SFT)",
    "sampling-limited": "within reach, and not said first: sharpen (RL)",
    "solved": "reached, and said first",
    "undecided": "more items or samples would tell",
}


@dataclass(frozen=True, slots=True)
class Question:
    """One measured question. `counts`: by model, right samples, all samples, and whether the greedy answer is right."""

    id: str
    stratum: str
    question: str
    answer: str
    options: tuple[str, ...] | None
    image: str | None
    counts: Mapping[str, tuple[int, int, bool]]


@dataclass(frozen=True, slots=True)
class _Page:
    map: Markup
    transfer: Markup
    slopes: list[tuple[str, Markup]]
    curves: list[tuple[str, Markup]]
    cells: list[tuple[Cell, str, Markup]]
    shown: list[str]
    items: Markup


def render(study: StudyResult, questions: Sequence[Question]) -> str:
    """The page as HTML text."""
    templates = environment(_TEMPLATES)
    templates.filters["two"] = lambda value: f"{value:.2f}".replace("-", "\u2212")
    page = _Page(
        map=bottleneck_map(study, lambda model, stratum: _anchor(study, model, stratum)),
        transfer=transfer_map(study) if study.changes else Markup(""),
        slopes=[(name, slopes(study, name)) for name in study.strata],
        curves=[(name, _curves(study, name)) for name in study.strata],
        cells=[(cell, _anchor(study, cell.model, cell.stratum), spectrum(cell)) for cell in study.cells],
        shown=[row.name for row in study.models],
        items=_data(study, questions),
    )
    script = (_TEMPLATES / "study.js").read_text(encoding="utf-8").strip()
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
    """What the script reads, as JSON that no text can end early."""
    embedder = Embedder(IMAGE_BYTES)
    pictures: list[str] = []
    place: dict[str, int] = {}  # of a file's picture: many questions show the same
    items: list[dict[str, Any]] = []
    for entry in questions:
        if entry.image is not None and entry.image not in place and embedder.left > 0:
            place[entry.image] = len(pictures)
            pictures.append(embedder.embed(entry.image).uri)
        items.append(
            {
                "id": clean(entry.id),
                "stratum": entry.stratum,
                "question": clean(entry.question)[:_WORDS],
                "answer": clean(entry.answer)[:_WORDS],
                "options": None if entry.options is None else [clean(option)[:_WORDS] for option in entry.options],
                "picture": place.get(entry.image or ""),
                "counts": entry.counts,
            }
        )
    names = [row.name for row in study.models]
    content = json.dumps({"models": names, "pictures": pictures, "items": items}, ensure_ascii=False)
    safe = content.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return Markup(safe)
