"""How GPUs serve a model where nothing else is said, and promises that no service can keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from moesim.errors import InfeasibleError, InputError, UnknownNameError
from moesim.serving.batch import BatchShape
from moesim.serving.deployment import Deployment, deploy
from moesim.serving.engines import engine_profile
from moesim.serving.memory import gpu_memory, require_fit
from moesim.serving.step_cost import EngineStepCost

if TYPE_CHECKING:
    from moesim.cluster import Cluster
    from moesim.model.spec import ModelSpec
    from moesim.serving.config import ServingConfig
    from moesim.serving.requests import Requests
    from moesim.serving.slo import Slo

DEFAULT_GPUS = 8
MIN_CACHE_TOKENS = 8192
MIN_CACHE_SHARE = 0.1
BLOCK = 128


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """A service as `replicas` times `engine`."""

    engine: Deployment
    replicas: int

    def __str__(self) -> str:
        return f"{self.replicas} x {self.engine.parallelism}"


def default_split(
    model: ModelSpec,
    sized: Callable[[int], Cluster],
    num_gpus: int,
    *,
    replicas: int | None = None,
    tp: int | None = None,
    dp: int | None = None,
    pp: int = 1,
    ep: int | None = None,
    moe_tp: int | None = None,
    **options: Any,
) -> Split:
    """How `num_gpus` GPUs serve a model where little or nothing is said of it: replicas of the
    smallest engine inside a node, else over whole nodes, that leaves the KV cache MIN_CACHE_SHARE
    of the engine's memory and a rank MIN_CACHE_TOKENS tokens of it; of engines of that size the one
    with the least tensor parallelism, which never leaves a node.

    Attention is data-parallel over what tp leaves and experts are whole, each on one GPU as far as
    there are experts: what vLLM and SGLang recommend for MoE models (docs.vllm.ai, "Expert Parallel
    Deployment"; docs.sglang.io, "DP attention"). With one rank experts are cut over tp, as the
    engines do unasked, where their width (and its blocks of 128 in fp8) allows it. The two limits
    are assumed. What is given is kept: `replicas`, tp, dp, pp, ep, moe_tp; a plan's engine has the
    plan's GPUs. Where no engine reaches the share, the one with the largest is taken.

    sized: the first so many GPUs of the cluster. options: others of `deploy`. Engines on different
    GPU types or speeds are never made: a cluster that mixes them is one engine, or pools.
    Raises InfeasibleError with the numbers where nothing fits, InputError where the GPUs do not
    divide as given.
    """
    if isinstance(options.get("engine"), str):
        options["engine"] = engine_profile(options["engine"])
    plan, apart = options.get("plan"), options.get("expert_gpus") or 0
    groups = plan.placement.num_gpus if plan is not None and not apart else None
    tried: list[tuple[float, Deployment]] = []
    refused: InputError | None = None
    least = (tp or 1) * (dp or 1) * pp
    for size in _engine_sizes(sized, num_gpus, replicas, least, groups, apart):
        stage, cluster = (size - apart) // pp, sized(size)
        if tp is not None and dp is not None and tp * dp != stage:
            continue
        for cut in [tp] if tp else [stage // dp] if dp else _divisors(stage):
            across = cut > cluster.gpus_per_node and size > 1
            if tp is None and (model.attention.num_heads % cut or (across and dp is None)):
                continue
            experts = (ep, moe_tp)
            if ep is None and moe_tp is None and plan is None and not apart:
                experts = _expert_groups(model, stage, cut, options)
            try:
                made = deploy(
                    model,
                    cluster,
                    tp=cut,
                    dp=stage // cut,
                    pp=pp,
                    ep=experts[0],
                    moe_tp=experts[1],
                    **options,
                )
            except InputError as error:
                refused = refused or error
                continue
            share, room = _cache_share(made)
            if room and share >= MIN_CACHE_SHARE:
                return Split(made, num_gpus // size)
            tried.append((share if room else share - 1.0, made))
    if isinstance(refused, UnknownNameError) and not tried:
        raise refused
    if not tried:
        given = {"replicas": replicas, "tp": tp, "dp": dp, "ep": ep, "moe_tp": moe_tp}
        said = ", ".join(f"{name} {value}" for name, value in given.items() if value)
        raise InputError(
            f"{model.name} cannot be spread over {num_gpus} GPUs"
            + (f" as {said}" if said else "")
            + (f": {refused.cause}" if refused else ""),
            "choose another number of GPUs (a power of two, say), or other `tp`, `dp`, `replicas`",
        )
    best = max(tried, key=lambda one: one[0])[1]
    if not (tp or dp or replicas):
        require_fit(best, MIN_CACHE_TOKENS)
    return Split(best, num_gpus // best.num_gpus)


def default_pools(
    model: ModelSpec,
    sized: Callable[..., Cluster],
    num_gpus: int,
    decode_gpus: int | None = None,
    *,
    replicas: int | None = None,
    decode_replicas: int | None = None,
    **given: Any,
) -> tuple[Split, Split | None]:
    """`default_split` of a service, or of the GPUs that compute prompts and of the `decode_gpus`
    that decode, which are on the nodes behind the others' (so that in a cluster of two GPU types
    each can have a role). sized(n, after=m): n GPUs behind m. given: of both pools.

    given: with `expert_gpus`, engines that only compute prompts have their experts on all GPUs.

    Raises InputError where nothing is left for prompts, or a number of decoding engines is given
    and no GPUs for them.
    """
    if decode_gpus is None:
        if decode_replicas is not None:
            raise InputError(
                f"{decode_replicas} decoding engines, but no GPUs for them", "give `decode_gpus`"
            )
        return default_split(model, sized, num_gpus, replicas=replicas, **given), None
    if decode_gpus >= num_gpus:
        raise InputError(
            f"{decode_gpus} of {num_gpus} GPUs are to decode: none is left for prompts",
            "give fewer `decode_gpus`, or more `gpus`",
        )
    of_prompts = given | {"expert_gpus": None}
    front = default_split(model, sized, num_gpus - decode_gpus, replicas=replicas, **of_prompts)
    behind = partial(sized, after=num_gpus - decode_gpus)
    back = default_split(model, behind, decode_gpus, replicas=decode_replicas, **given)
    return front, back


def pools_text(front: Split, back: Split | None) -> str:
    """As "4 x tp1 dp8 ep8", or "prompts 2 x ..., decoding 1 x ..."."""
    return str(front) if back is None else f"prompts {front}, decoding {back}"


def service_gpus(
    replicas: int | None,
    tp: int | None,
    dp: int | None,
    pp: int = 1,
    expert_gpus: int | None = None,
) -> int:
    """GPUs of a service of which nothing says how many: those of the engines as far as given, else
    DEFAULT_GPUS."""
    if not (tp or dp or pp > 1):
        return DEFAULT_GPUS
    return ((tp or 1) * (dp or 1) * pp + (expert_gpus or 0)) * (replicas or 1)


def _cache_share(engine: Deployment) -> tuple[float, bool]:
    """Share of the engine's memory that is left for the KV cache, below 0 where weights do not
    fit, and whether a rank has MIN_CACHE_TOKENS tokens of it."""
    memory = gpu_memory(engine)
    share = 1.0 - memory.taken_bytes / memory.usable_bytes
    return share, memory.kv_token_capacity >= MIN_CACHE_TOKENS


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _engine_sizes(
    sized: Callable[[int], Cluster],
    num_gpus: int,
    replicas: int | None,
    least: int,
    planned: int | None,
    apart: int,
) -> list[int]:
    """GPUs that an engine may have, the fewest first: a multiple of `least` beside the `apart` ones
    of its experts, equal parts of a node or whole nodes, and all engines on GPUs alike."""
    if replicas is not None and (replicas < 1 or num_gpus % replicas):
        raise InputError(
            f"{num_gpus} GPUs do not divide among {replicas} replicas", "choose a multiple of them"
        )
    whole = sized(num_gpus)
    alike = list(zip(whole.gpus, whole.speed_factor.tolist(), strict=True))
    node = int(np.bincount(whole.node_of_gpu).min())
    out = []
    for size in _divisors(num_gpus) if replicas is None else [num_gpus // replicas]:
        same = all(alike[i : i + size] == alike[:size] for i in range(0, num_gpus, size))
        fits = replicas is not None or size == num_gpus or node % size == 0 or size % node == 0
        wanted = planned is None or replicas is not None or size == planned
        if size > apart and (size - apart) % least == 0 and fits and same and wanted:
            out.append(size)
    if not out and len(set(alike)) > 1:
        raise InputError(
            f"the engines of {whole.name} would have different GPUs",
            "give each GPU type a role with `decode_gpus`, or use a cluster of one type",
        )
    return out


def _expert_groups(
    model: ModelSpec, stage: int, tp: int, options: Mapping[str, Any]
) -> tuple[int, int]:
    """(ep, moe_tp) of `stage` GPUs."""
    dtype = options.get("expert_dtype") or model.expert_dtype
    step = BLOCK if dtype == "fp8" else 1
    if tp == stage and model.moe_intermediate_size % (stage * step) == 0:
        return 1, stage
    ep = stage
    while ep > model.num_experts or stage % ep:
        ep -= 1
    return ep, stage // ep


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
    first_s += engine.outside_us(deployment.num_gpus, float(shortest)) / 1e6
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
