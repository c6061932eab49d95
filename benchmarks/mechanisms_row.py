"""A row of `benchmarks/mechanisms.py`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    system: str
    source: str
    claim: str
    ours: str
    setting: str
    why: str
