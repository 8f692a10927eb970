"""The report's drawings as inline SVG: interval bars, Pass@k curves, training curves, all from plain numbers.

Colours are classes of the style sheet, and none carries a meaning alone: lines differ in dash, markers in shape, and a
table has the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from markupsafe import Markup

from medbridge.report.svg import drawing, label, line, markup, node, path_data, short, text_node

Points = Sequence[tuple[float, float | None]]

_MOST_POINTS = 120
"""Points drawn per training curve; longer ones show means of neighbouring steps."""

_MOST_KS = 40
"""Points drawn per Pass@k curve."""


@dataclass(frozen=True, slots=True)
class Series:
    """One measurement in a Pass@k chart. `style` is "before" or "after"; Acc@1 is (value, low, high)."""

    label: str
    style: str
    value: Sequence[float | None]
    low: Sequence[float | None]
    high: Sequence[float | None]
    acc_at_1: tuple[float, float | None, float | None] | None


@dataclass(frozen=True, slots=True)
class Reached:
    """Share of the questions reached at each k, and the share `guess` that guessing reaches at any k."""

    value: Sequence[float | None]
    low: Sequence[float | None]
    high: Sequence[float | None]
    guess: float


def interval_bar(
    value: float | None,
    low: float | None,
    high: float | None,
    *,
    title: str,
    style: str = "after",
    domain: tuple[float, float] = (0.0, 1.0),
    references: Sequence[tuple[float, str, str]] = (),
) -> Markup:
    """A dot with its interval on a scale.

    Args:
        value, low, high: in units of the domain; None draws the scale alone, and what lies outside
            ends in an arrow.
        title: said by screen readers, shown on hovering.
        style: "after" (filled dot), "before" (open dot) or "baseline" (open diamond).
        domain: ends of the scale.
        references: (position, class, name) of lines across the scale, such as a threshold.
    """
    width, height, pad = 220.0, 26.0, 7.0
    middle = height / 2
    start, stop = domain

    def x(position: float) -> float:
        share = (position - start) / (stop - start)
        return pad + min(1.0, max(0.0, share)) * (width - 2 * pad)

    svg = drawing(width, height, "bar", title, "")
    line(svg, pad, middle, width - pad, middle, "scale")
    for tick in _ticks(start, stop):
        tall = 4.5 if tick in (0.0, 1.0) else 2.5
        line(svg, x(tick), middle - tall, x(tick), middle + tall, "scale")
    for position, kind, name in references:
        if start <= position <= stop:
            reference = line(svg, x(position), 1.0, x(position), height - 1.0, kind)
            text_node(reference, "title", name)
    if value is None:
        return markup(svg)
    group = ET.SubElement(svg, "g", {"class": style})
    if low is not None and high is not None:
        left, right = x(low), max(x(high), x(low) + 1)
        node(group, "rect", x=left, y=middle - 3.5, width=right - left, height=7, rx=3.5, **{"class": "band"})
        line(group, left, middle - 5, left, middle + 5, "cap")
        line(group, right, middle - 5, right, middle + 5, "cap")
    if value < start or value > stop:
        edge, way = (pad, 1) if value < start else (width - pad, -1)
        path = f"M{short(edge - way * 6)} {short(middle)}l{way * 8} -5v10z"
        node(group, "path", d=path, **{"class": "dot"})
    elif style == "baseline":
        diamond = f"M{short(x(value))} {short(middle - 5.5)}l5.5 5.5l-5.5 5.5l-5.5 -5.5z"
        node(group, "path", d=diamond, **{"class": "dot"})
    else:
        node(group, "circle", cx=x(value), cy=middle, r=4.5, **{"class": "dot"})
    return markup(svg)


def pass_at_k_chart(
    ks: Sequence[int],
    series: Sequence[Series],
    floor: Sequence[float | None],
    *,
    gate_k: int | None,
    reached: Reached | None = None,
    title: str,
    description: str,
) -> Markup:
    """Pass@k over k on a logarithmic axis, with intervals, the guessing floor, and Acc@1 left of k = 1.

    Args:
        ks: values of k, ascending, shape [K]; all curves have this length.
        series: what was measured, oldest first.
        floor: Pass@k of guessing [K].
        gate_k: the k that the gate reads; marked on the axis.
        reached: what it reads there in place of Pass@k, with the flat line of guessing; the curves have length K.
        title, description: said by screen readers.
    """
    width, height = 320.0, 216.0
    left, right, top, bottom = 34.0, 10.0, 16.0, 34.0
    shown = _thinned(ks)
    octaves = math.log2(ks[-1]) if ks else 0.0
    step = (width - left - right) / (octaves + 1.1)

    def x(k: float) -> float:
        return left + step * (0.85 + math.log2(k))

    def y(share: float) -> float:
        return top + (1 - min(1.0, max(0.0, share))) * (height - top - bottom)

    svg = drawing(width, height, "curve", title, description)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        line(svg, left, y(share), width - right, y(share), "axis" if share == 0 else "grid")
        if share in (0.0, 0.5, 1.0):
            label(svg, left - 6, y(share) + 3.5, f"{share:g}", "end")
    greedy = left + step * 0.3 if ks else (left + width - right) / 2
    label(svg, greedy, height - bottom + 15, "Acc@1", "middle")
    for tick in _octave_ticks(ks):
        line(svg, x(tick), y(0), x(tick), y(0) + 4, "axis")
        label(svg, x(tick), height - bottom + 15, str(tick), "middle")
    if ks:
        label(svg, (x(1) + width - right) / 2, height - 5, "k, samples a question", "middle")
    if gate_k is not None and gate_k in ks:
        marked = line(svg, x(gate_k), y(1) - 3, x(gate_k), y(0), "gate")
        text_node(marked, "title", f"The gate reads support at k = {gate_k}")
        label(svg, x(gate_k), y(1) - 6, f"gate k = {gate_k}", "middle" if x(gate_k) < width - 50 else "end")
    for entry in series:
        group = ET.SubElement(svg, "g", {"class": entry.style})
        upper = [(x(ks[i]), y(v)) for i in shown if (v := entry.high[i]) is not None]
        lower = [(x(ks[i]), y(v)) for i in shown if (v := entry.low[i]) is not None]
        if len(upper) > 1 and len(lower) > 1:
            node(group, "path", d=path_data([*upper, *reversed(lower)]) + "z", **{"class": "area"})
    floor_points = [(x(ks[i]), y(v)) for i in shown if (v := floor[i]) is not None]
    if len(floor_points) > 1:
        node(svg, "path", d=path_data(floor_points), **{"class": "floor"})
    elif floor_points:
        at, height_there = floor_points[0]
        line(svg, at - 12, height_there, at + 12, height_there, "floor")
    if reached is not None:
        group = ET.SubElement(svg, "g", {"class": "reached"})
        points = [(x(ks[i]), y(v)) for i in shown if (v := reached.value[i]) is not None]
        if points:
            line(group, points[0][0], y(reached.guess), points[-1][0], y(reached.guess), "chance")
            node(group, "path", d=path_data(points), **{"class": "line"})
        read = ks.index(gate_k) if gate_k is not None and gate_k in ks else None
        if read is not None and (level := reached.value[read]) is not None:
            middle, low, high = x(ks[read]), reached.low[read], reached.high[read]
            if low is not None and high is not None:
                line(group, middle, y(low), middle, y(high), "whisker")
            square = node(group, "rect", x=middle - 3.5, y=y(level) - 3.5, width=7, height=7, **{"class": "dot"})
            text_node(square, "title", f"Reached at k = {gate_k}: {level:.2f}, by guessing {reached.guess:.2f}")
    for index, entry in enumerate(series):
        group = ET.SubElement(svg, "g", {"class": entry.style})
        points = [(x(ks[i]), y(v)) for i in shown if (v := entry.value[i]) is not None]
        if len(points) > 1:
            node(group, "path", d=path_data(points), **{"class": "line"})
        for tick in _octave_ticks(ks):
            value = entry.value[list(ks).index(tick)]
            if value is not None:
                dot = node(group, "circle", cx=x(tick), cy=y(value), r=3, **{"class": "dot"})
                text_node(dot, "title", f"{entry.label}: Pass@{tick} {value:.2f}")
        if entry.acc_at_1 is not None:
            value, low, high = entry.acc_at_1
            # Side by side, so that two markers of the same height can both be seen.
            at = greedy + (index - (len(series) - 1) / 2) * min(11.0, step * 0.35)
            if low is not None and high is not None:
                line(group, at, y(low), at, y(high), "whisker")
            path = f"M{short(at)} {short(y(value) - 5)}l5 5l-5 5l-5 -5z"
            diamond = node(group, "path", d=path, **{"class": "dot"})
            text_node(diamond, "title", f"{entry.label}: Acc@1 {value:.2f}")
    return markup(svg)


def training_chart(points: Sequence[tuple[int, float]], *, title: str) -> Markup:
    """One metric over optimizer steps. NaN leaves a gap; long series are drawn as means of neighbours."""
    width, height = 260.0, 118.0
    left, right, top, bottom = 44.0, 46.0, 8.0, 20.0
    drawn = _bucketed(points)
    values = [value for _, value in drawn if value is not None]
    description = f"{len(points):,} steps"
    if values:
        description += f", from {figure(values[0])} to {figure(values[-1])}"
    svg = drawing(width, height, "training", title, description)
    if not values:
        label(svg, width / 2, height / 2, "no finite values", "middle")
        return markup(svg)
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(high)):
        margin = abs(high) * 0.1 or 0.5
        low, high = low - margin, high + margin
    first, last = drawn[0][0], max(drawn[-1][0], drawn[0][0] + 1e-9)

    def x(step: float) -> float:
        return left + (step - first) / (last - first) * (width - left - right)

    def y(value: float) -> float:
        return top + (high - value) / (high - low) * (height - top - bottom)

    for bound in (low, high):
        line(svg, left, y(bound), width - right, y(bound), "grid")
        label(svg, left - 5, y(bound) + 3.5, figure(bound), "end")
    label(svg, left, height - 5, f"step {points[0][0]:,}", "start")
    if len(points) > 1:
        label(svg, width - right, height - 5, f"{points[-1][0]:,}", "end")
    group = ET.SubElement(svg, "g", {"class": "after"})
    stretch: list[tuple[float, float]] = []
    for step, value in [*drawn, (last, None)]:
        if value is not None:
            stretch.append((x(step), y(value)))
        elif stretch:
            if len(stretch) > 1:
                node(group, "path", d=path_data(stretch), **{"class": "line thin"})
            else:
                node(group, "circle", cx=stretch[0][0], cy=stretch[0][1], r=2, **{"class": "dot"})
            stretch = []
    end = next((step, value) for step, value in reversed(drawn) if value is not None)
    node(group, "circle", cx=x(end[0]), cy=y(end[1] or 0.0), r=3, **{"class": "dot"})
    label(svg, x(end[0]) + 6, y(end[1] or 0.0) + 3.5, figure(values[-1]), "start", "now")
    return markup(svg)


def scale(domain: tuple[float, float], references: Sequence[tuple[float, str, str]] = ()) -> Markup:
    """The labelled scale over a column of `interval_bar`s of the same domain; hidden from screen readers."""
    width, height, pad = 220.0, 16.0, 7.0
    start, stop = domain
    view = f"0 0 {short(width)} {short(height)}"
    svg = ET.Element("svg", {"class": "chart bar", "viewBox": view, "aria-hidden": "true"})
    at = {position for position, _, _ in references}
    for tick in {start, 0.0, stop} | at:
        # A label that another would touch is left out; a reference is kept.
        if tick in at or all(abs(tick - other) / (stop - start) > 0.08 for other in at):
            x = pad + (tick - start) / (stop - start) * (width - 2 * pad)
            label(svg, x, height - 4, figure(tick), "middle", "strong" if tick in at else "")
    return markup(svg)


def share_bar(parts: Sequence[tuple[str, int]], *, title: str) -> Markup:
    """Counts as one stacked bar, left to right. Each part is (class, count)."""
    width, height = 160.0, 10.0
    total = sum(count for _, count in parts)
    svg = drawing(width, height, "shares", title, "")
    at = 0.0
    for kind, count in parts:
        if total and count:
            size = width * count / total
            node(svg, "rect", x=at, y=0, width=max(0.5, size - 1), height=height, rx=1.5, **{"class": kind})
            at += size
    return markup(svg)


def figure(value: float) -> str:
    """A number in at most about six characters: 0.342, 12.5, 5e-07, 12k."""
    size = abs(value)
    if value == 0:
        return "0"
    if size < 1e-3 or size >= 1e6:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}".replace("-", "\u2212")
    if size >= 10_000:
        text = f"{value / 1000:.0f}k"
    elif size >= 100:
        text = f"{value:,.0f}"
    else:
        text = f"{value:.3g}"
    return text.replace("-", "\u2212")


def _ticks(start: float, stop: float) -> list[float]:
    first = math.ceil(start * 4 - 1e-9)
    return [quarter / 4 for quarter in range(first, math.floor(stop * 4 + 1e-9) + 1)]


def _octave_ticks(ks: Sequence[int]) -> list[int]:
    return [k for k in ks if k & (k - 1) == 0]


def _thinned(ks: Sequence[int]) -> list[int]:
    """Indices of the ks to draw: evenly spread over the logarithmic axis, with every tick and the last."""
    if len(ks) <= _MOST_KS:
        return list(range(len(ks)))
    top = math.log2(ks[-1])
    wanted = {round(2 ** (top * i / (_MOST_KS - 1))) for i in range(_MOST_KS)}
    wanted |= {*_octave_ticks(ks), ks[-1]}
    return [index for index, k in enumerate(ks) if k in wanted]


def _bucketed(points: Sequence[tuple[int, float]]) -> list[tuple[float, float | None]]:
    size = max(1, math.ceil(len(points) / _MOST_POINTS))
    drawn: list[tuple[float, float | None]] = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        finite = [value for _, value in bucket if math.isfinite(value)]
        step = math.fsum(step for step, _ in bucket) / len(bucket)
        drawn.append((step, math.fsum(finite) / len(finite) if finite else None))
    return drawn
