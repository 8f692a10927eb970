"""The drawings: well-formed, escaped, and inside their frame whatever the numbers."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree as ET

import pytest
from markupsafe import Markup

from medbridge.report.charts import (
    Reached,
    Series,
    figure,
    interval_bar,
    pass_at_k_chart,
    scale,
    share_bar,
    training_chart,
)

HOSTILE = '<script>"&\x00\u202e'


def numbers_inside(markup: Markup) -> ET.Element:
    """Parse a drawing and check that no mark lies outside its frame by more than a marker's size."""
    svg = ET.fromstring(markup)
    _, _, width, height = map(float, svg.attrib["viewBox"].split())
    for node in svg.iter():
        for name, value in node.attrib.items():
            limit = width if name in ("x", "x1", "x2", "cx") else height if name in ("y", "y1", "y2", "cy") else None
            if limit is not None:
                assert -8 <= float(value) <= limit + 8, (node.tag, name, value)
            assert "nan" not in value and "inf" not in value
    return svg


@pytest.mark.parametrize("value", [None, -3.0, 0.0, 0.4, 1.0, 7.0])
@pytest.mark.parametrize("ends", [(None, None), (-9.0, 9.0), (0.3, 0.3)])
@pytest.mark.parametrize("style", ["before", "after", "baseline"])
def test_an_interval_bar_stays_in_its_frame(
    value: float | None, ends: tuple[float | None, float | None], style: str
) -> None:
    bar = interval_bar(
        value, *ends, title=HOSTILE, style=style, references=[(0.5, "threshold", HOSTILE), (9.0, "x", "")]
    )
    svg = numbers_inside(bar)
    assert svg.findtext("title") == '<script>"&\ufffd\ufffd'
    assert len(svg.findall("line[@class='threshold']")) == 1 and not svg.findall("line[@class='x']")


def test_the_scale_leaves_out_labels_that_would_touch() -> None:
    texts = ["".join(node.itertext()) for node in ET.fromstring(scale((-0.25, 1.0), [(0.05, "threshold", "")]))]
    assert sorted(texts) == ["0.05", "1", "\u22120.25"]


@pytest.mark.parametrize("samples", [0, 1, 2, 3, 16, 300])
def test_curves_of_any_length(samples: int) -> None:
    ks = list(range(1, samples + 1))
    value: list[float | None] = [1 - 0.6**k for k in ks]
    series = [
        Series("Base", "before", [None] * samples, [None] * samples, [None] * samples, None),
        Series(
            HOSTILE,
            "after",
            value,
            [v and v - 0.1 for v in value],
            [v and v + 0.1 for v in value],
            (0.4, 0.2, 0.9),
        ),
    ]
    reached = Reached([0.4] * samples, [0.3] * samples, [0.5] * samples, 0.25)
    drawn = pass_at_k_chart(
        ks, series, [1 - 0.75**k for k in ks], gate_k=4, reached=reached, title=HOSTILE, description=HOSTILE
    )
    svg = numbers_inside(drawn)
    squares = svg.findall("g[@class='reached']/rect/title")
    assert [node.text for node in squares] == ["Reached at k = 4: 0.40, by guessing 0.25"] * (samples >= 4)
    labels = [node.text for node in svg.iter("text")]
    on_the_axis = labels[labels.index("Acc@1") :]
    assert all((str(k) in on_the_axis) == (k <= samples) for k in (1, 2, 4, 8, 16, 32, 256))
    assert ("gate k = 4" in labels) == (samples >= 4)
    assert len(drawn) < 12_000


@pytest.mark.parametrize("gate_k", [None, 2, 9])
@pytest.mark.parametrize("level", [None, -2.0, 0.25, 3.0])
def test_what_the_gate_reads_stays_in_the_frame(gate_k: int | None, level: float | None) -> None:
    reached = Reached([level, level], [None, level], [None, level], 0.25)
    svg = numbers_inside(
        pass_at_k_chart([1, 2], [], [0.25, 0.4], gate_k=gate_k, reached=reached, title="", description="")
    )
    lines = svg.findall("g[@class='reached']/line[@class='chance']")
    assert len(lines) == (level is not None)
    assert len(svg.findall("g[@class='reached']/rect")) == (level is not None and gate_k == 2)


@pytest.mark.parametrize(
    "values",
    [[], [math.nan], [1.0], [2.0, 2.0], [0.0, math.nan, 1.0, math.inf, 3.0], [1e-9, 2e-9], list(range(5000))],
    ids=["none", "nan", "one", "flat", "gaps", "tiny", "long"],
)
def test_training_curves_of_any_series(values: list[float]) -> None:
    drawn = training_chart([(step, float(value)) for step, value in enumerate(values, 1)], title=HOSTILE)
    svg = numbers_inside(drawn)
    assert len(drawn) < 5_000
    if values == [0.0, math.nan, 1.0, math.inf, 3.0]:
        assert len(svg.findall(".//circle")) == 4  # three lone points and the last value's marker


def test_a_gap_breaks_the_line() -> None:
    values = [1.0, 2.0, math.nan, 3.0, 4.0]
    svg = ET.fromstring(training_chart(list(enumerate(values, 1)), title="loss"))
    assert len(svg.findall(".//path")) == 2


def test_shares_fill_the_bar() -> None:
    svg = numbers_inside(share_bar([("correct", 3), ("wrong", 0), ("abstain", 1)], title="x"))
    assert [round(float(node.attrib["width"])) for node in svg.findall("rect")] == [119, 39]
    assert not ET.fromstring(share_bar([("correct", 0)], title="x")).findall("rect")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.3421, "0.342"),
        (12.51, "12.5"),
        (5e-7, "5e\u22127"),
        (12345, "12k"),
        (-0.5, "\u22120.5"),
        (250, "250"),
    ],
)
def test_figures_are_short(value: float, text: str) -> None:
    assert figure(value) == text
    assert re.fullmatch(r"[\d.,ek\u2212]+", figure(value))
