"""Slow, readable versions of the simulator's compiled parts; tests hold each against the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction


def max_min_reference(
    flows: Sequence[Mapping[int, Fraction]], limits: Sequence[Fraction], room: Sequence[Fraction]
) -> list[Fraction]:
    """`maxmin.max_min_rates` in exact arithmetic; a flow maps links to its load on them."""
    rates: list[Fraction | None] = [None] * len(flows)
    while any(rate is None for rate in rates):
        rising = [f for f, rate in enumerate(rates) if rate is None]
        fills_at = {}
        for link, capacity in enumerate(room):
            demand = sum((flows[f].get(link, Fraction(0)) for f in rising), Fraction(0))
            taken = sum(
                (flow.get(link, Fraction(0)) * rate)
                for flow, rate in zip(flows, rates, strict=True)
                if rate is not None
            )
            if demand > 0:
                fills_at[link] = (capacity - taken) / demand
        level = min([*fills_at.values(), *(limits[f] for f in rising)])
        full = {link for link, at in fills_at.items() if at == level}
        for f in rising:
            if limits[f] == level or any(flows[f].get(link, 0) > 0 for link in full):
                rates[f] = level
    return [rate for rate in rates if rate is not None]
