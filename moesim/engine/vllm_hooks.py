"""Where the plug-in takes hold of vLLM, version by version.

Routing: `RoutingSimulatorRouter._compute_routing` and `BaseRouter._apply_eplb_mapping` (0.23 to
0.33). Steps: `_prepare_inputs` of the model runner (the only one for MoE models in 0.23), or
`prepare_inputs` of its second version (the default by 0.33), and `_dummy_run` of both. Placements
with replicas: the maps of `EplbState.model_states`.

Source: vllm 0.23.0 and 0.33.0, vllm/model_executor/layers/fused_moe/router,
vllm/v1/worker/gpu_model_runner.py, vllm/v1/worker/gpu/model_runner.py, vllm/distributed/eplb.
"""

from __future__ import annotations

import re
import sys
from functools import wraps
from typing import Any

import numpy as np
import torch

from moesim.engine.content import Content, load_content
from moesim.engine.state import Replay
from moesim.errors import InputError, MismatchError

ROUTER = "vllm.model_executor.layers.fused_moe.router.routing_simulator_router"
RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")
_now: dict[str, Any] = {"replay": None, "path": ""}


def current() -> Replay:
    """The replay of this process; InputError before the engine's first pass."""
    if _now["replay"] is None:
        raise InputError("no replay in this process", "ask after the engine has started")
    return _now["replay"]


