"""A picture: one Vega-Lite specification, for files, pages and notebooks alike."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from moesim.draw.colours import AXIS, GRID, PAPER, SOFT, TEXT
from moesim.errors import InputError
from moesim.files import atomic_write

Spec = dict[str, Any]
SUFFIXES = (".png", ".svg", ".pdf")
WIDTH = 360
"""Of a picture alone: what a phone shows nearly as it is."""
PANEL = 330
"""Of the data area of a picture among others in a file."""
MAX_TEXT = 160
FONT = "system-ui, Liberation Sans, DejaVu Sans, Arial, sans-serif"
_CHANNELS = ("color", "shape", "strokeDash")
MIME = "application/vnd.vegalite.v5+json"
CONFIG: Spec = {
    "background": PAPER,
    "font": FONT,
    "padding": 4,
    "view": {"stroke": None},
    "title": {"anchor": "start", "color": TEXT, "fontSize": 13, "fontWeight": 600, "offset": 8}
    | {"frame": "group"}
    | {"subtitleColor": SOFT, "subtitleFontSize": 12},
    "axis": {
        "labelColor": SOFT,
        "titleColor": SOFT,
        "labelFontSize": 11,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "gridColor": GRID,
        "domainColor": AXIS,
        "ticks": False,
        "labelPadding": 5,
        "labelOverlap": "parity",
        "labelLimit": 150,
    },
    "axisX": {"titleAnchor": "end"},
    "axisY": {
        "domain": False,
        "titleAngle": 0,
        "titleAlign": "left",
        "titleBaseline": "bottom",
        "titleX": 0,
        "titleY": -7,
    },
    "legend": {
        "orient": "top",
        "title": None,
        "labelColor": TEXT,
        "titleColor": SOFT,
        "labelFontSize": 12,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "labelLimit": WIDTH - 40,
        "titleLimit": WIDTH - 30,
        "rowPadding": 3,
        "columnPadding": 14,
        "offset": 8,
    },
    "text": {"color": TEXT, "fontSize": 12},
    "rule": {"color": TEXT},
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A titled Vega-Lite view; `altair.Chart.from_dict(picture.specification())` goes on with it.

    `description` says in words what is drawn, for those who cannot see it.
    """

    title: str
    view: Spec = field(repr=False)
    description: str = field(default="", repr=False)

    def specification(self, *, titled: bool = True, width: int | None = None) -> Spec:
        """The whole specification. With `width` that of the whole picture, axes included."""
        spec: Spec = {"$schema": "https://vega.github.io/schema/vega-lite/v5.json"}
        spec |= {"config": CONFIG, "width": PANEL, **self.view}
        if width is not None:
            spec |= {"width": width, "autosize": {"type": "fit-x", "contains": "padding"}}
        if titled:
            spec["title"] = self.view.get("title", self.title)
        found: Spec = _clean(spec)
        return found

    def svg(self, *, titled: bool = True, width: int | None = None) -> str:
        """The picture as SVG, its texts as text, loading nothing."""
        import vl_convert

        spec = self.specification(titled=titled, width=width)
        return str(vl_convert.vegalite_to_svg(spec, allowed_base_urls=[]))

    def save(self, path: str | PathLike[str]) -> None:
        """Write the picture; the suffix gives the format. The same picture gives the same bytes as
        .svg and .png. Raises InputError for another suffix or a place that cannot be written."""
        save(self, path)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> Spec:
        return {
            MIME: self.specification(),
            "image/svg+xml": self.svg(),
            "text/plain": f"Picture({self.title!r})",
        }


def poster(title: str, rows: Sequence[Sequence[Picture]], about: str = "") -> Picture:
    """Pictures side by side, row below row, under one title; `about` is a line below it."""
    lines = []
    for row in rows:
        views = [{"width": PANEL, **p.view, "title": p.title} for p in row]
        lines.append({"hconcat": views, "spacing": 34} if len(views) > 1 else views[0])
    view: Spec = {
        "title": {"text": title, "fontSize": 15, "offset": 16}
        | ({"subtitle": about} if about else {}),
        "vconcat": lines,
        "spacing": 26,
        "resolve": {"scale": dict.fromkeys(_CHANNELS, "independent")},
    }
    for line in lines:
        if "hconcat" in line:
            line["resolve"] = view["resolve"]
    return Picture(title, view, about)


def check_target(path: str | PathLike[str] | None) -> None:
    """Refuse, before the work, a place where `save` could not write. None is no place, and fine."""
    if path is None:
        return
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise InputError(f"cannot plot to {target.name}", "end the name in .png, .svg or .pdf")
    if target.is_dir():
        raise InputError(f"cannot write {target}: it is a directory", "name a file")
    if not target.resolve().parent.is_dir():
        raise InputError(
            f"cannot write {target}: there is no folder {target.parent}",
            "name a file in a folder that exists",
        )


def save(picture: Picture, path: str | PathLike[str]) -> None:
    """Write `picture` as PNG, SVG or PDF, by the suffix of `path`."""
    import vl_convert

    check_target(path)
    suffix, drawn = Path(path).suffix.lower(), picture.svg()
    if suffix == ".png":
        content = _packed(vl_convert.svg_to_png(drawn, scale=2))
    elif suffix == ".pdf":
        content = vl_convert.svg_to_pdf(drawn)
    else:
        content = drawn.encode()
    atomic_write(path, content)


def _packed(png: bytes) -> bytes:
    """The same PNG deflated well: a fifth of the bytes of what the renderer's quick way gives."""
    chunks, at = [], 8
    while at < len(png):
        length, kind = struct.unpack(">I4s", png[at : at + 8])
        chunks.append((kind, png[at + 8 : at + 8 + length]))
        at += 12 + length
    pixels = zlib.decompress(b"".join(body for kind, body in chunks if kind == b"IDAT"))
    kept = [(kind, body) for kind, body in chunks if kind != b"IDAT"]
    kept.insert(-1, (b"IDAT", zlib.compress(pixels, 9)))
    return png[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in kept
    )


def _clean(value: Any) -> Any:
    """`value` without what SVG cannot hold: control characters and halves of characters; texts of
    more than MAX_TEXT characters, which nobody could read, are cut."""
    if isinstance(value, str):
        text = "".join(ch if ch.isprintable() else " " for ch in value)
        return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"
    if isinstance(value, dict):
        return {k: item if k == "labelExpr" else _clean(item) for k, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value
