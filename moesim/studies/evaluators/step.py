"""Points as `moesim simulate` evaluates them: whole forward steps of a placement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from moesim.figures import figures_named
from moesim.studies.evaluator import Evaluated, Number, Tokens, Whole, Word
from moesim.studies.evaluators.routing import (
    RoutingEvaluator,
    RoutingParams,
    batch_tokens,
    model_required,
    phase_of,
    plan_of,
)
from moesim.studies.inputs import rerouted_trace


class StepParams(RoutingParams):
    """Parameters of simulated steps."""

    steps: Annotated[Whole, Field(ge=1, le=1 << 16)] = 16
    fidelity: Literal["event", "analytic"] = "event"
    schedule: Word = "sequential"
    chunks: Annotated[Whole, Field(ge=1, le=64)] | None = None
    reduce: Annotated[Number, Field(gt=0, le=1)] = 1.0
    context_tokens: Tokens | None = None
    moe_only: bool = False
    micro_batches: Annotated[Whole, Field(ge=1, le=64)] = 3


class StepEvaluator(RoutingEvaluator):
    """Whole steps, attention and dense layers included."""

    name: ClassVar = "step"
    about: ClassVar = "simulated forward steps of a placement, as moesim simulate"
    params: ClassVar = StepParams
    figures: ClassVar = figures_named(
        "step_us",
        "step_us_p50",
        "step_us_p99",
        "tokens_per_s",
        "tokens_per_s_per_gpu",
        "balancedness",
        "gpu_busy",
        step_us="time per step",
        step_us_p50="time per step, p50",
        step_us_p99="time per step, p99",
    )
    goal: ClassVar = "step_us"
    throughput: ClassVar = "tokens_per_s"
    front: ClassVar = ("step_us", "tokens_per_s_per_gpu")
    scales: ClassVar = {
        "network bandwidth": "network_scale",
        "compute": "compute_scale",
        "load": "load_scale",
    }

    def evaluate(self, params: Mapping[str, Any]) -> Evaluated:
        from moesim.jobs.simulate import run_simulation
        from moesim.jobs.simulate_request import SimRequest

        model = model_required(params)
        trace, changed = rerouted_trace(params, batch_tokens(params))
        plan = None
        if params["solver"] != "linear" or params["redundant_experts"]:
            plan = plan_of(self, params).plan
        report = run_simulation(
            SimRequest(
                trace=trace,
                cluster=self.cluster(params),
                model=model,
                plan=plan,
                phase=phase_of(params),
                batch_tokens=batch_tokens(params),
                num_steps=params["steps"],
                all_to_all=params["all_to_all"],
                schedule=params["schedule"],
                num_chunks=params["chunks"],
                reduce=params["reduce"],
                fidelity=params["fidelity"],
                replica_policy=params["replica_policy"],
                context_tokens=params["context_tokens"],
                home_ranks=not params["moe_only"],
                seed=params["seed"],
                network_scale=params["network_scale"],
                expert_gpus=params["expert_gpus"],
                micro_batches=params["micro_batches"],
                mtp=params["mtp"],
            )
        )
        result = next(iter(report.results.values()))
        rate = float(result.tokens.sum() / max(result.elapsed_us, 1e-300) * 1e6)
        return Evaluated(
            {
                "step_us": float(result.step_us.mean()),
                "step_us_p50": float(np.percentile(result.step_us, 50)),
                "step_us_p99": float(np.percentile(result.step_us, 99)),
                "tokens_per_s": rate,
                "tokens_per_s_per_gpu": rate / params["gpus"],
                "balancedness": float(result.balancedness.mean()),
                "gpu_busy": float(result.gpu_busy.mean()),
            },
            report.basis,
            (*changed, *report.notices),
        )
