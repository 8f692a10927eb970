"""Elements of an SVG drawing. Built as XML, so that every text is escaped by construction."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree as ET

from markupsafe import Markup

from medbridge.report.text import clean


def drawing(width: float, height: float, kind: str, title: str, description: str) -> ET.Element:
    """A drawing of a kind (a class of the style sheet), with what screen readers say."""
    view = f"0 0 {short(width)} {short(height)}"
    svg = ET.Element("svg", {"class": f"chart {kind}", "viewBox": view, "role": "img", "focusable": "false"})
    text_node(svg, "title", title)
    if description:
        text_node(svg, "desc", description)
    return svg


def node(parent: ET.Element, tag: str, **attributes: float | str) -> ET.Element:
    """Any element."""
    texts = {name: value if isinstance(value, str) else short(value) for name, value in attributes.items()}
    return ET.SubElement(parent, tag, texts)


def line(parent: ET.Element, x1: float, y1: float, x2: float, y2: float, kind: str) -> ET.Element:
    """A straight line of a class."""
    return node(parent, "line", x1=x1, y1=y1, x2=x2, y2=y2, **{"class": kind})


def label(parent: ET.Element, x: float, y: float, text: str, anchor: str, kind: str = "") -> None:
    """A text at a point; `anchor` is start, middle or end."""
    attributes = {"class": kind} if kind else {}
    written = node(parent, "text", x=x, y=y, **{"text-anchor": anchor}, **attributes)
    written.text = clean(text)


def text_node(parent: ET.Element, tag: str, text: str) -> None:
    """A child that holds a text, such as a title."""
    ET.SubElement(parent, tag).text = clean(text)


def path_data(points: Sequence[tuple[float, float]]) -> str:
    """Points as the `d` of an open path."""
    return "M" + "L".join(f"{short(x)} {short(y)}" for x, y in points)


def short(value: float) -> str:
    """A coordinate with at most one decimal."""
    return f"{value:.1f}".removesuffix(".0")


def markup(svg: ET.Element) -> Markup:
    """A finished drawing, safe to put into a page."""
    return Markup(ET.tostring(svg, encoding="unicode", short_empty_elements=True))
