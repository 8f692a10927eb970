"""The study page's drawings as inline SVG: the bottleneck map, slopes, the transfer heat map, spectra.

No colour carries a meaning alone: findings have glyphs and names, changes have signs and numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from xml.etree import ElementTree as ET

from markupsafe import Markup

from medbridge.report.svg import drawing, label, line, markup, node, path_data, text_node
from medbridge.report.text import clean
from medbridge.report.view import Estimate
from medbridge.study.result import Cell, ChangeCell, StudyResult

MARKS = {"vision-limited": "V", "support-limited": "S", "sampling-limited": "R", "solved": "✓", "undecided": "?"}
"""One letter for each finding: sampling-limited is what RL sharpens."""

_MINUS = "\u2212"

_NAME = 200.0
_WIDTH, _HEIGHT = 156.0, 64.0
_HEAD = 34.0


def bottleneck_map(study: StudyResult, anchor: Callable[[str, str], str]) -> Markup:
    """Strata by models; each cell has its finding and the numbers behind it, and leads to `anchor(model, stratum)`."""
    models = [row.name for row in study.models if row.chain]
    svg = _grid(models, study.strata, "map", "Bottleneck of each model on each stratum")
    for row, stratum in enumerate(study.strata):
        for column, model in enumerate(models):
            cell = study.cell(model, stratum)
            if cell is not None:
                _finding(svg, cell, column, row, anchor(model, stratum))
    return markup(svg)


def transfer_map(study: StudyResult) -> Markup:
    """What each training changed in support: a row for each trained model, a column for each stratum."""
    names = list(dict.fromkeys(change.model for change in study.changes))
    svg = _grid(study.strata, names, "transfer", "Change of support by training, against the model before")
    for change in study.changes:
        _shift(svg, change, study.strata.index(change.stratum), names.index(change.model))
    return markup(svg)


def slopes(study: StudyResult, stratum: str) -> Markup:
    """Support above the floor and Acc@1 of the models in turn, with intervals."""
    cells = [cell for row in study.models if row.chain and (cell := study.cell(row.name, stratum))]
    width, height, left, right, top, bottom = 300.0, 190.0, 34.0, 14.0, 12.0, 30.0
    svg = drawing(width, height, "slopes", f"{stratum}: support above the floor and Acc@1 by model", "")
    step = (width - left - right) / max(1, len(cells))

    ends = [end for cell in cells for one in (cell.support, cell.acc_at_1) if one for end in (one.value, one.low)]
    least = min([-0.25, *(math.floor(4 * end) / 4 for end in ends if end is not None)])

    def y(value: float) -> float:
        return top + (1 - min(1.0, value)) / (1 - least) * (height - top - bottom)

    for tick in (0.0, 0.5, 1.0) if least > -1 else (*range(math.ceil(least), 0), 0.0, 1.0):
        line(svg, left, y(tick), width - right, y(tick), "grid" if tick else "axis")
        label(svg, left - 6, y(tick) + 3.5, f"{tick:g}", "end")
    threshold = line(svg, left, y(study.threshold), width - right, y(study.threshold), "threshold")
    text_node(threshold, "title", f"The gate's threshold of support, {study.threshold:g}")
    for kind, offset, read in (("after", -6.0, _support), ("before", 6.0, _accuracy)):
        group = ET.SubElement(svg, "g", {"class": kind})
        points = []
        for index, cell in enumerate(cells):
            value = read(cell)
            if value is None:
                continue
            x = left + (index + 0.5) * step + offset
            points.append((x, y(value.value)))
            if value.low is not None and value.high is not None:
                line(group, x, y(value.low), x, y(value.high), "whisker")
            dot = node(group, "circle", cx=x, cy=y(value.value), r=4, **{"class": "dot"})
            what = "support" if kind == "after" else "Acc@1"
            text_node(dot, "title", f"{cell.model}: {what} {value.value:.2f}")
        if len(points) > 1:
            node(group, "path", d=path_data(points), **{"class": "line thin"})
    for index, cell in enumerate(cells):
        label(svg, left + (index + 0.5) * step, height - 10, _cut(cell.model, 14), "middle")
    return markup(svg)


def spectrum(cell: Cell) -> Markup:
    """How many items are right in none to all of their samples."""
    width, height, bottom = 200.0, 74.0, 14.0
    title = f"{cell.model}, {cell.stratum}: items by share of right samples"
    total, most = sum(cell.spectrum), max(cell.spectrum, default=0)
    never = cell.spectrum[0] if cell.spectrum else 0
    svg = drawing(width, height, "spectrum", title, f"{never} of {total} items are never right")
    step = width / max(1, len(cell.spectrum))
    for index, count in enumerate(cell.spectrum):
        size = (height - bottom - 4) * count / most if most else 0.0
        bar = node(
            svg, "rect", x=index * step + 1, y=height - bottom - size, width=step - 2, height=size,
            **{"class": "none" if index == 0 else "all" if index == len(cell.spectrum) - 1 else "some"},
        )  # fmt: skip
        text_node(bar, "title", f"{index} of {len(cell.spectrum) - 1} samples right: {count} items")
    line(svg, 0, height - bottom, width, height - bottom, "axis")
    label(svg, 0, height - 2, "never", "start")
    label(svg, width, height - 2, "always", "end")
    return markup(svg)


def _grid(columns: Sequence[str], rows: Sequence[str], kind: str, title: str) -> ET.Element:
    width, height = _NAME + _WIDTH * len(columns), _HEAD + _HEIGHT * len(rows)
    description = f"{len(rows)} rows, {len(columns)} columns; the table below has the numbers"
    svg = drawing(width, height, kind, title, description)
    svg.set("width", f"{width:.0f}")
    svg.set("role", "group")
    for index, name in enumerate(columns):
        label(svg, _NAME + (index + 0.5) * _WIDTH, _HEAD - 12, _cut(name, 20), "middle", "head")
    for index, name in enumerate(rows):
        label(svg, _NAME - 12, _HEAD + (index + 0.5) * _HEIGHT + 4, _cut(name, 24), "end", "head")
    return svg


def _finding(svg: ET.Element, cell: Cell, column: int, row: int, href: str) -> None:
    link = ET.SubElement(svg, "a", {"href": f"#{href}", "class": f"cell {cell.finding.kind}"})
    link.set("aria-label", clean(f"{cell.model}, {cell.stratum}: {cell.finding.kind}. {cell.finding.words}"))
    x, y = _NAME + column * _WIDTH, _HEAD + row * _HEIGHT
    node(link, "rect", x=x + 2, y=y + 2, width=_WIDTH - 4, height=_HEIGHT - 4, rx=6, **{"class": "tile"})
    label(link, x + 14, y + 26, MARKS[cell.finding.kind], "start", "mark")
    label(link, x + 32, y + 25, cell.finding.kind, "start", "kind")
    seen = cell.sight.gain.value if cell.sight is not None and cell.sight.gain is not None else None
    numbers = [("sees", seen), ("reaches", _value(cell.support)), ("says", _value(cell.acc_at_1))]
    for index, (name, value) in enumerate(numbers):
        at = x + 14 + index * 41
        label(link, at, y + 43, name, "start", "small")
        label(link, at, y + 55, "-" if value is None else f"{value:.2f}", "start", "value")


def _shift(svg: ET.Element, change: ChangeCell, column: int, row: int) -> None:
    value = change.support
    kind = "none"
    if not change.trusted:
        kind = "open"
    elif value is not None and value.low is not None and value.high is not None:
        kind = "gained" if value.low > 0 else "lost" if value.high < 0 else "open"
    group = ET.SubElement(svg, "g", {"class": f"cell {kind}" + (" trained" if change.trained else "")})
    x, y = _NAME + column * _WIDTH, _HEAD + row * _HEIGHT
    size = 0.0 if value is None else min(1.0, abs(value.value))
    tile = node(group, "rect", x=x + 2, y=y + 2, width=_WIDTH - 4, height=_HEIGHT - 4, rx=6, **{"class": "tile"})
    tile.set("fill-opacity", f"{0.12 + 0.33 * size:.2f}")
    words = "unknown" if value is None else f"{value.value:+.2f}"
    label(group, x + 14, y + 26, words.replace("-", _MINUS), "start", "kind")
    if value is not None and value.low is not None and value.high is not None:
        label(group, x + 14, y + 41, f"[{value.low:+.2f}, {value.high:+.2f}]".replace("-", _MINUS), "start", "small")
    label(group, x + 14, y + 54, f"+{change.gained} {_MINUS}{change.lost} items", "start", "small")
    if not change.trusted:
        label(group, x + _WIDTH - 12, y + 24, "not trusted", "end", "small")
    elif change.trained:
        label(group, x + _WIDTH - 12, y + 24, "trained", "end", "small")


def _support(cell: Cell) -> Estimate | None:
    return cell.support


def _accuracy(cell: Cell) -> Estimate | None:
    return cell.acc_at_1


def _value(interval: Estimate | None) -> float | None:
    return None if interval is None else interval.value


def _cut(name: str, most: int) -> str:
    """A name with its middle left out: those of one family differ at their ends."""
    end = (most - 1) // 2
    return name if len(name) <= most else f"{name[: most - 1 - end]}…{name[-end:]}"
