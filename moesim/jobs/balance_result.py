"""The result of `balance`: every scheme's figures, and the verdict in words and flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any

from moesim.errors import plain
from moesim.figures import BALANCE_FIGURES, count, figure, text_table
from moesim.jobs.balance_points import Points
from moesim.jobs.result import Result
from moesim.planning.balancing.lineup import NONE, R
from moesim.planning.evaluate import Interval

if TYPE_CHECKING:
    import pandas as pd

    from moesim.choices import Phase
    from moesim.cost.step import StepModel
    from moesim.draw import Picture
    from moesim.planning.balancing.bench import Outcome
    from moesim.planning.balancing.service import Served
    from moesim.planning.worth import Worth

INTERVALS = ("against_none", "charged")


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One scheme. step_us: MoE time per step with stalls spread over all steps; against_none: the
    same as a share of doing nothing's, less 1, paired; charged: that, at the batch that the KV
    cache still holds. parts_us: of the mean step, by part; stalls and slowed_us per step.
    kv_bytes_less: on every GPU; kv_share: what is left of the KV cache, None where it is not known.
    pays_from_steps: interval from which moves are paid back, infinite where nothing is gained, None
    where nothing moves. switch_pays_from_steps: steps that pay back the move from a placement in
    use that was given, None where nothing is saved.
    """

    name: str
    about: str
    outcome: Outcome
    step_us: Interval
    against_none: Interval
    charged: Interval
    imbalance: Interval
    parts_us: Mapping[str, float]
    kv_bytes_less: float
    kv_share: float | None
    pays_from_steps: float | None
    switch_pays_from_steps: float | None
    num_steps: int

    @property
    def pays(self) -> bool:
        """Whether it is better than doing nothing beyond its interval."""
        return self.charged.high < 0

    def value(self, name: str) -> float:
        """A figure of BALANCE_FIGURES."""
        done = self.outcome
        found = {
            "stall_us_per_plan": done.stall_us / done.num_plans if done.num_plans else 0.0,
            "num_plans": float(done.num_plans),
            "moved_experts": done.moved_experts / self.num_steps,
            "kv_bytes_less": self.kv_bytes_less,
        }
        if name in found:
            return found[name]
        interval: Interval = getattr(self, name)
        return interval.value

    def costs(self) -> list[str]:
        """What it takes, in words."""
        said = []
        if self.value("stall_us_per_plan") >= 500:
            every = self.num_steps / self.outcome.num_plans
            stall = figure("stall_us_per_plan").text(self.value("stall_us_per_plan"))
            said.append(f"stalls {stall} ms every {every:,.0f} steps")
        if abs(self.kv_bytes_less) >= 5e6:
            more = "less" if self.kv_bytes_less > 0 else "more"
            size = figure("kv_bytes_less").text(abs(self.kv_bytes_less))
            less = f"{size} GB {more} KV cache per GPU"
            if self.kv_share is not None:
                less += f" ({100 * abs(1 - self.kv_share):.1f}% of it)"
            said.append(less)
        if self.outcome.switch_us >= 500 and self.switch_pays_from_steps is not None:
            took = figure("stall_us_per_plan").text(self.outcome.switch_us)
            said.append(
                f"moving there once stops serving for {took} ms, paid back after"
                f" {self.switch_pays_from_steps:,.0f} steps"
            )
        if self.outcome.note:
            said.append(self.outcome.note)
        return said

    def to_json(self) -> dict[str, Any]:
        done = self.outcome
        return {
            "about": self.about,
            "enable": done.enable,
            **{n: getattr(self, n).to_json() for n in ("step_us", *INTERVALS, "imbalance")},
            "parts_us": dict(self.parts_us),
            **{n: self.value(n) for n in BALANCE_FIGURES[4:]},
            "moved_bytes": done.moved_bytes / self.num_steps,
            "num_skipped": done.num_skipped,
            "switch_us": done.switch_us,
            "switch_pays_from_steps": self.switch_pays_from_steps,
            "kv_share": self.kv_share,
            "pays": self.pays,
            "pays_from_steps": None if self.pays_from_steps == inf else self.pays_from_steps,
            "note": done.note,
        }


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class BalanceResult(Result):
    """rows: the schemes, `none` first; charged_for_kv: whether the batch is taken to be bounded by
    the KV cache; redundant_experts: per layer, in the schemes that use them. stretches: of the log,
    as the course went. worth: of plans on domains that tuning lacks, None
    where the trace cannot tell. served: the requests under every scheme, where there are any.
    points: where balancing begins to pay, if asked. from_counts: no tokens, so no messages. stalls:
    what times of rearrangements rest on. defaults: what was left out, by name."""

    model: str
    cluster: str
    num_gpus: int
    phase: Phase
    batch_tokens: int
    num_steps: int
    num_judged: int
    num_requests: int
    stretches: tuple[str, ...]
    rows: tuple[Row, ...]
    step: StepModel
    worth: Worth | None
    served: Mapping[str, Served] | None
    points: Points | None
    charged_for_kv: bool
    redundant_experts: int
    defaults: dict[str, str]
    from_counts: bool = False
    stalls: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()

    @property
    def best(self) -> Row | None:
        """The scheme with the least time of those that beat doing nothing; None for none."""
        good = [row for row in self.rows if self.gain(row).high < 0]
        return min(good, key=lambda row: self.gain(row).value) if good else None

    def gain(self, row: Row) -> Interval:
        """What decides: change of the time per output token of the requests served, else of the MoE
        time."""
        if self.served is None:
            return row.charged
        if row.name not in self.served:
            return Interval(inf, inf, inf)
        return self.served[row.name].tpot

    @property
    def worth_it(self) -> bool:
        """Whether anything beats doing nothing."""
        return self.best is not None

    def line(self) -> str:
        return (
            f"{plain(self.model)} on {count(self.num_gpus, 'GPU')} of {self.cluster}:"
            f" {self.verdict()[0]}"
        )

    def words(self, row: Row) -> str:
        """What a scheme is worth and takes, in one line."""
        gain = self.gain(row)
        low, value, high = (100 * x for x in (gain.low, gain.value, gain.high))
        what = " TPOT" if self.served is not None else ""
        return ", ".join([f"{value:+.1f}%{what} ({low:+.1f} to {high:+.1f})", *row.costs()])

    def verdict(self) -> list[str]:
        """The answer, then what each engine's own balancer is worth at its defaults."""
        best = self.best
        if best is None:
            lines = ["leave balancing off: nothing beats doing nothing"]
        else:
            lines = [f"take {best.name}: {self.words(best)}", f"  {best.outcome.enable}"]
        for row in self.rows:
            if row.name.startswith("eplb-") and row.outcome.num_plans and row is not best:
                gain = self.gain(row)
                worse = gain.low > 0
                word = "on pays" if gain.high < 0 else "leave it off" if worse else "no difference"
                lines.append(f"{row.name}: {word}: {self.words(row)}")
            elif row.outcome.num_skipped and not row.outcome.num_plans:
                lines.append(f"{row.name}: makes no plan, its threshold is never missed")
        return lines

    def summary(self) -> str:
        lines = []
        if self.defaults:
            taken = "; ".join(f"{name}: {value}" for name, value in self.defaults.items())
            lines.append(f"defaults taken: {taken}")
        lines += [
            f"{plain(self.model)} on {count(self.num_gpus, 'GPU')} of {self.cluster}:"
            f" {self.num_steps:,} {self.phase} steps of {self.batch_tokens:,} tokens through"
            f" {count(len(self.stretches), 'stretch').replace('stretchs', 'stretches')} of the log",
            self._held_out(),
            self._table(),
            f"{R}: with {self.redundant_experts} redundant experts per layer",
            *self._service(),
            *self.verdict(),
            *self._break_even(),
            *(self.points.lines() if self.points is not None else ()),
            *(self.worth.lines() if self.worth is not None else ()),
            f"predicted times rest on {self.step.basis} figures: {'; '.join(self.step.notes)}",
            *(f"a rearrangement: {line}" for line in self.stalls),
        ]
        if self.charged_for_kv:
            lines.append(
                "charged: time per token at the batch that the KV cache still holds, as if it"
                " bounded the batch"
            )
        return "\n".join(lines)

    def _held_out(self) -> str:
        if self.from_counts:
            return (
                f"held-out: the later half, {count(self.num_judged, 'recorded step')}; schemes that"
                " re-plan see the steps before; 95% intervals over steps"
            )
        return (
            f"held-out: {count(self.num_requests, 'request')} that no scheme saw,"
            f" {self.num_judged:,} steps judged; 95% bootstrap intervals over requests"
        )

    def _table(self) -> str:
        shown = [figure(n) for n in BALANCE_FIGURES if n != "charged" or self.charged_for_kv]
        rows = []
        for row in self.rows:
            cells = [row.name]
            for known in shown:
                if known.name in INTERVALS:
                    found = getattr(row, known.name)
                    half = 100 * (found.high - found.low) / 2
                    cells.append(
                        "" if row.name == NONE else f"{100 * found.value:+.2f} ±{half:.2f}"
                    )
                elif known.name in BALANCE_FIGURES[4:] and not row.value(known.name):
                    cells.append("")
                else:
                    cells.append(known.text(row.value(known.name)))
            rows.append(cells)
        return text_table(["scheme", *(known.heading for known in shown)], rows)

    def _service(self) -> list[str]:
        if self.served is None:
            return []
        first = next(iter(self.served.values()))
        shown = [figure(name) for name in first.figures]
        rows = [
            [name, *(known.text(found.figures[known.name]) for known in shown)]
            for name, found in self.served.items()
        ]
        return [
            "the requests, served by the engine with data-parallel attention:",
            text_table(["scheme", *(known.heading for known in shown)], rows),
        ]

    def _break_even(self) -> list[str]:
        found = [row for row in self.rows if row.pays_from_steps is not None]
        if not found:
            return []
        steps = [(row.name, float(row.pays_from_steps or 0)) for row in found]
        said = "; ".join(f"{n} {'never' if s == inf else f'{s:,.0f}'}" for n, s in steps)
        return [f"moves are paid back from an interval of so many steps: {said}"]

    def to_json(self) -> dict[str, Any]:
        best = self.best
        return {
            "format": "moesim-balance",
            "version": 1,
            "model": self.model,
            "cluster": self.cluster,
            "num_gpus": self.num_gpus,
            "phase": self.phase,
            "batch_tokens": self.batch_tokens,
            "num_steps": self.num_steps,
            "num_judged": self.num_judged,
            "num_requests": self.num_requests,
            "stretches": list(self.stretches),
            "held_out": True,
            "basis": self.step.basis,
            "predictions": [*self.step.notes, *self.stalls],
            "from_counts": self.from_counts,
            "charged_for_kv": self.charged_for_kv,
            "redundant_experts": self.redundant_experts,
            "unseen": None if self.worth is None else self.worth.to_json(),
            "served": None
            if self.served is None
            else {
                name: {**s.figures, "ttft": s.ttft.to_json(), "tpot": s.tpot.to_json()}
                for name, s in self.served.items()
            },
            "break_even": None if self.points is None else self.points.to_json(),
            "best": None if best is None else best.name,
            "verdict": self.verdict(),
            "schemes": {row.name: row.to_json() for row in self.rows},
            "defaults": self.defaults,
            "notices": list(self.notices),
        }

    def to_frame(self) -> pd.DataFrame:
        """One row per scheme, its figures in base units."""
        import pandas as pd

        data = {row.name: {n: row.value(n) for n in BALANCE_FIGURES} for row in self.rows}
        return pd.DataFrame.from_dict(data, orient="index").rename_axis("scheme")

    def picture(self) -> Picture:
        from moesim.jobs.pictures import balance_picture

        return balance_picture(self)
