"""A deployment for a number of GPUs where nothing else is said, and promises that none can keep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moesim.errors import InfeasibleError, InputError
from moesim.serving.batch import BatchShape
from moesim.serving.deployment import Deployment, deploy
from moesim.serving.memory import gpu_memory, require_fit
from moesim.serving.step_cost import EngineStepCost

if TYPE_CHECKING:
    from moesim.cluster import Cluster
    from moesim.model.spec import ModelSpec
    from moesim.serving.config import ServingConfig
    from moesim.serving.requests import Requests
    from moesim.serving.slo import Slo

MIN_CACHE_TOKENS = 8192


def fitting_deployment(model: ModelSpec, cluster: Cluster, **options: Any) -> Deployment:
    """The deployment of all GPUs of `cluster` with least tensor parallelism that leaves a rank's KV
    cache at least MIN_CACHE_TOKENS tokens: attention data-parallel over num_gpus / tp ranks,
    experts over all GPUs as far as there are experts. `options` go to `deploy`.

    Raises InfeasibleError with the numbers where nothing fits, InputError where no tp is possible.
    """
    tried: list[Deployment] = []
    num_gpus = cluster.num_gpus
    for tp in range(1, num_gpus + 1):
        if num_gpus % tp or model.attention.num_heads % tp:
            continue
        ep = num_gpus
        while ep > model.num_experts or num_gpus % ep:
            ep -= 1
        if model.moe_intermediate_size % (num_gpus // ep):
            continue
        made = deploy(model, cluster, tp=tp, dp=num_gpus // tp, ep=ep, **options)
        if gpu_memory(made).kv_token_capacity >= MIN_CACHE_TOKENS:
            return made
        tried.append(made)
    if not tried:
        raise InputError(
            f"{model.name} does not divide over {num_gpus} GPUs",
            "choose another number of GPUs (a power of two, say), or give `tp` and `dp`",
        )
    best = max(tried, key=lambda made: gpu_memory(made).kv_token_capacity)
    require_fit(best, MIN_CACHE_TOKENS)
    return best


def check_possible(
    slo: Slo, deployment: Deployment, requests: Requests, config: ServingConfig
) -> None:
    """Raise InfeasibleError for a promise that no request could keep with nothing else running:
    its time per token below one decode step, or its time to first token below one prompt step."""
    front = EngineStepCost(deployment)
    back = front if config.decode is None else EngineStepCost(config.decode)
    decode = BatchShape.of(decode_tokens=1.0, decode_context_tokens=1.0)
    step_s = float(back.step_us(decode)) / 1e6
    spec = config.speculation
    tokens = 1.0 if spec is None else 1.0 + spec.max_drafts
    shortest = int(requests.prompt_tokens.min()) if not config.prefix_cache else 1
    chunk = min(shortest, deployment.max_batch_tokens)
    first_s = float(front.step_us(BatchShape.of(prefill_tokens=float(chunk)))) / 1e6
    engine = deployment.engine
    first_s += (engine.request_ms * 1e3 + engine.prompt_token_us * shortest) / 1e6
    least = {
        "tpot": (step_s / tokens, f"a step of one sequence takes {step_s * 1e3:.3g} ms"),
        "ttft": (first_s, f"the shortest prompt alone takes {first_s * 1e3:.3g} ms"),
        "e2e": (first_s, f"the shortest prompt alone takes {first_s * 1e3:.3g} ms"),
    }
    for bound in slo.bounds:
        seconds, reason = least[bound.latency]
        if bound.limit_s <= seconds:
            raise InfeasibleError(
                f"{bound} cannot be kept by {deployment.name}: {reason}",
                "promise more time, or use faster GPUs or more tensor parallelism",
            )
