"""`reroute`: a trace with the choices of a rule of routing, and what that changes, held out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.compat import plan_fits_trace
from moesim.errors import InputError, MoesimError
from moesim.figures import figure, text_table
from moesim.jobs import inputs
from moesim.jobs.result import Result
from moesim.placement import Placement
from moesim.planning.evaluate import Interval, draw_sample, figures, measure
from moesim.routing.api import Changes
from moesim.routing.api import reroute as apply_rule
from moesim.routing.base import Rule
from moesim.routing.spec import describe, rule_text
from moesim.trace.batches import index_requests, split_requests
from moesim.trace.format import DECODE, Trace, save_trace

if TYPE_CHECKING:
    import pandas as pd

    from moesim.choices import Phase
    from moesim.cost.step import StepModel
    from moesim.jobs.inputs import ModelLike, PlanLike, TraceLike

GPUS = 8
BATCH_TOKENS = {"prefill": 4096, "decode": 256}
SHOWN = ("imbalance", "fan_out", "step_us")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class RerouteResult(Result):
    """trace: the new one; before and after: held-out figures of `placed`, the same batches of
    both."""

    trace: Trace
    rule: Rule
    changes: Changes
    placed: str
    phase: str
    batch_tokens: int
    before: Mapping[str, Interval]
    after: Mapping[str, Interval]
    notices: tuple[str, ...] = ()

    def line(self) -> str:
        return self.changes.line(rule_text(self.rule))

    def summary(self) -> str:
        c = self.changes
        lines = [self.line()]
        if c.emptied:
            lines.append(f"{c.emptied:,} times a token lost every expert of a layer")
        if c.unlisted:
            lines.append(f"{c.unlisted:,} choices are of experts that are no candidates")
        if c.gate_mass_kept is not None:
            lines.append(f"gate mass kept {c.gate_mass_kept:.1%} (says nothing of accuracy)")
        if c.score_mass is not None:
            lines.append(f"scores of the choices, after over before: {c.score_mass:.3f}")
        lines += [f"{name.replace('_', ' ')} {value:.4g}" for name, value in c.notes.items()]
        head = [f"{self.placed}, {self.phase} batches of {self.batch_tokens:,}", "before", "after"]
        rows = [
            [figure(n).heading, figure(n).text(self.before[n].value), figure(n).text(a.value)]
            for n, a in self.after.items()
            if n in SHOWN
        ]
        return "\n".join([*lines, "", "on held-out requests:", text_table(head, rows)])

    def to_json(self) -> dict[str, Any]:
        return {
            **describe(self.rule),
            "changes": self.changes.to_json(),
            "top_k": self.trace.top_k,
            "evaluation": {
                "placement": self.placed,
                "phase": self.phase,
                "batch_tokens": self.batch_tokens,
                "before": {n: f.to_json() for n, f in self.before.items()},
                "after": {n: f.to_json() for n, f in self.after.items()},
            },
        }

    def to_frame(self) -> pd.DataFrame:
        """One row per figure: before, after."""
        import pandas as pd

        return pd.DataFrame(
            {
                "before": {n: f.value for n, f in self.before.items()},
                "after": {n: f.value for n, f in self.after.items()},
            }
        )

    def save(self, path: str | Path) -> Path:
        """Write the trace."""
        save_trace(self.trace, path)
        return Path(path)


def reroute(
    trace: TraceLike,
    rule: str | Rule,
    *,
    plan: PlanLike | None = None,
    gpus: int | None = None,
    model: ModelLike | None = None,
    phase: Phase | None = None,
    batch_tokens: int | None = None,
    seed: int = 0,
) -> RerouteResult:
    """A trace with the choices of `rule`, as `drop:factor=1` (`moesim routing list`).

    plan: for rules that need one, and to evaluate; without it, experts lie in order over `gpus`
    (8, or as many as there are experts). model: the trace's where it is a known one; with it the
    time of a step is predicted. phase, batch_tokens: of the evaluation, and of the batches of rules
    that look at load. Raises MismatchError for what the rule needs and lacks.
    """
    old = inputs.token_trace_of(trace, "reroute", pools=True)
    made = None if plan is None else inputs.plan_of(plan)
    if made is not None:
        plan_fits_trace(made, old.meta)
    if made is not None and gpus not in (None, made.placement.num_gpus):
        raise InputError(
            f"the plan is for {made.placement.num_gpus} GPUs, `gpus` says {gpus}", "leave it out"
        )
    mostly = "decode" if 2 * int((np.asarray(old.phases) == DECODE).sum()) > old.num_tokens else ""
    chosen: Phase = phase or ("decode" if mostly else "prefill")
    tokens = batch_tokens or BATCH_TOKENS[chosen]
    sizes = {**BATCH_TOKENS, chosen: tokens}
    done = apply_rule(
        old,
        rule,
        None if made is None else made.placement,
        prefill_tokens=sizes["prefill"],
        decode_tokens=sizes["decode"],
        seed=seed,
    )
    if made is None:
        placement = _in_order(old, gpus or min(GPUS, old.num_experts))
        placed = f"experts in order on {placement.num_gpus} GPUs"
    else:
        placement, placed = made.placement, f"the plan on {made.placement.num_gpus} GPUs"
    step, notices = _step_model(old, placement, model)
    index, notice = index_requests(old, chosen)
    sample = draw_sample(old, split_requests(index, seed)[1], chosen, tokens, seed)
    policy = "split" if made is None else made.replica_policy
    found = [
        figures(sample, measure(t, sample, placement, policy=policy, dedup="gpu", step=step))
        for t in (old, done.trace)
    ]
    return RerouteResult(
        done.trace,
        done.rule,
        done.changes,
        placed,
        chosen,
        tokens,
        found[0],
        found[1],
        tuple(n for n in (notice, *notices) if n),
    )


def _in_order(trace: Trace, gpus: int) -> Placement:
    """Experts in order of their numbers, as many on each GPU as on any other, within one."""
    experts = trace.num_experts
    if not 1 <= gpus <= experts:
        raise InputError(f"{experts} experts on {gpus} GPUs", f"give `gpus` from 1 to {experts}")
    each = -(-experts // gpus)
    table = np.full((gpus, each), -1, np.int32)
    for gpu, part in enumerate(np.array_split(np.arange(experts, dtype=np.int32), gpus)):
        table[gpu, : len(part)] = part
    return Placement(np.tile(table.reshape(-1), (trace.num_layers, 1)), gpus, 1, experts)


def _step_model(
    trace: Trace, placement: Placement, model: ModelLike | None
) -> tuple[StepModel | None, list[str]]:
    """The step model of the default cluster, or None with the reason why there is none."""
    from moesim.cost.step import build_step_model

    try:
        spec = inputs.model_or_named(model, trace.meta.model)
        if spec is None:
            return None, ["no step time: the trace names no known model; name one with `model`"]
        cluster = inputs.cluster_of(None, placement.num_gpus)
        if cluster.num_nodes != placement.num_nodes:
            return None, ["no step time: the plan's nodes are not those of the default cluster"]
        return build_step_model(cluster, spec), []
    except MoesimError as error:
        if model is not None:
            raise
        return None, [f"no step time: {error.cause}"]
