"""The MoE part of a step, by the tokens of all ranks: routed experts, dispatch and combine.

GPUs of an expert group may be of different types and speeds: each expert-parallel rank computes
with the kernels of its slowest GPU, and the slowest rank counts.
"""

from __future__ import annotations

from functools import cached_property
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moesim.choices import MoeComm, Phase
from moesim.cost.library import DEDUP_OF, KINDS_OF, dispatch_dtype_of
from moesim.cost.scaled import faster_calibration
from moesim.cost.step import BYTES_PER_ELEMENT
from moesim.serving.apart import spread_of
from moesim.serving.deployment import calibration_of
from moesim.serving.moe_load import ExpertSlots, MoeLoad, assumed_load, layer_us, load_of_trace
from moesim.serving.step_parts import ELEMENT_BYTES, Parts
from moesim.solvers.methods.eplb import rebalance_experts
from moesim.types import FloatArray, IntArray

if TYPE_CHECKING:
    from moesim.cluster import GpuSpec
    from moesim.cost.calibration import Calibration
    from moesim.cost.expert_gemm import ExpertGemmModel

_STANDS_IN = {"mxfp4": ("mxfp4",), "nvfp4": ("nvfp4", "mxfp4"), "fp16": ("fp16", "bf16")}


class ExpertRanks(NamedTuple):
    """Kernels of the expert-parallel ranks: `kind` [ep] is an index into `models`."""

    models: tuple[ExpertGemmModel, ...]
    kind: IntArray


