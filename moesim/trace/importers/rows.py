"""Which tokens of a request the rows of an engine's record are for.

A record of a request of P prompt and O output tokens has P + O - 1 rows: the last token was
sampled, but never run. Records with fewer rows are common: requests that were preempted or clipped
(the end is missing; vllm-project/vllm issues 39568 and 39917), and those that asked for a later
start (the beginning is missing). Nothing in the record tells which, so one reading is taken for
all, counted, and said.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.errors import FormatError
from moesim.trace.format import DECODE, PREFILL
from moesim.trace.importers.base import DAMAGED, ImportOptions, unknown_phases
from moesim.types import Array


@dataclass(slots=True)
class RowReader:
    """Positions and phases of the rows of one record after another; `report` says what was
    assumed. num_prompt, num_output: tokens, None where the record does not say. start: the
    position of the first row, where the record says it."""

    options: ImportOptions
    undated: int = 0
    short: int = 0
    missing: int = 0
    sliced: int = 0
    records: int = 0
    several: int = 0

    def place(
        self,
        rows: int,
        num_prompt: int | None,
        num_output: int | None,
        where: str,
        start: int | None = None,
    ) -> tuple[Array, Array]:
        """(positions [rows], phases [rows]). Raises FormatError for more rows than tokens."""
        self.records += 1
        if num_prompt is not None and num_output is None and rows < num_prompt - (start or 0):
            num_prompt = None  # a sum over several prompts, which says nothing of this one
        first = start or 0
        if num_prompt is not None and num_output is not None:
            total = num_prompt + num_output
            if first + rows > total:
                raise FormatError(
                    f"{where} has {rows} rows{f' from position {first}' * bool(first)}, but the"
                    f" request only {total} tokens",
                    DAMAGED,
                )
            lacking = total - 1 - rows - first
            if lacking > 0:
                self.short += 1
                self.missing += lacking
                self.sliced += start is None and rows < num_prompt and num_output > 0
                if start is None and self.options.short_records == "last":
                    first = lacking
        positions = np.arange(first, first + rows)
        if num_prompt is None:
            self.undated += 1
            return positions, unknown_phases(rows, self.options)
        return positions, np.where(positions < num_prompt, PREFILL, DECODE)

    def report(self) -> None:
        """One notice for each thing that was assumed."""
        notify = self.options.notify
        if self.several:
            notify(
                f"{self.several} responses hold several choices: each choice is a request of its"
                " own, with the prompt's tokens, and its number of output tokens is not known"
            )
        if self.undated:
            notify(
                f"{self.undated} requests do not say how long their prompt was: all their tokens"
                f" count as {self.options.phase}, from position 0 (`phase` changes the former)"
            )
        if self.short:
            last = self.options.short_records == "last"
            taken = "last ones (the beginning is missing)"
            taken = taken if last else "first ones (the end is missing)"
            other = "first" if last else "last"
            slices = (
                f" {self.sliced} of them have fewer rows than prompt tokens, as slices from a later"
                " start have;"
                if self.sliced
                else ""
            )
            notify(
                f"{self.short} of {self.records} records are short, by {self.missing} rows in all,"
                f" as of preempted or clipped requests: their rows are taken as the {taken};"
                f"{slices} `short_records` {other} reads them the other way"
            )
