"""Drawing in SVG by hand: elements, scales, ticks, and text that fits.

Colours are classes (`s0`.. for series, `q0`.. and `w0`.. for heat maps) that the style sheet gives
values to, so that the same drawing serves a light page, a dark page and paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

FONT = 12
CHAR = 0.56
"""Mean width of a character over the font size, in the sans-serif fonts that pages are shown in."""
NUM_SERIES = 8
DASHES = ("", "6 3", "2 3", "8 3 2 3", "4 2", "1 2", "10 4", "3 3")


def element(name: str, *children: Markup | str, **attributes: object) -> Markup:
    """An element with escaped attributes and children. `class_` is class, `_` in names is `-`."""
    text = Markup("").join(
        Markup(' {}="{}"').format(
            Markup(key.rstrip("_").replace("_", "-")),
            number(value) if isinstance(value, float) else value,
        )
        for key, value in attributes.items()
        if value is not None and value != ""
    )
    body = Markup("").join(escape(child) for child in children)
    if not children:
        return Markup("<{0}{1}/>").format(Markup(name), text)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), text, body)


def number(value: float) -> str:
    """A coordinate, to a hundredth."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value else "0"


def label(
    x: float, y: float, text: str, anchor: str = "start", class_: str = "", size: float = FONT
) -> Markup:
    """Text at a place, its vertical middle at `y`."""
    return element(
        "text",
        text,
        x=float(x),
        y=float(y + size * 0.35),
        text_anchor=None if anchor == "start" else anchor,
        class_=class_,
        font_size=None if size == FONT else number(size),
    )


def hint(text: str) -> Markup:
    """What a pointer at the enclosing element shows."""
    return element("title", text)


def drawing(title: str, description: str, width: float, height: float, *body: Markup) -> Markup:
    """The SVG element, with its name and description for those who cannot see it."""
    return element(
        "svg",
        element("title", title),
        element("desc", description),
        *body,
        viewBox=f"0 0 {number(width)} {number(height)}",
        role="img",
        class_="chart",
    )


def text_width(text: str, size: float = FONT) -> float:
    """About how wide `text` is drawn."""
    return len(text) * CHAR * size


def fit(text: str, width: float, size: float = FONT) -> str:
    """`text`, shortened with an ellipsis in the middle where it is wider than `width`."""
    most = max(3, int(width / (CHAR * size)))
    if len(text) <= most:
        return text
    head = (most - 1 + 1) // 2
    return text[:head] + "…" + text[len(text) - (most - 1 - head) :]


def significant(value: float, digits: int = 4) -> str:
    """A figure for readers: so many significant digits, thousands separated; whole numbers below a
    million in full."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "–"
    if value == int(value) and abs(value) < 1e6:
        return f"{value:,.0f}"
    power = math.floor(math.log10(abs(value)))
    if power < -4:
        return f"{value:.{digits - 1}g}"
    rounded = round(value, digits - 1 - power)
    power = math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(0, digits - 1 - power)}f}"


def minus(text: str) -> str:
    """`text` with a typographic minus sign."""
    return text.replace("-", "−")


@dataclass(frozen=True, slots=True)
class Scale:
    """From data to pixels, linear or logarithmic; `low` goes to `start`, `high` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        if self.log:
            low, high = math.log10(self.low), math.log10(self.high)
            at = math.log10(max(value, self.low * 1e-6))
        else:
            low, high, at = self.low, self.high, value
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values between low and high."""
        if self.log:
            return log_ticks(self.low, self.high, most)
        return linear_ticks(self.low, self.high, most)


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most about `most` multiples of 1, 2, 2.5 or 5 times a power of ten within low..high."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Powers of ten within low..high, with 2 and 5 times them where few powers are."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for steps in ((1, 2, 5), (1, 3), (1,)):
        found = [
            m * 10.0**p
            for p in range(first, last + 1)
            for m in steps
            if low * (1 - 1e-9) <= m * 10.0**p <= high * (1 + 1e-9)
        ]
        if len(found) <= most:
            return found or [low, high]
    return found[:: math.ceil(len(found) / most)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """The ticks as text, all with as many decimals as they need to differ."""
    gaps = [abs(b - a) for a, b in zip(values, list(values)[1:], strict=False) if b != a]
    if not gaps:
        return [significant(v, 3) for v in values]
    most = max(abs(v) for v in values)
    if most >= 1e5 or (max(gaps) > 3 * min(gaps) and most >= 1e3 * min(gaps)):
        brief = [short(v) for v in values]
        if len(set(brief)) == len(brief):
            return brief
    places = max(0, -math.floor(math.log10(min(gaps)) + 1e-9))
    if any(abs(v * 10**places - round(v * 10**places)) > 1e-6 for v in values):
        places += 1
    return [minus(f"{v:,.{places}f}") for v in values]


def short(value: float) -> str:
    """A tick of a wide range: 200k, 1.5M, 0.01."""
    for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return minus(f"{value / factor:.4g}{suffix}")
    return minus(f"{value:.4g}")


def padded(low: float, high: float, share: float = 0.06) -> tuple[float, float]:
    """The range a little wider, never empty."""
    span = high - low
    if span <= 0:
        span = abs(high) or 1.0
    return low - share * span, high + share * span
