"""Work of a step in which tokens stay where their last expert was (schedule context-coherent)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moesim.compat import placement_fits_trace
from moesim.cost.routing import POLICY_CODES, Routed, pick_slot, share_batch
from moesim.cost.step import calibration_of_gpu
from moesim.errors import InputError
from moesim.kernels import kernel
from moesim.placement import Placement
from moesim.sim.collectives.base import make_stage
from moesim.sim.network import Flow
from moesim.sim.prepare import Models, home_times
from moesim.sim.work import Chunk, HomeWork, StepWork
from moesim.trace.batches import Batches
from moesim.types import Array

if TYPE_CHECKING:
    from moesim.trace.format import Trace


def coherent_work(
    models: Models,
    trace: Trace,
    batch: Batches,
    placement: Placement,
    home: npt.NDArray[np.int32],
) -> tuple[StepWork, Routed]:
    """One step (`batch` holds one batch) whose tokens start at `home` and then stay put.

    Raises InputError for prefill, or for an exchange that is not one plain all-to-all.
    """
    if batch.phase != "decode":
        raise InputError(
            "the context-coherent schedule moves single tokens, not prompts", "use `phase` decode"
        )
    if models.exchange.name != "flat" or models.exchange.dedup != "gpu":
        raise InputError(
            f"the context-coherent schedule over {models.exchange_name}",
            "use `all_to_all` nccl or nvlink, whose messages go straight to their GPU",
        )
    placement_fits_trace(placement, trace.num_layers, trace.num_experts)
    gpus, layers, tokens = models.num_gpus, trace.num_layers, len(batch.token_idx)
    slot_tokens = np.zeros((layers, placement.num_slots), np.int32)
    out, back = np.zeros((2, layers, gpus, gpus), np.int32)
    where = np.empty((layers, tokens), np.int32)
    _follow(
        np.asarray(trace.expert_ids)[batch.token_idx],
        _leader(trace, batch),
        batch.token_idx,
        home,
        placement.logical_to_physical(),
        placement.replica_count,
        placement.gpu_of_slot,
        placement.node_of_gpu,
        POLICY_CODES[models.policy],
        slot_tokens,
        out,
        back,
        where,
    )
    empty = np.zeros((1, layers), np.int64)
    routed = Routed(slot_tokens[None], out[None], empty, empty, np.array([tokens]))
    step = models.step
    dispatch = make_stage(step, models.links, step.dispatch, out[None], step.dispatch_bytes)
    combine = make_stage(step, models.links, step.combine, back[None], step.combine_bytes)
    every = Batches(
        np.tile(batch.token_idx, layers),
        np.arange(layers + 1) * tokens,
        batch.phase,
        batch.batch_tokens,
    )
    times = home_times(models, trace, every, where.reshape(-1))
    own = np.arange(layers)
    work = HomeWork(
        times.attention_us[own, own],
        times.gate_us,
        times.shared_us,
        times.dense_us[0],
        times.descend_us,
        times.ascend_us,
    )
    chunk = Chunk(0, step.compute_us(routed)[0], [dispatch], [combine], work)
    gather = gather_flow(models, tokens)
    return StepWork(layers, gpus, tokens, work, (chunk,), gather), routed


def gather_flow(models: Models, num_tokens: int) -> Flow:
    """All-gather of one hidden state a token over all GPUs, as a ring in order of GPU number:
    every GPU sends (G - 1) / G of the whole to the next one."""
    cluster, gpus = models.cluster, models.num_gpus
    slowest = min(cluster.gpus, key=lambda gpu: gpu.nvlink_gb_per_s)
    same = len({gpu.name for gpu in cluster.gpus}) == 1
    nics = models.links.line_gb_per_s[[c == "nic" for c in models.links.classes]]
    curve = calibration_of_gpu(slowest, cluster.calibration, same).collective(
        "all_gather", gpus, cluster.num_nodes, nic_gb_per_s=float(nics.min()) if len(nics) else None
    )
    size = num_tokens * models.step.dispatch_bytes * (gpus - 1) / gpus
    ring = np.zeros((1, 1, gpus, gpus))
    for gpu in range(gpus):
        ring[0, 0, gpu, (gpu + 1) % gpus] = float(gpu != (gpu + 1) % gpus)
    return make_stage(models.step, models.links, curve, ring, size, label=" gather").flow(
        0, 0, "other"
    )


def _leader(trace: Trace, batch: Batches) -> Array:
    """[T, L] index of the choice whose GPU a token goes on from."""
    if trace.gate_weights is None:
        return np.zeros((len(batch.token_idx), trace.num_layers), np.int64)
    return np.asarray(trace.gate_weights)[batch.token_idx].argmax(axis=2)


@kernel
def _follow(
    ids: Array,
    leader: Array,
    token_idx: Array,
    home: Array,
    logical_to_physical: Array,
    replica_count: Array,
    gpu_of_slot: Array,
    node_of_gpu: Array,
    policy: int,
    slot_tokens: Array,
    out: Array,
    back: Array,
    where: Array,
) -> None:
    """Follow the tokens from layer to layer; adds to slot_tokens [L, P], out and back [L, G, G],
    and writes where [L, T], the GPU that each token starts each layer on."""
    num_tokens, num_layers, top_k = ids.shape
    num_gpus = out.shape[1]
    num_experts = replica_count.shape[1]
    turn = np.zeros(num_experts, np.int64)
    width = num_experts if policy == 3 else 0
    share = np.zeros((1, width, num_gpus, logical_to_physical.shape[2]), np.int32)
    gpus = np.empty(top_k, np.int64)
    at = home.astype(np.int64)
    every = np.arange(num_tokens)
    for layer in range(num_layers):
        turn[:] = 0
        one = slice(layer, layer + 1)
        if policy == 3:
            share_batch(
                ids[:, one],
                every,
                at,
                logical_to_physical[one],
                replica_count[one],
                gpu_of_slot,
                node_of_gpu,
                np.zeros((0, 0, 0), np.int64),
                share,
            )
        for t in range(num_tokens):
            here = at[t]
            where[layer, t] = here
            go_on = here
            first = np.int64(-1)
            for k in range(top_k):
                gpus[k] = -1
                expert = np.int64(ids[t, layer, k])
                if expert < 0:
                    continue
                slot = np.int64(logical_to_physical[layer, expert, 0])
                if replica_count[layer, expert] > 1:
                    slot = np.int64(
                        pick_slot(
                            logical_to_physical[layer, expert],
                            replica_count[layer, expert],
                            here,
                            token_idx[t],
                            expert,
                            gpu_of_slot,
                            node_of_gpu,
                            policy,
                            turn,
                            share[0],
                        )
                    )
                slot_tokens[layer, slot] += 1
                gpus[k] = gpu_of_slot[slot]
                if first < 0:
                    first = gpus[k]
                if k == leader[t, layer]:
                    go_on = gpus[k]
            if first < 0:
                continue
            if gpus[leader[t, layer]] < 0:
                go_on = first
            for k in range(top_k):
                gpu = gpus[k]
                seen = gpu < 0
                for j in range(k):
                    if gpus[j] == gpu:
                        seen = True
                if seen:
                    continue
                if gpu != here:
                    out[layer, here, gpu] += 1
                if gpu != go_on:
                    back[layer, gpu, go_on] += 1
            at[t] = go_on