def install(strategy: str, path: str) -> None:
    """Register the strategy and wrap vLLM's router class; once per process."""
    from importlib import import_module

    module = import_module(ROUTER)
    _now["path"] = path
    router = module.RoutingSimulatorRouter
    if getattr(router, "_moesim", False):
        return

    class Replayed(module.RoutingStrategy):  # type: ignore[name-defined]
        def route_tokens(self, *_: Any, **__: Any) -> Any:
            raise InputError(
                "a router asked for a routing before its layer was known",
                "report the engine's version: the plug-in did not see its model runner",
            )

    module.RoutingSimulator.register_strategy(strategy, Replayed())
    init, compute, mapping = (
        router.__init__,
        router._compute_routing,
        router._apply_eplb_mapping,
    )

    @wraps(init)
    def new_init(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        hook_runners()

    @wraps(compute)
    def new_compute(
        self: Any, hidden_states: Any, router_logits: Any, indices_type: Any, **kwargs: Any
    ) -> Any:
        layer = getattr(self, "_moesim_layer", None)
        if layer is None:
            return compute(self, hidden_states, router_logits, indices_type, **kwargs)
        return current().route(layer, hidden_states.shape[0], indices_type)

    @wraps(mapping)
    def new_mapping(self: Any, topk_ids: Any) -> Any:
        slots = mapping(self, topk_ids)
        layer = getattr(self, "_moesim_layer", None)
        if layer is not None:
            current().count(layer, slots)
        return slots

    router.__init__, router._compute_routing = new_init, new_compute
    router._apply_eplb_mapping, router._moesim = new_mapping, True


def hook_runners() -> None:
    """Wrap the model runners that this process has imported: called when the first router is made,
    in a worker, where they are."""
    for name in RUNNERS:
        runner = getattr(sys.modules.get(name), "GPUModelRunner", None)
        if runner is None or "_moesim" in vars(runner):
            continue
        runner._moesim = True
        runner._dummy_run = _idle_before(runner._dummy_run)
        if name == RUNNERS[0]:
            runner._prepare_inputs = _after_first(runner._prepare_inputs)
        else:
            runner.prepare_inputs = _after_second(runner.prepare_inputs)


def _idle_before(dummy_run: Any) -> Any:
    @wraps(dummy_run)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound(self).idle()
        return dummy_run(self, *args, **kwargs)

    return wrapped


def _after_first(prepare: Any) -> Any:
    """The first model runner: requests in the order of its `input_batch`."""

    @wraps(prepare)
    def wrapped(self: Any, scheduler_output: Any, scheduled: Any, *args: Any, **kw: Any) -> Any:
        result = prepare(self, scheduler_output, scheduled, *args, **kw)
        batch, n = self.input_batch, len(scheduled)
        bound(self).prepare(
            batch.req_ids[:n],
            scheduled,
            batch.num_computed_tokens_cpu[:n],
            batch.num_prompt_tokens[:n],
        )
        return result

    return wrapped


def _after_second(prepare: Any) -> Any:
    """The second model runner: the batch that it returns says all."""

    @wraps(prepare)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = prepare(self, *args, **kwargs)
        n = batch.num_reqs
        bound(self).prepare(
            batch.req_ids[:n],
            batch.num_scheduled_tokens[:n],
            batch.num_computed_tokens_np[:n],
            batch.prefill_len_np[:n],
        )
        return batch

    return wrapped


def bound(runner: Any) -> Replay:
    """The replay, made at a runner's first pass, when its model is loaded."""
    if _now["replay"] is None:
        content = load_content(_now["path"])
        _require_plain(runner.vllm_config)
        _bind_layers(runner, content)
        set_maps(runner, content)
        most = runner.vllm_config.scheduler_config.max_num_batched_tokens
        graphs = runner.vllm_config.compilation_config.cudagraph_capture_sizes or [0]
        rank = int(runner.vllm_config.parallel_config.data_parallel_rank)
        _now["replay"] = Replay(content, runner.device, max(most, max(graphs)) + 64, rank)
    replay: Replay = _now["replay"]
    return replay


def _require_plain(config: Any) -> None:
    """Refuse what the plug-in does not know how to replay."""
    parallel = config.parallel_config
    refused = {
        "speculative decoding": config.speculative_config is not None,
        "dual-batch overlap (--enable-dbo)": bool(getattr(parallel, "enable_dbo", False)),
        "context-parallel decode": getattr(parallel, "decode_context_parallel_size", 1) > 1,
    }
    for name, used in refused.items():
        if used:
            raise InputError(f"the replay does not know {name}", "start the engine without it")


def _bind_layers(runner: Any, content: Content) -> None:
    """Tell every MoE layer's router which layer it is, and check that it is what was planned."""
    compilation = runner.vllm_config.compilation_config
    for name in compilation.static_all_moe_layers:
        layer = compilation.static_forward_context[name]
        moe = getattr(layer, "runner", layer)
        _require_layer(name, moe, content)
        moe.router._moesim_layer = content.layer(_number(name))


def _require_layer(name: str, moe: Any, content: Content) -> None:
    router, config = moe.router, moe.moe_config
    if not getattr(router, "_moesim", False):
        raise InputError(
            f"{name}: the router is {type(router).__name__}",
            "set VLLM_MOE_ROUTING_SIMULATION_STRATEGY as launch.sh does",
        )
    method = getattr(moe, "_quant_method", None) or moe.routed_experts.quant_method
    for what, wrong in (
        ("routes inside its kernel", method.is_monolithic),
        ("gathers other ranks' tokens before the router", moe.do_naive_dispatch_combine),
        ("splits tokens over tensor-parallel ranks", config.is_sequence_parallel),
    ):
        if wrong:
            raise InputError(
                f"{name}: this backend {what}",
                "choose another MoE backend or all-to-all, and no tensor parallelism with"
                " data parallelism",
            )
    pairs: tuple[tuple[str, int, int], ...] = (
        ("experts per token", router.top_k, content.top_k),
        ("slots", router.global_num_experts, content.num_slots),
    )
    if content.placement != "none":
        pairs += (("expert-parallel ranks", config.ep_size, content.num_gpus),)
    for what, has, wanted in pairs:
        if has != wanted:
            raise MismatchError(
                f"{name}: the engine has {has} {what}, the replay {wanted}",
                "start the engine as launch.sh does",
            )


def set_maps(runner: Any, content: Content) -> None:
    """A placement with replicas into the maps of vLLM's load balancer, in place; its own
    rearrangements are put off. Weights stay where they are: they are random."""
    if content.placement != "eplb":
        return
    state = runner.eplb_state
    slots = content.physical_to_logical
    if state is None or slots is None:
        raise InputError("the engine's load balancer is off", "start it as launch.sh does")
    names = runner.vllm_config.compilation_config.static_all_moe_layers
    here = [content.layer(_number(name)) for name in names]
    slots = slots[here]
    count = np.zeros((len(slots), content.num_experts), np.int64)
    for row, experts in zip(count, slots, strict=True):
        np.add.at(row, experts, 1)
    homes = np.full((*count.shape, int(count.max())), -1, np.int64)
    for layer, experts in enumerate(slots):
        filled = np.zeros(content.num_experts, np.int64)
        for slot, expert in enumerate(experts):
            homes[layer, expert, filled[expert]] = slot
            filled[expert] += 1
    with torch.inference_mode(False):
        for model in state.model_states.values():
            model.physical_to_logical_map.copy_(torch.from_numpy(slots.astype(np.int64)))
            model.logical_to_physical_map.fill_(-1)
            model.logical_to_physical_map[..., : homes.shape[2]].copy_(torch.from_numpy(homes))
            model.logical_replica_count.copy_(torch.from_numpy(count))
    state.expert_rearrangement_step_interval = sys.maxsize


def _number(name: str) -> int:
    found = re.search(r"\.(\d+)\.", name)
    if found is None:
        raise MismatchError(f"MoE layer {name} has no number", "use a model whose layers have")
    return int(found.group(1))
