"""Pictures within the page: static SVG of the page's own making, in its colours and type.

What `Picture.svg` gives is parsed and only what draws is kept: elements and attributes of the
lists below, texts and names as texts, never as markup. So nothing of it can load, link, or run.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable

from markupsafe import Markup

from moesim.draw.picture import WIDTH, Picture

ELEMENTS = ("svg", "g", "path", "line", "rect", "text", "circle")
ATTRIBUTES = (
    *("d", "x", "y", "x1", "x2", "y1", "y2", "width", "height", "r", "viewBox", "transform"),
    *("fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "stroke-opacity"),
    *("opacity", "text-anchor", "font-size", "font-weight", "stroke-linejoin", "stroke-linecap"),
)
DEFAULTS = {
    "opacity": "1",
    "font-weight": "normal",
    "stroke-width": "1",
    "fill-opacity": "1",
    "transform": "translate(0,0)",
    "text-anchor": "start",
    "stroke-opacity": "1",
}
MERGED_FROM = 1000
"""Paths without hints from which those of one colour become one."""
NUMBER = re.compile(r"-?\d+\.\d{2,}(?:e-?\d+)?")


def inline(picture: Picture, width: int = WIDTH) -> Markup:
    """The picture as an element of the page, with its name and description."""
    source = ET.fromstring(picture.svg(titled=False, width=width))
    kept = _kept(source)
    assert kept is not None
    for name in ("width", "height"):
        kept.attrib.pop(name, None)
    kept.attrib |= {"role": "img", "class": "chart"}
    for i, (tag, text) in enumerate((("title", picture.title), ("desc", picture.description))):
        element = ET.Element(tag)
        element.text = "".join(ch if ch.isprintable() else " " for ch in text)
        kept.insert(i, element)
    for parent in list(kept.iter()):
        _merge(parent)
    return Markup(ET.tostring(kept, encoding="unicode"))


def _kept(source: ET.Element) -> ET.Element | None:
    """The element with what is kept of it; None where nothing would be drawn."""
    tag = source.tag.rpartition("}")[2]
    if tag not in ELEMENTS or source.get("display") == "none":
        return None
    element = ET.Element(tag)
    for name in ATTRIBUTES:
        value = source.get(name)
        if value is not None and value != DEFAULTS.get(name):
            element.set(name, _short(value.removesuffix("px")))
    children = [child for child in map(_kept, source) if child is not None]
    if tag == "g" and not children:
        return None
    if tag == "path" and (not element.get("d") or not _painted(element)):
        return None
    if tag == "rect" and element.get("fill") == "#ffffff" and source.get("width") is not None:
        return None
    if tag == "g" and not element.attrib and len(children) == 1:
        return children[0]
    if tag == "text":
        element.text = source.text or ""
    hint = source.get("aria-label")
    if hint and source.get("role") == "graphics-symbol" and tag in ("path", "text", "line", "rect"):
        element.set("class", "mark")
        title = ET.SubElement(element, "title")
        title.text = hint
    element.extend(children)
    return element


def _painted(element: ET.Element) -> bool:
    fill, stroke = element.get("fill"), element.get("stroke")
    return not (fill in (None, "none", "transparent") and stroke in (None, "none"))


def _merge(parent: ET.Element) -> None:
    """Cells of one colour as one path: small for maps of many."""
    bare = [c for c in parent if c.tag == "path" and not len(c)]
    if len(bare) < MERGED_FROM:
        return
    by_colour: dict[str, ET.Element] = {}
    for child in bare:
        first = by_colour.setdefault(str(child.get("fill")), child)
        if first is not child:
            first.set("d", str(first.get("d")) + str(child.get("d")))
            parent.remove(child)
    for path in by_colour.values():
        path.set("class", "mark")


def _short(value: str) -> str:
    """Coordinates to a hundredth."""
    return NUMBER.sub(lambda m: f"{float(m.group()):.2f}".rstrip("0").rstrip("."), value)


def dark_style(pairs: Iterable[tuple[str, str]]) -> str:
    """Rules that give every colour of a picture its dark one, where a page is dark."""
    rules = "".join(
        f".chart [{kind}='{light}']{{{kind}:{dark}}}\n"
        for light, dark in pairs
        for kind in ("fill", "stroke")
    )
    return f"@media screen and (prefers-color-scheme: dark) {{\n{rules}}}\n"
