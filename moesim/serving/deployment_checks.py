"""Checks that a deployment's parts belong together."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, get_args

from moesim.choices import MoeComm, Overlap
from moesim.cost.library import check_library, check_one_domain
from moesim.errors import InputError, MismatchError, UnknownNameError
from moesim.model.names import KV_BYTES, WEIGHT_BYTES

if TYPE_CHECKING:
    from moesim.serving.deployment import Deployment


def check_deployment(d: Deployment) -> None:
    """Raise InputError or MismatchError that name the field."""
    for name in (
        "tp",
        "dp",
        "pp",
        "ep",
        "moe_tp",
        "max_batch_tokens",
        "max_sequences",
        "dispatch_tokens",
    ):
        value = getattr(d, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} is {value!r:.40}", f"give {name} as a number of 1 or more")
    if d.engine.name == "vllm" and d.max_sequences > d.max_batch_tokens:
        raise InputError(
            f"max_sequences {d.max_sequences} is above max_batch_tokens {d.max_batch_tokens}, with"
            " which vLLM does not start",
            "give at most as many sequences as a step has tokens, or leave max_sequences out",
        )
    if d.expert_gpus is not None:
        _check_apart(d, d.expert_gpus)
    elif d.ep * d.moe_tp != d.tp * d.dp:
        raise InputError(
            f"ep {d.ep} x moe_tp {d.moe_tp} is not tp {d.tp} x dp {d.dp}",
            "experts and attention of a stage use the same GPUs: make the products equal, or"
            " give `expert_gpus`",
        )
    if d.num_gpus != d.cluster.num_gpus:
        raise MismatchError(
            f"the engine is of {d.num_gpus} GPUs, the cluster has {d.cluster.num_gpus}",
            f"size the cluster to {d.num_gpus} GPUs",
        )
    for table, name in (
        (WEIGHT_BYTES, "expert_dtype"),
        (WEIGHT_BYTES, "dense_dtype"),
        (KV_BYTES, "kv_dtype"),
    ):
        if getattr(d, name) not in table:
            raise UnknownNameError(name, str(getattr(d, name)), table)
    if not 0 < d.memory_fraction <= 1:
        raise InputError(
            f"memory_fraction is {d.memory_fraction}", "give a share above 0, at most 1"
        )
    if not 0 < d.kv_scale <= 1:
        raise InputError(f"`kv_scale` is {d.kv_scale}", "give a share above 0, at most 1")
    if d.kv_window is not None and d.kv_window < 1:
        raise InputError(f"`kv_window` is {d.kv_window}", "give 1 token or more")
    if d.mtp and not d.model.mtp_layers:
        raise InputError(
            f"{d.model.name} has no multi-token-prediction layer to draft with",
            "give `draft_share`, the time of another drafter",
        )
    _check_shapes(d)
    check_library(str(d.moe_comm), get_args(MoeComm))
    if d.expert_gpus is not None and d.moe_comm in ("all_reduce", "all_gather"):
        raise InputError(
            f"moe_comm {d.moe_comm} with experts on GPUs of their own",
            "choose an all-to-all: nccl, deepep, deepep_ll, nvlink",
        )
    if d.moe_comm == "all_reduce" and d.dp > 1:
        raise InputError(
            "moe_comm all_reduce with attention DP: ranks hold different tokens",
            "choose all_gather or an all-to-all",
        )
    if d.moe_comm not in ("all_reduce", "all_gather") and d.moe_tp > 1:
        raise InputError(
            f"moe_comm {d.moe_comm} sends tokens to whole experts, moe_tp is {d.moe_tp}",
            "set moe_tp to 1, or choose all_reduce or all_gather",
        )
    group = d.tp * d.dp + (d.expert_gpus or 0)
    check_one_domain(d.moe_comm, ceil(group / d.cluster.gpus_per_node))
    _check_plan(d)
    _check_redundancy(d)
    if d.two_batch_overlap not in get_args(Overlap):
        raise UnknownNameError("two_batch_overlap", d.two_batch_overlap, get_args(Overlap))
    if d.two_batch_overlap != "off" and d.expert_gpus is not None:
        raise InputError(
            "two-batch overlap with experts on GPUs of their own, whose parts overlap anyway",
            "leave `two_batch_overlap` out",
        )
    if d.two_batch_overlap != "off" and d.dp == 1:
        raise InputError(
            "two-batch overlap without attention DP: there is no dispatch to hide",
            "give `dp`, or leave `two_batch_overlap` out",
        )


def _check_apart(d: Deployment, expert_gpus: int) -> None:
    for name in ("expert_gpus", "micro_batches"):
        value = getattr(d, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"`{name}` is {value!r:.40}", "give 1 or more")
    if d.ep * d.moe_tp != expert_gpus:
        raise InputError(
            f"ep {d.ep} x moe_tp {d.moe_tp} is not the {expert_gpus} GPUs of the experts",
            "make the product `expert_gpus`",
        )
    if d.pp > 1:
        raise InputError(
            f"{d.pp} pipeline stages with experts on GPUs of their own",
            "leave `pp` or `expert_gpus` out",
        )


def _check_redundancy(d: Deployment) -> None:
    more = d.redundant_experts
    if more is None:
        return
    slots = d.model.num_experts + more
    if more < 0 or slots % d.ep or d.ep == 1:
        least = -d.model.num_experts % d.ep
        raise InputError(
            f"{d.model.num_experts} experts and {more} redundant ones are no equal number of"
            f" slots on {d.ep} expert-parallel ranks",
            f"give `redundant_experts` as {least} and a multiple of {d.ep} more"
            if d.ep > 1
            else "use expert parallelism, or leave `redundant_experts` out",
        )
    if d.plan is not None:
        raise InputError(
            "redundant experts beside a plan, which says itself where experts are",
            "leave `redundant_experts` or the plan out",
        )


def _check_shapes(d: Deployment) -> None:
    model = d.model
    if model.attention.num_heads % d.tp:
        raise InputError(
            f"{model.attention.num_heads} attention heads do not divide over tp {d.tp}",
            "choose a tp that divides the number of heads",
        )
    if d.pp > model.num_hidden_layers:
        raise InputError(
            f"pp {d.pp} is more than the {model.num_hidden_layers} layers",
            "choose at most one stage a layer",
        )
    if d.ep > model.num_experts:
        raise InputError(
            f"ep {d.ep} is more than the {model.num_experts} experts",
            "choose a smaller ep, or cut experts with moe_tp",
        )
    if model.moe_intermediate_size % d.moe_tp:
        raise InputError(
            f"experts of width {model.moe_intermediate_size} are not cut in moe_tp {d.moe_tp}",
            "choose a moe_tp that divides the width",
        )


def _check_plan(d: Deployment) -> None:
    if d.trace is not None and d.trace.num_experts != d.model.num_experts:
        raise MismatchError(
            f"the trace chooses among {d.trace.num_experts} experts, {d.model.name} has "
            f"{d.model.num_experts}",
            "use a trace of this model, or the model of the trace",
        )
    plan = d.plan
    if plan is None:
        return
    if plan.placement.num_gpus != d.ep:
        raise MismatchError(
            f"the plan is for {plan.placement.num_gpus} GPUs, ep is {d.ep}",
            "make a plan for as many GPUs as the engine has expert-parallel groups",
        )
    if plan.placement.num_experts != d.model.num_experts:
        raise MismatchError(
            f"the plan places {plan.placement.num_experts} experts, the model has "
            f"{d.model.num_experts}",
            "use the plan of this model",
        )
