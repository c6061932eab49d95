"""Collects calibration rows and keeps to the time limit."""

from __future__ import annotations

import time
from typing import Any

from moesim.replay.process import Context
from moesim.replay.timing import Body, slowest, time_calls
from moesim.types import FloatArray

DIGITS = 3


class Recorder:
    """Rows by table. `tables[name]` is a list of dicts; `us`, `p10_us` and `p90_us` are the median
    and spread of the slowest rank, in microseconds a call."""

    def __init__(
        self, ctx: Context, modes: tuple[str, ...], budget_s: float, deadline: float
    ) -> None:
        self.ctx, self.modes = ctx, modes
        self.tables: dict[str, list[dict[str, Any]]] = {}
        self._budget_s, self._deadline = budget_s, deadline
        self._skipped = 0

    def time(
        self,
        table: str,
        row: dict[str, Any],
        body: Body,
        *,
        per_round: int = 10,
        modes: tuple[str, ...] | None = None,
        less_us: float = 0.0,
    ) -> None:
        """Time `body` in every mode and add a row each; collective. Past the deadline the case is
        counted as skipped instead. `less_us`: what of it is not to be counted."""
        for mode in self.modes if modes is None else modes:
            if not self.ctx.agree(time.monotonic() < self._deadline):
                self._skipped += 1
                continue
            self.ctx.beat(f"calibrating {table} {row}")
            samples = time_calls(
                self.ctx, body, mode=mode, per_round=per_round, budget_s=self._budget_s
            )
            noted = {**row, "mode": mode} | ({"less_us": round(less_us, DIGITS)} if less_us else {})
            self.add(table, noted, samples - less_us)

    def median_us(self, body: Body, *, per_round: int = 10) -> float:
        """Median of the slowest rank in the first mode, adding no row; collective. NaN past the
        deadline."""
        if not self.ctx.agree(time.monotonic() < self._deadline):
            return float("nan")
        samples = time_calls(
            self.ctx, body, mode=self.modes[0], per_round=per_round, budget_s=self._budget_s
        )
        return slowest(self.ctx, samples)[0]

    def add(self, table: str, row: dict[str, Any], samples: FloatArray) -> None:
        """Add a row from this rank's samples; collective."""
        middle, low, high = (round(x, DIGITS) for x in slowest(self.ctx, samples))
        timed = {**row, "us": middle, "p10_us": low, "p90_us": high, "rounds": len(samples)}
        self.tables.setdefault(table, []).append(timed)

    def value(self, table: str, row: dict[str, Any], us: float) -> None:
        """Add a row with a single figure, the slowest rank's; collective."""
        self.tables.setdefault(table, []).append({**row, "us": round(self.ctx.max(us), DIGITS)})

    def note_if_cut(self, section: str, notes: list[str]) -> None:
        """Say how many cases of the section the time limit cost, if any."""
        if self._skipped:
            notes.append(f"time limit: {self._skipped} cases of {section} were not measured")
            self._skipped = 0
