"""Figures as readers see them: significant digits, percentages, a minus sign."""

from __future__ import annotations

import math


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


def percent(value: float, places: int = 1) -> str:
    """A share as a percentage."""
    return minus(f"{100 * value:.{places}f}%") if math.isfinite(value) else "–"


def minus(text: str) -> str:
    """`text` with a typographic minus sign."""
    return text.replace("-", "−")