class MoeCost(Parts):
    """Microseconds of all MoE layers together, by the tokens of all ranks."""

    def parts(self, tokens: FloatArray) -> dict[str, FloatArray]:
        """By part, for steps with prompt tokens."""
        layers = self.deployment.model.num_moe_layers
        experts = np.array([self.experts_us(n, self.load) for n in tokens])
        return {
            "experts": layers * np.maximum.accumulate(experts),
            "communication": layers * self._exchange_us(tokens, self.comm("prefill")),
        }

    def saved_us(self, tokens: FloatArray) -> FloatArray:
        """Communication in a step with prompt tokens less that in one without."""
        if self.comm("prefill") == self.comm("decode"):
            return np.zeros_like(tokens)
        both = [self._exchange_us(tokens, self.comm(phase)) for phase in ("prefill", "decode")]
        return self.deployment.model.num_moe_layers * (both[0] - both[1])

    def comm(self, phase: Phase) -> MoeComm:
        """The exchange of a phase."""
        comm = self.deployment.moe_comm
        if comm != "deepep_auto":
            return comm
        return "deepep" if phase == "prefill" else "deepep_ll"

    @cached_property
    def ranks(self) -> ExpertRanks:
        """Of every expert-parallel rank its slowest GPU's kernels, at that GPU's speed."""
        d = self.deployment
        speed = d.cluster.speed_factor
        models: dict[tuple[str, float], ExpertGemmModel] = {}
        kinds: list[tuple[str, float]] = []
        for gpus in d.expert_ranks:
            slowest = d.slowest_of(gpus)
            gpu, factor = d.cluster.gpus[slowest], float(speed[slowest])
            kinds.append((gpu.name, factor))
            if kinds[-1] not in models:
                own = faster_calibration(self._kernels_of(gpu), compute=factor)
                models[kinds[-1]] = self._expert_model(own)
        order = list(models)
        for (name, _), model in models.items():
            self.sources.takes("experts" if len(models) == 1 else f"experts on {name}", model)
        return ExpertRanks(tuple(models.values()), np.array([order.index(k) for k in kinds]))

    def _kernels_of(self, gpu: GpuSpec) -> Calibration:
        d = self.deployment
        return d.calibration or calibration_of(d, gpu)

    def _expert_model(self, calibration: Calibration) -> ExpertGemmModel:
        d = self.deployment
        known = {dtype for dtype, _ in calibration.experts}
        wanted = _STANDS_IN.get(d.expert_dtype, (d.expert_dtype,))
        dtype = next((n for n in wanted if n in known), wanted[-1])
        shape = (d.model.expert_hidden, d.model.moe_intermediate_size // d.moe_tp)
        own = f"{d.engine.name}_{'ep' if d.ep > 1 else 'tp'}"
        kernel = own if (dtype, own) in calibration.experts else None
        return calibration.expert_ffn(dtype, kernel, shape=shape)

    def experts_us(self, num_tokens: float, load: MoeLoad) -> float:
        """One MoE layer's experts for `num_tokens` of all ranks, on the slowest rank."""
        d, model = self.deployment, self.deployment.model
        everyone = d.moe_comm in ("all_reduce", "all_gather")
        groups = d.ep if d.expert_gpus is not None else d.dp
        return layer_us(
            load,
            self.ranks.models,
            self.ranks.kind,
            self._slots,
            num_tokens,
            num_tokens if everyone else num_tokens / groups,
            model.real_top_k,
            (
                model.expert_hidden,
                max(1, model.moe_intermediate_size // d.moe_tp),
                model.ffn_matrices,
            ),
        )

    @cached_property
    def load(self) -> MoeLoad:
        """Popularity of the experts: the trace's, or assumed."""
        d, model = self.deployment, self.deployment.model
        if d.trace is None:
            return assumed_load(model.num_experts, model.real_top_k).spread(d.imbalance_scale)
        return load_of_trace(d.trace).spread(d.imbalance_scale)

    @cached_property
    def _slots(self) -> ExpertSlots:
        d, model = self.deployment, self.deployment.model
        num_layers = len(self.load.inclusion)
        if d.redundant_experts is not None:
            num_slots = model.num_experts + d.redundant_experts
            nodes = ceil(d.ep / d.cluster.gpus_per_node)
            nodes = nodes if d.ep % nodes == 0 else 1
            table = rebalance_experts(self.load.inclusion, num_slots, 1, nodes, d.ep)
            copies = np.stack([np.bincount(row, minlength=model.num_experts) for row in table])
            share = 1.0 / np.take_along_axis(copies, table, axis=1)
            rank = np.arange(num_slots) * d.ep // num_slots
            return ExpertSlots(rank, table.astype(np.int64), share)
        if d.plan is None:
            expert = np.tile(np.arange(model.num_experts), (num_layers, 1))
            gpu = np.arange(model.num_experts) * d.ep // model.num_experts
            return ExpertSlots(gpu, expert, np.ones(expert.shape))
        placement = d.plan.placement
        picked = np.arange(num_layers) % placement.num_layers
        table = placement.physical_to_logical[picked]
        share = 1.0 / np.take_along_axis(
            placement.replica_count[picked], np.maximum(table, 0), axis=1
        )
        gpu = np.arange(placement.num_slots) // placement.slots_per_gpu
        held = np.maximum(table, 0).astype(np.int64)
        return ExpertSlots(gpu, held, np.where(table >= 0, share, 0.0))

    @cached_property
    def links(self) -> Calibration:
        """The exchange's kernels."""
        slowest = self.deployment.link_gpu
        return self.calibration if slowest == self.deployment.gpu else self._kernels_of(slowest)

    def _exchange_us(self, tokens: FloatArray, comm: MoeComm) -> FloatArray:
        """Dispatch and combine of one MoE layer; `tokens` of all ranks, evenly spread."""
        d, model = self.deployment, self.deployment.model
        group = d.tp * d.dp + (d.expert_gpus or 0)
        if group == 1:
            return np.zeros_like(tokens)
        row = model.hidden_size * ELEMENT_BYTES
        if comm == "all_reduce":
            return np.asarray(self.curve("all_reduce", group, self.links).time_us(tokens * row))
        if comm == "all_gather":
            share = tokens * row * (group - 1) / group
            gather = self.curve("all_gather", group, self.links).time_us(share)
            scatter = self.curve("reduce_scatter", group, self.links)
            return np.asarray(gather + scatter.time_us(share))
        if comm == "deepep_ll":
            return self._in_rounds(tokens)
        return self._all_to_all_us(tokens, comm)

    def _in_rounds(self, tokens: FloatArray) -> FloatArray:
        """Low-latency exchange of no more rows per GPU at once than its buffers hold."""
        d = self.deployment
        most = float(d.dispatch_tokens * d.tp * d.dp)
        whole = np.floor(tokens / most)
        rest = tokens - whole * most
        full = self._all_to_all_us(np.array([most]), "deepep_ll")[0]
        last = np.where(rest > 0, self._all_to_all_us(rest, "deepep_ll"), 0.0)
        return np.asarray(whole * full + last, np.float64)

    def _all_to_all_us(self, tokens: FloatArray, comm: MoeComm) -> FloatArray:
        """Rows go evenly out of their ranks; the busiest rank, or node, receives the most, and
        sends it back in combine."""
        d, model = self.deployment, self.deployment.model
        group = d.tp * d.dp + (d.expert_gpus or 0)
        row = model.expert_hidden * ELEMENT_BYTES
        dispatch, combine = (self.curve(kind, group, self.links) for kind in KINDS_OF[comm])
        way = spread_of(d)
        per_gpu = tokens / way.senders
        fan_out, nodes = (
            n * (1.0 - (1.0 - 1.0 / n) ** model.real_top_k) for n in (way.receivers, way.nodes)
        )
        copies = float(model.real_top_k) if comm == "deepep_ll" else fan_out
        rank_skew, node_skew = self._receives_more(way.nodes, once=comm != "deepep_ll")
        sent = per_gpu * copies * way.elsewhere * rank_skew
        nic = per_gpu * way.other_nodes
        nic = nic * (nodes * node_skew if DEDUP_OF[comm] == "node" else copies * rank_skew)
        there = model.expert_hidden * BYTES_PER_ELEMENT[dispatch_dtype_of(comm, d.expert_dtype)]
        time = dispatch.time_us(sent * there, nic * there)
        return np.asarray(time + combine.time_us(sent * row, nic * row), dtype=np.float64)

    @property
    def chosen_share(self) -> FloatArray:
        """[X, ep]: the probability that a rank holds an expert that a token chooses, in each of the
        sampled layers."""
        own = self._slots.tokens_by_rank(self.load.inclusion)
        return np.asarray(1.0 - np.prod(1.0 - own, axis=2), np.float64)

    @property
    def chosen_by_rank(self) -> FloatArray:
        """[X, ep]: experts of a token that a rank holds, the mean, in the sampled layers."""
        own = self._slots.tokens_by_rank(self.load.inclusion)
        return np.asarray(own.sum(axis=2), np.float64)

    def _receives_more(self, num_nodes: int, *, once: bool) -> tuple[float, float]:
        """Rows that the busiest rank, and node, receives over the mean one's, averaged over layers;
        a row once where several of its experts are there, or once for each."""
        own = self._slots.tokens_by_rank(self.load.inclusion)
        ranks = self.chosen_share if once else self.chosen_by_rank
        cut = [part for part in np.array_split(own, num_nodes, axis=1) if part.shape[1]]
        nodes = np.stack([1.0 - np.prod(1.0 - part, axis=(1, 2)) for part in cut], axis=1)
        return tuple(float((x.max(axis=1) / x.mean(axis=1)).mean()) for x in (ranks, nodes))  # type: ignore[return-value]
