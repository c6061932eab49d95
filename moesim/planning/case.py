"""A plan request made ready: what to solve, and how placements are judged on data not tuned on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from moesim import compat
from moesim.compat import other_ranks
from moesim.cost.routing import Dedup
from moesim.cost.scaled import faster_step
from moesim.cost.step import StepModel, build_step_model
from moesim.errors import InputError, MismatchError, UnknownNameError, plain
from moesim.figures import count
from moesim.placement import Placement
from moesim.planning.evaluate import Measured, Sample, draw_sample, measure
from moesim.planning.home_ranks import HomeRule
from moesim.planning.migrate import slots_in_use
from moesim.planning.pools import folded
from moesim.planning.refine import Data, check_request
from moesim.planning.request import (
    DEFAULT_BATCH_TOKENS,
    PlanRequest,
    check_memory,
    slots_of,
)
from moesim.planning.traffic import sample_traffic
from moesim.planning.tuning import tuning_counts
from moesim.solvers.base import Objective, Problem, Stop, never, of_holders
from moesim.trace.batches import Phase, index_requests, split_requests
from moesim.trace.format import DECODE, PREFILL, Trace, TraceMeta, require_tokens
from moesim.types import IntArray

MIN_FILL = 0.8
"""Share of the asked batch below which a notice says that requests are too few."""


class Judge(Protocol):
    """Measures placements on data that tuning never saw. said: one line on that data; header: the
    same for the plan's evaluation."""

    sample: Sample
    said: str
    header: dict[str, Any]

    def measure(self, placement: Placement, homes: Callable[..., Any] | None = None) -> Measured:
        """What a placement does on every batch of the sample; homes: see `evaluate.measure`."""
        ...


@dataclass(eq=False)
class Case:
    """problem: what is solved. judge: made when it is needed, since a search may be interrupted.

    defaults: what was left out of the request, by name, as text; notices: what the user should
    know. data, step, predictor: None for counts.
    """

    request: PlanRequest
    meta: TraceMeta
    trace_hash: str
    objective: Objective
    problem: Problem
    make_judge: Callable[[Case], Judge]
    defaults: dict[str, str]
    notices: list[str]
    data: Data | None = None
    step: StepModel | None = None
    predictor: HomeRule | None = None


def token_case(request: PlanRequest, stop: Stop = never) -> Case:
    """From a trace of tokens. Raises MismatchError where inputs do not belong together,
    InfeasibleError where experts do not fit, InputError for the rest."""
    work, search = request.workload, request.search
    trace = _one_domain(require_tokens(work.trace, "a plan"), work.domain)
    defaults: dict[str, str] = {}
    notices: list[str] = []
    phase, batch_tokens = _phase_and_batch(request, trace, defaults)
    step, objective = _step_model(request, phase, defaults, notices)
    capacity = _capacity(request, trace, defaults)
    if work.check_memory and work.model is not None:
        check_memory(
            work.model,
            work.cluster,
            capacity,
            work.attention_gpus,
            mtp=work.mtp,
            layers_per_pool=trace.meta.layers_per_pool,
        )
    index, notice = index_requests(trace, phase)
    notices += filter(
        None, (notice, other_ranks(trace, work.attention_gpus or work.cluster.num_gpus))
    )
    tune, held_out = split_requests(index)
    dedup: Dedup = step.dedup if step is not None else (work.dedup or "gpu")
    data = Data(trace, tune, held_out, phase, batch_tokens, step, dedup)
    predictor = check_request(request, data, objective)
    counts = tuning_counts(trace, tune, phase, batch_tokens, search.seed)
    traffic = None
    if step is not None and objective != "balance":
        traffic = sample_traffic(
            trace, tune, phase, batch_tokens, step, search.seed, work.attention_gpus
        )
    problem = Problem(
        counts=counts,
        capacity=capacity,
        num_nodes=work.cluster.num_nodes,
        objective=objective,
        speed=np.asarray(work.cluster.speed_factor, np.float64),
        gpu_type=step.gpu_type if step is not None else np.zeros(0, np.int64),
        expert_us=step.expert_tables_us(int(counts.max()) + 1) if step is not None else None,
        num_groups=work.model.n_group if work.model is not None else 1,
        traffic=traffic,
        seed=search.seed,
        time_limit_s=search.time_limit_s,
        stop=stop,
    )
    if trace.meta.layers_per_pool > 1:
        problem = folded(problem, trace.meta.layers_per_pool)
        notices.append(
            f"{trace.meta.layers_per_pool} adjacent layers share their experts: each is placed once"
            " for all of them"
        )
    if work.attention_gpus and objective == "balance":
        problem = of_holders(problem)
    return Case(
        request,
        trace.meta,
        trace.content_hash(),
        objective,
        problem,
        TokenJudge,
        defaults,
        notices,
        data,
        step,
        predictor,
    )


