"""The result of `plan`: the plan, its rivals, and what is said of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesim.errors import plain
from moesim.figures import GOALS, PLACEMENT_FIGURES, count, figure, text_table
from moesim.jobs.result import Result
from moesim.placement import Plan
from moesim.planning.evaluate import Interval, Measured, Sample

if TYPE_CHECKING:
    import pandas as pd

    from moesim.caching.group import GroupPlan
    from moesim.cost.step import StepModel
    from moesim.draw import Picture
    from moesim.solvers.base import Solution

BETWEEN_NODES = ("node_fan_out", "inter_node_bytes")
PARTS_OF_STEP = ("dispatch_us", "compute_us", "combine_us")


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """A solved and evaluated placement."""

    name: str
    solution: Solution
    measured: Measured
    figures: Mapping[str, Interval]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class PlanResult(Result):
    """The plan, its rivals, and what was assumed on the way.

    chosen: the plan's candidate; reference: EPLB's, or greedy's with unequal slots. defaults: what
    was left out of the request, by name, as text. notices: what the user should know. improvement:
    chosen minus reference of each figure, paired. rows: further rows of text, by label and
    candidate; lines: what robustness or a move is worth. judged_on: what the figures are from.
    cached: what every GPU keeps in memory, with offloading.
    """

    plan: Plan
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    reference: Candidate
    sample: Sample
    step: StepModel | None
    defaults: dict[str, str]
    notices: tuple[str, ...]
    improvement: Mapping[str, Interval]
    judged_on: str
    bound_kind: str = ""
    rows: tuple[tuple[str, dict[str, str]], ...] = ()
    lines: tuple[str, ...] = ()
    cached: GroupPlan | None = None

    @property
    def placement(self) -> Any:
        """The plan's placement."""
        return self.plan.placement

    def line(self) -> str:
        placement = self.plan.placement
        if self.cached is not None and placement.num_gpus == 1:
            return f"{plain(self.plan.model) or 'unnamed model'}: {self._cache_lines()[0]}"
        said = (
            f"{plain(self.plan.model) or 'unnamed model'} on {count(placement.num_gpus, 'GPU')},"
            f" {placement.num_slots} slots per layer, by {self.plan.solver}"
        )
        return "; ".join([said, *self.verdict()[:1]])

    def verdict(self) -> list[str]:
        """Lines: the objective's figure against the reference's, paired; and what it cost."""
        name = GOALS[self.plan.objective]
        if self.reference is self.chosen or name not in self.improvement:
            return []
        low, value, high = self._against(name)
        goal = figure(name)
        lines = [
            f"{self.chosen.name} against {self.reference.name}: {goal.label} {value:+.1f}%"
            f" ({low:+.1f}% to {high:+.1f}%)"
        ]
        if name == "imbalance":
            base = self.reference.figures[name].value
            excess = self.improvement[name].value / (base - 1) if base > 1 else 0.0
            lines.append(f"excess imbalance (max/mean - 1): {100 * excess:+.1f}%")
        traded = self._traded(name)
        return [*lines, traded] if traded else lines

    def _against(self, name: str) -> tuple[float, float, float]:
        """Percent of the reference's figure: low, value, high."""
        delta, base = self.improvement[name], self.reference.figures[name].value
        if not base:
            return 0.0, 0.0, 0.0
        return 100 * delta.low / base, 100 * delta.value / base, 100 * delta.high / base

    def _traded(self, goal: str) -> str:
        """In words: which figures got better and which worse, beyond their intervals."""
        better: list[str] = []
        worse: list[str] = []
        for name in ("imbalance", "fan_out", "step_us"):
            if name not in self.improvement or name == goal:
                continue
            low, value, high = self._against(name)
            if low > 0 or high < 0:
                label = figure(name).label
                (better if value < 0 else worse).append(f"{label} {value:+.0f}%")
        if goal == "step_us":
            gains = {n: self.improvement[n] for n in PARTS_OF_STEP if n in self.improvement}
            saved = [n for n, d in gains.items() if d.high < 0]
            lost = [n for n, d in gains.items() if d.low > 0]
            better += [_part(n, gains[n]) for n in saved]
            worse += [_part(n, gains[n]) for n in lost]
        if not better and not worse:
            return ""
        said = []
        if better:
            said.append("better: " + ", ".join(better))
        if worse:
            said.append("paid for with: " + ", ".join(worse))
        return "; ".join(said)

    def summary(self) -> str:
        plan, placement = self.plan, self.plan.placement
        lines = []
        if self.defaults:
            taken = "; ".join(f"{name}: {value}" for name, value in self.defaults.items())
            lines.append(f"defaults taken: {taken}")
        behind = f" behind {count(plan.attention_gpus, 'GPU')} of attention"
        behind = behind if plan.attention_gpus else ""
        lines.append(
            f"{plain(plan.model) or 'unnamed model'}: {placement.num_layers} MoE layers,"
            f" {placement.num_experts} experts in {placement.num_slots} slots on"
            f" {count(placement.num_gpus, 'GPU')} of {count(placement.num_nodes, 'node')}"
            f"{behind}; objective {plan.objective}"
        )
        if self.cached is not None and placement.num_gpus == 1:
            return "\n".join([*lines, *self.cached.notes, *self._cache_lines(), *self.lines])
        lines += [self.judged_on, self._table(), *self.verdict(), *self.lines]
        lines += self._bound_line()
        if self.step is not None:
            notes = "; ".join(self.step.notes)
            lines.append(f"predicted times rest on {self.step.basis} figures: {notes}")
        return "\n".join([*lines, *self._cache_lines()])

    def _shown(self) -> list[str]:
        names = [n for n in PLACEMENT_FIGURES if n in self.chosen.figures]
        if self.plan.placement.num_nodes == 1:
            names = [n for n in names if n not in BETWEEN_NODES]
        if self.plan.placement.num_gpus == 1:
            names = [n for n in names if n in ("step_us", *PARTS_OF_STEP)]
        return names

    def _table(self) -> str:
        apart = self.plan.evaluation.get("held_out", True)
        head = ["held-out figure" if apart else "figure, not held out"]
        head += [candidate.name for candidate in self.candidates]
        rows = []
        for name in self._shown():
            known = figure(name)
            label = f"  {known.heading}" if name in PARTS_OF_STEP else known.heading
            if known.unit == "ms":
                label += " (predicted)"
            rows.append([label, *(_cell(known, c.figures[name]) for c in self.candidates)])
        rows += [
            [label, *(texts.get(c.name, "") for c in self.candidates)] for label, texts in self.rows
        ]
        return text_table(head, rows)

    def _bound_line(self) -> list[str]:
        """How far from the best the plan can be, on the data it was tuned on."""
        plan = self.plan
        if plan.objective_value is None or plan.bound is None or plan.gap is None:
            return []
        what = {
            "balance": "max/mean load, mean over layers and tuning batches",
            "traffic": "us of link time per layer, mean over tuning batches",
            "time": "us per layer, mean over tuning batches",
        }[plan.objective]
        return [
            f"what the search minimised: {plan.objective_value:.4g} ({what}); no placement is below"
            f" {plan.bound:.4g} (gap {100 * plan.gap:.1f}%, status {plan.status}; bound:"
            f" {self.bound_kind})"
        ]

    def _cache_lines(self) -> list[str]:
        if self.cached is None:
            return []
        alone = " by its experts alone" if self.plan.placement.num_gpus > 1 else " decoded"
        return [
            f"{row.name}: {row.tokens_per_s:,.1f} tokens/s{alone},"
            f" {plan.num_slots} of its experts in HBM ({plan.memory['num_slots']} slots), policy"
            f" {plan.policy}, {row.hit_rate:.1%} hits, {row.bytes_per_token / 1e6:.1f} MB per token"
            " over the host link"
            for plan, row in zip(self.cached.plans, self.cached.results, strict=True)
        ]

    def to_json(self) -> dict[str, Any]:
        plan = self.plan
        out = {
            "format": "moesim-plan-run",
            "version": 1,
            "model": plan.model,
            "objective": plan.objective,
            "solver": plan.solver,
            "status": plan.status,
            "objective_value": plan.objective_value,
            "bound": plan.bound,
            "gap": plan.gap,
            "bound_kind": self.bound_kind,
            "verdict": self.verdict(),
            "defaults": self.defaults,
            "notices": list(self.notices),
            "evaluation": plan.evaluation,
            "improvement": {n: f.to_json() for n, f in self.improvement.items()},
            "basis": self.step.basis if self.step is not None else None,
            "predictions": list(self.step.notes) if self.step is not None else [],
        }
        if self.cached is not None:
            out["cache"] = [asdict(row) for row in self.cached.results]
        return out

    def to_frame(self) -> pd.DataFrame:
        """One row per figure, one column per candidate, in the figures' base units."""
        import pandas as pd

        data = {c.name: {n: f.value for n, f in c.figures.items()} for c in self.candidates}
        return pd.DataFrame(data).rename_axis("figure")

    def picture(self) -> Picture:
        from moesim.jobs.pictures import plan_picture

        return plan_picture(self)

    def save(self, path: str | Path) -> Path:
        """Write the plan file."""
        self.plan.save(path)
        return Path(path)


def _part(name: str, delta: Interval) -> str:
    known = figure(name)
    return f"{known.label} {delta.value * known.factor:+.{known.digits}f} {known.unit}"


def _cell(known: Any, found: Interval) -> str:
    half = f"{(found.high - found.low) / 2 * known.factor:.{known.digits}f}"
    text = f"{found.value * known.factor:.{known.digits}f}"
    return text if float(half) == 0 else f"{text} ±{half}"
