"""Where balancing begins to pay: the comparison once more at other batches and paces of drift."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from moesim.planning.evaluate import NUM_RESAMPLES

if TYPE_CHECKING:
    from moesim.jobs.balance_result import BalanceResult, Row

BATCH_FACTORS = (1 / 16, 1 / 4, 4, 16)
PACE_FACTORS = (1 / 16, 1 / 4, 4)
MAX_BATCH_TOKENS = 1 << 18
LEFT_OUT = ("plan-balance", "-nearest", "eplb-asked")
Again = Callable[[int, int, Sequence[str]], "Sequence[Row]"]
"""Batch tokens, steps, names of schemes to the rows of the comparison with these."""


@dataclass(frozen=True, slots=True)
class Points:
    """Gains (change against doing nothing, as a share) of every scheme by batch_tokens and by the
    steps in which the log is gone through once: {scheme: {x: gain}}, in order of x."""

    by_batch: Mapping[str, Mapping[int, float]]
    by_steps: Mapping[str, Mapping[int, float]]

    def to_json(self) -> dict[str, dict[str, dict[str, float]]]:
        both = {"batch_tokens": self.by_batch, "steps": self.by_steps}
        return {
            axis: {name: {str(x): gain for x, gain in gains.items()} for name, gains in by.items()}
            for axis, by in both.items()
        }

    def lines(self) -> list[str]:
        """For people: where each scheme begins, or ceases, to pay."""
        return [
            *(_said(n, f, "tokens per step") for n, f in self.by_batch.items()),
            *(_said(n, f, "steps per pass of the log") for n, f in self.by_steps.items()),
        ]


def break_even(result: BalanceResult, again: Again) -> Points:
    """Run the comparison at BATCH_FACTORS times the tokens, and at PACE_FACTORS times the steps."""
    kept = [
        row.name
        for row in result.rows[1:]
        if not any(row.name.startswith(x) or row.name.endswith(x) for x in LEFT_OUT)
    ]
    moving = [row.name for row in result.rows if row.outcome.num_plans and row.name in kept]
    by_batch = {result.batch_tokens: tuple(result.rows)}
    for factor in BATCH_FACTORS:
        tokens = round(result.batch_tokens * factor)
        if result.num_gpus <= tokens <= MAX_BATCH_TOKENS:
            by_batch[tokens] = tuple(again(tokens, result.num_steps, kept))
    by_steps = {result.num_steps: tuple(result.rows)}
    for factor in PACE_FACTORS:
        steps = round(result.num_steps * factor)
        if moving and steps >= 2 * NUM_RESAMPLES:
            by_steps[steps] = tuple(again(result.batch_tokens, steps, moving))
    return Points(_gains(by_batch, kept), _gains(by_steps, moving))


def crossings(gains: Mapping[int, float]) -> list[tuple[float, bool]]:
    """(x, whether it pays beyond) wherever the gain changes sign, between points by logarithm."""
    out = []
    points = sorted(gains.items())
    for (a, low), (b, high) in pairwise(points):
        if (low < 0) != (high < 0):
            share = low / (low - high)
            out.append((math.exp(math.log(a) + share * (math.log(b) - math.log(a))), high < 0))
    return out


def _gains(
    results: Mapping[int, Sequence[Row]], names: Sequence[str]
) -> dict[str, dict[int, float]]:
    return {
        name: {
            x: next(row.charged.value for row in results[x] if row.name == name)
            for x in sorted(results)
        }
        for name in names
    }


def _said(name: str, gains: Mapping[int, float], unit: str) -> str:
    shown = ", ".join(f"{x:,}: {100 * gain:+.1f}%" for x, gain in gains.items())
    found = crossings(gains)
    if found:
        where = "; ".join(f"{'pays from' if pays else 'pays up to'} {x:,.0f}" for x, pays in found)
    else:
        always = min(gains.values()) < 0
        return f"{name}: pays at {'all' if always else 'none'} of these {unit} ({shown})"
    return f"{name}: {where} {unit} ({shown})"