class TokenJudge:
    """Held-out requests routed through the placement, batch by batch."""

    def __init__(self, case: Case) -> None:
        assert case.data is not None
        self.case, self.data = case, case.data
        data, seed = case.data, case.request.search.seed
        self.sample = draw_sample(
            data.trace,
            data.held_out,
            data.phase,
            data.batch_tokens,
            seed,
            case.problem.num_gpus,
        )
        filled = float(np.diff(self.sample.batches.indptr[: self.sample.num_main + 1]).mean())
        if filled < MIN_FILL * data.batch_tokens:
            case.notices.append(
                f"the held-out requests fill batches of {filled:.0f} tokens only,"
                f" {data.batch_tokens} asked"
            )
        self.said = (
            f"held-out: {count(self.sample.num_requests, 'request')} that tuning never saw,"
            f" {self.sample.num_main} batches; 95% bootstrap intervals over requests"
        )
        self.header = {
            "held_out": True,
            "phase": data.phase,
            "batch_tokens": data.batch_tokens,
            "num_requests": self.sample.num_requests,
            "num_batches": self.sample.num_main,
            "basis": data.step.basis if data.step is not None else None,
            **({"all_to_all": data.step.all_to_all} if data.step is not None else {}),
        }

    def measure(self, placement: Placement, homes: Callable[..., Any] | None = None) -> Measured:
        work = self.case.request.workload
        if placement.num_gpus != work.cluster.num_gpus:
            placement = placement.behind(work.attention_gpus, work.cluster.num_nodes)
        return measure(
            self.data.trace,
            self.sample,
            placement,
            policy=work.replica_policy,
            dedup=self.data.dedup,
            step=self.data.step,
            speed=np.asarray(work.cluster.speed_factor, np.float64),
            homes=homes,
            attention_gpus=work.attention_gpus,
        )


def _one_domain(trace: Trace, domain: str | None) -> Trace:
    if domain is None:
        return trace
    if trace.domain_ids is None or not trace.meta.domains:
        raise MismatchError("the trace has no domains", "leave out `domain`")
    if domain not in trace.meta.domains:
        raise UnknownNameError("domain", domain, trace.meta.domains)
    keep = np.flatnonzero(np.asarray(trace.domain_ids) == trace.meta.domains.index(domain))
    if not len(keep):
        raise InputError(f"no token of the trace is of domain {domain!r}", "choose another")
    return trace.take(keep)


def _phase_and_batch(
    request: PlanRequest, trace: Trace, defaults: dict[str, str]
) -> tuple[Phase, int]:
    phase, batch_tokens = request.workload.phase, request.workload.batch_tokens
    if phase is None:
        if not trace.num_tokens:
            raise InputError("the trace has no tokens", "use a trace with at least two requests")
        phase = "prefill" if (np.asarray(trace.phases) == PREFILL).any() else "decode"
        share = float((np.asarray(trace.phases) == DECODE).mean())
        defaults["phase"] = f"{phase} ({share:.0%} of the trace's tokens are decode)"
    if batch_tokens is None:
        batch_tokens = DEFAULT_BATCH_TOKENS[phase]
        defaults["batch tokens"] = f"{batch_tokens} over all GPUs"
    if batch_tokens < 1:
        raise InputError("`batch_tokens` must be at least 1", "give the tokens of one step")
    return phase, batch_tokens


def _step_model(
    request: PlanRequest, phase: Phase, defaults: dict[str, str], notices: list[str]
) -> tuple[StepModel | None, Objective]:
    work, objective = request.workload, request.search.objective
    model = work.model
    if model is None:
        if objective in ("time", "traffic"):
            raise InputError(
                f"objective {objective} needs the model's sizes, and"
                f" {plain(work.trace.meta.model) or 'the trace'} names no known model",
                "name one with `model` (a preset or a Hugging Face config.json)",
            )
        notices.append("the model is not known: planned for balance, without predicted times")
        defaults.setdefault("objective", "balance (the model is not known)")
        return None, "balance"
    notices += compat.trace_fits_model(work.trace.meta, model)
    if objective is None:
        objective = "time"
        defaults["objective"] = "time (predicted step time)"
    step = build_step_model(
        work.cluster,
        model,
        phase=phase,
        all_to_all=work.all_to_all,  # type: ignore[arg-type]
        dedup=work.dedup,
    )
    if work.all_to_all is None:
        defaults["all-to-all"] = f"{step.all_to_all}, messages deduplicated per {step.dedup}"
    if objective == "traffic" and step.dedup == "none":
        notices.append(
            f"{step.all_to_all} sends one message per choice, whatever GPU its expert is on, so"
            " that placement cuts little traffic: only choices on the token's own GPU are free"
        )
    return faster_step(step, work.network_scale), objective


def _capacity(request: PlanRequest, trace: Trace, defaults: dict[str, str]) -> IntArray:
    """[G] slots: those asked for, else those of the plan in use, else one per expert."""
    work, old = request.workload, request.extras.old_plan
    asked = work.slots is not None or work.redundant_experts
    if old is not None and not asked and old.placement.num_gpus == work.cluster.num_gpus:
        capacity = slots_in_use(old.placement)
        defaults["slots"] = f"{int(capacity.sum())} per layer, as the plan in use has"
        return capacity
    return slots_of(trace.num_experts, request)
