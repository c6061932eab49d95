"""Points as `moesim plan` evaluates them: a placement and its held-out figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from moesim.figures import figures_named
from moesim.studies.evaluator import Evaluated, Factor
from moesim.studies.evaluators.routing import RoutingEvaluator, RoutingParams, plan_of


class PlanParams(RoutingParams):
    """`imbalance_scale` multiplies what the busiest GPU computes beyond the mean."""

    imbalance_scale: Factor = 1.0


_ROUTED = (
    "balancedness",
    "imbalance",
    "imbalance_p99",
    "fan_out",
    "node_fan_out",
    "inter_node_bytes",
)


class PlanEvaluator(RoutingEvaluator):
    """The MoE part of a step under a placement, in closed form."""

    name: ClassVar = "plan"
    about: ClassVar = "placement and its held-out figures, as moesim plan"
    params: ClassVar = PlanParams
    figures: ClassVar = figures_named(
        "step_us",
        "step_us_p99",
        "dispatch_us",
        "compute_us",
        "combine_us",
        "tokens_per_s",
        "tokens_per_s_per_gpu",
        *_ROUTED,
        tokens_per_s="tokens/s through the MoE layers",
        tokens_per_s_per_gpu="tokens/s through the MoE layers per GPU",
    )
    goal: ClassVar = "step_us"
    throughput: ClassVar = "tokens_per_s"
    front: ClassVar = ("step_us", "tokens_per_s_per_gpu")
    scales: ClassVar = {
        "network bandwidth": "network_scale",
        "compute": "compute_scale",
        "load": "load_scale",
        "imbalance": "imbalance_scale",
    }

    def evaluate(self, params: Mapping[str, Any]) -> Evaluated:
        result = plan_of(self, params)
        found = {name: figure.value for name, figure in result.chosen.figures.items()}
        out: dict[str, float | None] = {name: found.get(name) for name in _ROUTED}
        if result.step is not None:
            spread = _spread(found["imbalance"], params["imbalance_scale"])
            compute = found["compute_us"] * spread
            more = compute - found["compute_us"]
            step = found["step_us"] + more
            tokens = _tokens(result)
            out |= {
                "step_us": step,
                "step_us_p99": found["step_us_p99"] + more,
                "dispatch_us": found["dispatch_us"],
                "compute_us": compute,
                "combine_us": found["combine_us"],
                "tokens_per_s": tokens / step * 1e6,
                "tokens_per_s_per_gpu": tokens / step * 1e6 / params["gpus"],
            }
        basis = result.step.basis if result.step is not None else None
        return Evaluated(out, basis, result.notices)


def _spread(imbalance: float, scale: float) -> float:
    """Factor of the busiest GPU's time when its load beyond the mean is scaled."""
    return (1 + (imbalance - 1) * scale) / imbalance


def _tokens(result: Any) -> float:
    """Mean tokens of the held-out batches that the figures are of."""
    lengths = result.sample.batches.indptr[: result.sample.num_main + 1]
    return float(lengths[-1] / result.sample.num_main)
