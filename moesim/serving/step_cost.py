"""Time of one forward step of a deployment, from the calibrated cost of its parts.

    step = host + head + sum over layers of the slowest DP rank's
           (norms + attention + all-reduce + router + dispatch + experts + combine)

`EngineStepCost` reduces every part to something quick: what depends on a rank's rows alone and what
depends on the tokens of all ranks together are tables; attention is linear in cached tokens and,
for prompts, a smooth maximum of rows and query-key pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from math import ceil
from typing import TYPE_CHECKING, Protocol

import numpy as np

from moesim.choices import MoeComm, Phase
from moesim.cost.curves import power_mean_max, weakest
from moesim.cost.dense import GEMM_SHARPNESS
from moesim.cost.step import BYTES_PER_ELEMENT, KINDS_OF
from moesim.serving.apart import ping_pong_us, spread_of
from moesim.serving.attention_us import attention_terms
from moesim.serving.batch import BatchShape
from moesim.serving.count_table import CountTable, count_grid
from moesim.serving.deployment import calibration_of
from moesim.serving.moe_load import MoeLoad, assumed_load, layer_us, load_of_trace
from moesim.serving.overlap import overlapped_us, sm_share, thresholds
from moesim.solvers.methods.eplb import rebalance_experts
from moesim.types import FloatArray

if TYPE_CHECKING:
    from moesim.cost.calibration import Calibration
    from moesim.cost.collective import CollectiveCurve
    from moesim.cost.curves import Basis
    from moesim.cost.expert_gemm import ExpertGemmModel
    from moesim.serving.deployment import Deployment
    from moesim.serving.engines import EngineProfile

ELEMENT_BYTES = 2.0
SMALL_KERNELS = 4
SMALL_KERNEL_US = 2.0
LINEAR_ATTENTION_KERNELS = 6
HBM_EFFICIENCY = 0.85


class _Sourced(Protocol):
    @property
    def basis(self) -> Basis: ...

    @property
    def source(self) -> str: ...


class EngineStepCost:
    """`step_us(batch)` of one deployment; build once, evaluate often.

    basis: weakest kind of figure it rests on; notes: what was assumed; rests_on: of every part, the
    kind and source of its figures.
    """

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        gpu = deployment.gpu
        self.calibration: Calibration = deployment.calibration or calibration_of(deployment)
        self.notes: list[str] = []
        self._bases: list[Basis] = [deployment.engine.basis, "assumed"]
        self.rests_on: dict[str, None] = {}
        self._hbm = gpu.hbm_gb_per_s * HBM_EFFICIENCY * 1e3
        self._expert_model = self._pick_expert_model()
        self.attention, decode, prefill = attention_terms(deployment, self.calibration.dense)
        self._takes("attention of decodes", decode)
        self._takes("attention of prompts", prefill)
        grid = count_grid(deployment.max_batch_tokens + deployment.max_sequences)
        everyone = count_grid(
            (deployment.max_batch_tokens + deployment.max_sequences) * deployment.dp
        )
        self._rows = {name: CountTable(grid, t) for name, t in self._row_parts(grid).items()}
        self._rows_total = CountTable(grid, sum(t.times_us for t in self._rows.values()))  # type: ignore[arg-type]
        self._moe = {name: CountTable(everyone, t) for name, t in self._moe_parts(everyone).items()}
        self._moe_total = CountTable(everyone, sum(t.times_us for t in self._moe.values()))  # type: ignore[arg-type]
        self._decode_saves = CountTable(everyone, self._saved_us(everyone))
        heads = count_grid(deployment.max_sequences * 2)
        self._head = CountTable(heads, self._head_us(heads))

    def with_engine(self, engine: EngineProfile) -> EngineStepCost:
        """The same kernels under another profile: only the host's constants are taken from it,
        sizes stay those of the deployment."""
        other = copy(self)
        other.deployment = replace(self.deployment, engine=engine)
        more = engine.kernel_us - self.deployment.engine.kernel_us
        more *= self.num_small_kernels
        small = self._rows["elementwise"]
        other._rows = {**self._rows, "elementwise": CountTable(small.counts, small.times_us + more)}
        other._rows_total = CountTable(self._rows_total.counts, self._rows_total.times_us + more)
        return other

    def _takes(self, part: str, model: _Sourced) -> None:
        self._bases.append(model.basis)
        self.rests_on[f"{part}: {model.basis} ({model.source or 'datasheet'})"] = None

    @property
    def basis(self) -> Basis:
        """The weakest kind of figure that the times rest on."""
        return weakest(*self._bases)

    def step_us(self, batch: BatchShape) -> FloatArray:
        """Microseconds of every step of `batch`: shape [...], its arrays without the rank axis."""
        gpu = self._layers_us(batch) + self._head(self._sampled(batch)).max(axis=-1)
        return np.where(batch.rows.sum(axis=-1) > 0, self._with_host(gpu, batch), 0.0)

    def _layers_us(self, batch: BatchShape) -> FloatArray:
        if self.deployment.expert_gpus is not None:
            return self._apart_us(batch)
        compute, comm = self._compute_and_comm_us(batch)
        if self.deployment.two_batch_overlap == "off":
            return compute + comm
        limits, shares = self.overlap[:2], self.overlap[2:4]
        decodes = (batch.prefill_tokens.max(axis=-1) == 0).astype(int)
        compute_half, comm_half = self._compute_and_comm_us(batch.cut(2))
        both = overlapped_us(
            2 * compute_half, 2 * comm_half, shares[decodes], self.deployment.model.num_moe_layers
        )
        return np.where(batch.rows.mean(axis=-1) >= limits[decodes], both, compute + comm)

    def _apart_us(self, batch: BatchShape) -> FloatArray:
        """Whole, or in parts between the pools, whichever is faster."""
        d = self.deployment
        whole = sum(self._own_experts_and_comm_us(batch))
        own, experts, comm = self._own_experts_and_comm_us(batch.cut(d.micro_batches))
        layers = d.model.num_moe_layers
        return np.minimum(whole, ping_pong_us(own, experts, comm, d.micro_batches, layers))

    def _compute_and_comm_us(self, batch: BatchShape) -> tuple[FloatArray, FloatArray]:
        """Of the slowest rank's layers and the experts, and of dispatch and combine."""
        own, experts, comm = self._own_experts_and_comm_us(batch)
        return own + experts, comm

    def _own_experts_and_comm_us(
        self, batch: BatchShape
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Of the slowest rank's layers, of the experts, and of dispatch and combine."""
        total = batch.rows.sum(axis=-1)
        own = self._rows_total(batch.rows) + self._attention_us(batch)
        comm = self._moe["communication"](total)
        return own.max(axis=-1), self._moe_total(total) - comm, comm - self._saved(batch)

    @property
    def overlap(self) -> FloatArray:
        """[5]: thresholds of two-batch overlap and share of the GPU that sending takes, each with
        and without prompt tokens; MoE layers."""
        shares = [sm_share(self._comm(phase)) for phase in ("prefill", "decode")]
        limits = thresholds(self.deployment.two_batch_overlap)
        return np.array([*limits, *shares, float(self.deployment.model.num_moe_layers)])

    def one_us(
        self,
        decode_tokens: Sequence[float],
        decode_context_tokens: Sequence[float],
        prefill_tokens: Sequence[float],
        prefill_pairs: Sequence[float],
        prefill_sequences: Sequence[float],
    ) -> float:
        """`step_us` of one step by plain numbers, one of each a DP rank; quick, nothing checked."""
        if self.deployment.two_batch_overlap != "off" or self.deployment.expert_gpus is not None:
            given = (decode_tokens, decode_context_tokens, prefill_tokens, prefill_pairs)
            return float(self.step_us(BatchShape.of(*given, prefill_sequences)))
        slowest, sampled, total, prefill = 0.0, 0.0, 0.0, False
        for n, context, p, pairs, count in zip(
            decode_tokens,
            decode_context_tokens,
            prefill_tokens,
            prefill_pairs,
            prefill_sequences,
            strict=True,
        ):
            rows = n + p
            if not rows:
                continue
            time = self._rows_total.one(rows)
            for terms in self.attention:
                time += terms.num_layers * terms.one_us(n, context, p, pairs)
            slowest = max(slowest, time)
            sampled = max(sampled, n + count)
            total += rows
            prefill = prefill or p > 0
        if not total:
            return 0.0
        time = slowest + self._moe_total.one(total) + self._head.one(sampled)
        engine = self.deployment.engine
        if not prefill:
            time -= self._decode_saves.one(total)
        if prefill:
            time += engine.eager_layer_us * self.deployment.model.num_hidden_layers
        return time + engine.step_host_us + engine.sequence_host_us * sampled

    def breakdown(self, batch: BatchShape) -> dict[str, FloatArray]:
        """Microseconds by part, of the slowest DP rank; their sum is `step_us`. "overlap" is what
        two-batch overlap, or parts between two pools, save, below 0, of what each takes without."""
        attention = self._attention_us(batch)
        slowest = np.argmax(self._rows_total(batch.rows) + attention, axis=-1)

        def pick(values: FloatArray) -> FloatArray:
            return np.take_along_axis(values, slowest[..., None], axis=-1)[..., 0]

        parts = {name: pick(table(batch.rows)) for name, table in self._rows.items()}
        parts["attention"] = pick(attention)
        total = batch.rows.sum(axis=-1)
        for name, table in self._moe.items():
            parts[name] = parts.get(name, np.zeros(total.shape)) + table(total)
        compute, comm = self._compute_and_comm_us(batch)
        hidden = compute + comm - self._layers_us(batch)
        parts["communication"] = parts["communication"] - self._saved(batch)
        if self.deployment.two_batch_overlap != "off" or self.deployment.expert_gpus is not None:
            parts["overlap"] = -hidden
        parts["head"] = self._head(self._sampled(batch)).max(axis=-1)
        gpu = sum(parts.values(), np.zeros(total.shape))
        parts["host"] = np.where(total > 0, self._with_host(gpu, batch) - gpu, 0.0)
        return parts

    def _saved(self, batch: BatchShape) -> FloatArray:
        """What a step without prompt tokens saves by the all-to-all of decoding."""
        decodes = batch.prefill_tokens.max(axis=-1) == 0
        return np.where(decodes, self._decode_saves(batch.rows.sum(axis=-1)), 0.0)

    def _sampled(self, batch: BatchShape) -> FloatArray:
        return batch.decode_tokens + batch.prefill_sequences

    def _with_host(self, gpu_us: FloatArray, batch: BatchShape) -> FloatArray:
        engine = self.deployment.engine
        prefill = batch.prefill_tokens.max(axis=-1) > 0
        eager = engine.eager_layer_us * self.deployment.model.num_hidden_layers
        busy = gpu_us + np.where(prefill, eager, 0.0)
        sequences = self._sampled(batch).max(axis=-1)
        return busy + engine.step_host_us + engine.sequence_host_us * sequences

    def _attention_us(self, batch: BatchShape) -> FloatArray:
        total = np.zeros(batch.rows.shape)
        for terms in self.attention:
            one = terms.decode_us(batch.decode_tokens, batch.decode_context_tokens)
            one = one + terms.prefill_us(batch.prefill_tokens, batch.prefill_pairs)
            total = total + terms.num_layers * one
        return total

    def _row_parts(self, rows: FloatArray) -> dict[str, FloatArray]:
        """All layers' work of one rank by its rows alone."""
        d, model = self.deployment, self.deployment.model
        hidden = model.hidden_size
        gemm = self.calibration.dense.gemm(d.dense_dtype)
        router = self.calibration.dense.gemm("bf16")
        self._takes("dense layers", gemm)
        self._takes("router and head", router)
        layers, moe_layers = model.num_hidden_layers, model.num_moe_layers
        moved = 8.0 * rows * hidden * ELEMENT_BYTES / self._hbm
        parts = {
            "projections": model.num_kv_layers * self._projections_us(rows),
            "elementwise": d.engine.kernel_us * self.num_small_kernels
            + layers * moved
            + model.num_kv_layers * rows * self._rotary_and_cache_us(),
            "router": moe_layers * router.time_us(rows, model.router_params // hidden, hidden),
        }
        if model.shared_intermediate_size:
            parts["shared_experts"] = moe_layers * self._ffn_us(
                rows, model.shared_intermediate_size
            )
        linear = len(model.attention.linear_layer_ids)
        if linear:
            parts["linear_attention"] = linear * self._linear_attention_us(rows)
        if model.num_dense_ffns:
            parts["dense_ffn"] = model.num_dense_ffns * self._ffn_us(
                rows, model.dense_intermediate_size
            )
        if model.latent_params:
            latent = router.time_us(rows, 2 * model.expert_hidden, hidden)
            parts["latent_projections"] = moe_layers * latent
        parts["communication"] = self._tp_comm_us(rows)
        if d.pp > 1:
            parts["pipeline"] = (d.pp - 1) * self._stage_hop_us(rows)
        return parts

    def _stage_hop_us(self, rows: FloatArray) -> FloatArray:
        """Hidden states and residuals of a rank's rows from one stage to the next, cut over tp."""
        d = self.deployment
        moved = 2.0 * rows * d.model.hidden_size * ELEMENT_BYTES / d.tp
        apart = d.tp * d.dp % d.cluster.gpus_per_node == 0
        curve = self.calibration.collective(
            "p2p", 2, 2 if apart else 1, nic_gb_per_s=d.cluster.nic_gb_per_s
        )
        self._takes("pipeline", curve)
        return curve.time_us(0.0 if apart else moved, moved if apart else 0.0)

    def _rotary_and_cache_us(self) -> float:
        """Of one token in one layer of grouped attention, beyond the kernels' fixed time; a latent
        attention module is measured with them."""
        attention, engine = self.deployment.model.attention, self.deployment.engine
        if attention.kind == "mla":
            return 0.0
        time = engine.cache_write_ns / 1e3
        if engine.rotary_gb_per_s is not None:
            tp = self.deployment.tp
            heads = ceil(attention.num_heads / tp) + ceil(attention.num_kv_heads / tp)
            moved = 2.0 * heads * attention.head_dim * ELEMENT_BYTES
            time += moved / engine.rotary_gb_per_s / 1e3
        return time

    @property
    def num_small_kernels(self) -> int:
        """Small kernels of all layers: two norms each; rotary embedding and cache write of grouped
        attention, and quantising the inputs of its two GEMMs where those are in fp8 (a latent
        attention module is measured with all of them); choosing experts and ordering rows by them;
        the activation of shared experts and dense layers, and quantising their inputs."""
        d, model = self.deployment, self.deployment.model
        quantised = 2 if d.dense_dtype.startswith("fp8") else 0
        count = 2 * model.num_hidden_layers + 2 * model.num_moe_layers
        if model.attention.kind != "mla":
            count += (2 + quantised) * model.num_kv_layers
        with_ffn = model.num_dense_ffns + (
            model.num_moe_layers if model.shared_intermediate_size else 0
        )
        return count + (1 + quantised) * with_ffn

    def _ffn_us(self, rows: FloatArray, width: int) -> FloatArray:
        d, hidden = self.deployment, self.deployment.model.hidden_size
        gemm = self.calibration.dense.gemm(d.dense_dtype)
        cut = max(1, width // d.tp)
        up = gemm.time_us(rows, (d.model.ffn_matrices - 1) * cut, hidden)
        return np.asarray(up + gemm.time_us(rows, hidden, cut), dtype=np.float64)

    def _projections_us(self, rows: FloatArray) -> FloatArray:
        d, model = self.deployment, self.deployment.model
        spec, hidden = model.attention, model.hidden_size
        heads = spec.num_heads // d.tp
        if spec.kind == "mla":
            module = self.calibration.dense.mla_module("prefill", d.dense_dtype, d.kv_dtype)
            cut = replace(spec, num_heads=heads, num_kv_heads=heads)
            weights = float(cut.layer_params(hidden))
            memory = weights * module.weight_bytes_per_param / (module.weight_gb_per_s * 1e3)
            flops = 2.0 * rows * weights / (module.dense_tflops * 1e6)
            return power_mean_max(np.full_like(flops, memory), flops, GEMM_SHARPNESS)
        gemm = self.calibration.dense.gemm(d.dense_dtype)
        kv_heads = ceil(spec.num_kv_heads / d.tp)
        qkv = gemm.time_us(rows, (heads + 2 * kv_heads) * spec.head_dim, hidden)
        return np.asarray(qkv + gemm.time_us(rows, hidden, heads * spec.head_dim), np.float64)

    def _linear_attention_us(self, rows: FloatArray) -> FloatArray:
        """One layer of linear attention: its projections, and its small kernels' launches. Its
        state, read and written once a sequence, is not in the model's description and ignored."""
        d, model = self.deployment, self.deployment.model
        width = max(1, model.attention.linear_layer_params // (model.hidden_size * d.tp))
        gemm = self.calibration.dense.gemm(d.dense_dtype)
        kernels = LINEAR_ATTENTION_KERNELS * SMALL_KERNEL_US
        return np.asarray(gemm.time_us(rows, width, model.hidden_size) + kernels, np.float64)

    def _tp_comm_us(self, rows: FloatArray) -> FloatArray:
        """All-reduces over TP: one after attention, one after dense layers; the embedding's."""
        d, model = self.deployment, self.deployment.model
        if d.tp == 1:
            return np.zeros_like(rows)
        count = model.num_mixing_layers + model.num_dense_ffns + 1
        curve = self._curve("all_reduce", d.tp)
        return np.asarray(count * curve.time_us(rows * model.hidden_size * ELEMENT_BYTES))

    def _curve(self, kind: str, group: int) -> CollectiveCurve:
        cluster = self.deployment.cluster
        nodes = max(1, ceil(group / cluster.gpus_per_node))
        routes = cluster.routes()
        nics = routes.link_gb_per_s[routes.link_class == routes.link_class_names.index("nic")]
        nic = float(nics.min()) if len(nics) else None
        curve = self.calibration.collective(kind, group, nodes, nic_gb_per_s=nic)
        self._takes(kind, curve)
        return curve

    def _moe_parts(self, tokens: FloatArray) -> dict[str, FloatArray]:
        """All MoE layers by the tokens of all ranks together."""
        layers = self.deployment.model.num_moe_layers
        load = self.expert_load
        experts = np.array([self.expert_layer_us(n, load) for n in tokens])
        return {
            "experts": layers * np.maximum.accumulate(experts),
            "communication": layers * self._moe_comm_us(tokens, self._comm("prefill")),
        }

    def _saved_us(self, tokens: FloatArray) -> FloatArray:
        """All MoE layers' communication in a step with prompt tokens less that in one without."""
        if self._comm("prefill") == self._comm("decode"):
            return np.zeros_like(tokens)
        both = [self._moe_comm_us(tokens, self._comm(phase)) for phase in ("prefill", "decode")]
        return self.deployment.model.num_moe_layers * (both[0] - both[1])

    def _comm(self, phase: Phase) -> MoeComm:
        comm = self.deployment.moe_comm
        if comm != "deepep_auto":
            return comm
        return "deepep" if phase == "prefill" else "deepep_ll"

    @property
    def moe_counts(self) -> FloatArray:
        """Token counts of all ranks that the MoE tables are made for."""
        return self._moe_total.counts

    @cached_property
    def expert_load(self) -> MoeLoad:
        """Popularity of the experts: the trace's, or assumed."""
        d, model = self.deployment, self.deployment.model
        if d.trace is None:
            return assumed_load(model.num_experts, model.real_top_k).spread(d.imbalance_scale)
        return load_of_trace(d.trace).spread(d.imbalance_scale)

    def expert_layer_us(self, num_tokens: float, load: MoeLoad) -> float:
        """One MoE layer's experts for `num_tokens` of all ranks, on the slowest GPU."""
        d, model, kernel = self.deployment, self.deployment.model, self._expert_model
        gpu_of_slot, expert_of_slot, share = self._slots
        width = max(1, model.moe_intermediate_size // d.moe_tp)
        work = layer_us(
            load,
            kernel,
            num_tokens,
            model.expert_hidden,
            width,
            model.ffn_matrices,
            gpu_of_slot,
            expert_of_slot,
            share,
        )
        everyone = d.moe_comm in ("all_reduce", "all_gather")
        groups = d.ep if d.expert_gpus is not None else d.dp
        local = num_tokens if everyone else num_tokens / groups
        return (
            kernel.layer_launch_us()
            + work
            + kernel.token_overhead_us(local, model.real_top_k, model.expert_hidden)
        )

    @cached_property
    def _slots(self) -> tuple[np.ndarray, np.ndarray, FloatArray]:
        """Of every slot: GPU [P], expert [layers, P] and its share of that one's tokens."""
        d, model = self.deployment, self.deployment.model
        load = self.expert_load
        num_layers = len(load.inclusion)
        if d.redundant_experts is not None:
            num_slots = model.num_experts + d.redundant_experts
            nodes = ceil(d.ep / d.cluster.gpus_per_node)
            nodes = nodes if d.ep % nodes == 0 else 1
            table = rebalance_experts(load.inclusion, num_slots, 1, nodes, d.ep)
            copies = np.stack([np.bincount(row, minlength=model.num_experts) for row in table])
            share = 1.0 / np.take_along_axis(copies, table, axis=1)
            return np.arange(num_slots) * d.ep // num_slots, table, share
        if d.plan is None:
            expert = np.tile(np.arange(model.num_experts), (num_layers, 1))
            gpu = np.arange(model.num_experts) * d.ep // model.num_experts
            return gpu, expert, np.ones(expert.shape)
        placement = d.plan.placement
        picked = np.arange(num_layers) % placement.num_layers
        table = placement.physical_to_logical[picked]
        share = 1.0 / np.take_along_axis(
            placement.replica_count[picked], np.maximum(table, 0), axis=1
        )
        gpu = np.arange(placement.num_slots) // placement.slots_per_gpu
        return gpu, np.maximum(table, 0), np.where(table >= 0, share, 0.0)

    def _moe_comm_us(self, tokens: FloatArray, comm: MoeComm) -> FloatArray:
        """Dispatch and combine of one MoE layer; `tokens` of all ranks, evenly spread."""
        d, model = self.deployment, self.deployment.model
        group = d.tp * d.dp + (d.expert_gpus or 0)
        if group == 1:
            return np.zeros_like(tokens)
        row = model.hidden_size * ELEMENT_BYTES
        if comm == "all_reduce":
            return np.asarray(self._curve("all_reduce", group).time_us(tokens * row))
        if comm == "all_gather":
            share = tokens * row * (group - 1) / group
            gather = self._curve("all_gather", group).time_us(share)
            return np.asarray(gather + self._curve("reduce_scatter", group).time_us(share))
        row = model.expert_hidden * ELEMENT_BYTES
        dispatch, combine = (self._curve(kind, group) for kind in KINDS_OF[comm])
        way = spread_of(d)
        per_gpu = tokens / way.senders
        fan_out, nodes = (
            n * (1.0 - (1.0 - 1.0 / n) ** model.real_top_k) for n in (way.receivers, way.nodes)
        )
        copies = float(model.real_top_k) if comm == "deepep_ll" else fan_out
        sent = per_gpu * copies * way.elsewhere
        nic = per_gpu * (nodes if comm == "deepep" else copies) * way.other_nodes
        there = model.expert_hidden * BYTES_PER_ELEMENT["fp8" if "deepep" in comm else "bf16"]
        time = dispatch.time_us(sent * there, nic * there)
        return np.asarray(time + combine.time_us(sent * row, nic * row), dtype=np.float64)

    def _pick_expert_model(self) -> ExpertGemmModel:
        d = self.deployment
        calibration = (
            self.calibration
            if d.calibration is not None or d.expert_gpu == d.gpu
            else calibration_of(d, d.expert_gpu)
        )
        names = {"mxfp4": ("mxfp4",), "nvfp4": ("nvfp4", "mxfp4"), "fp16": ("fp16", "bf16")}
        known = {dtype for dtype, _ in calibration.experts}
        wanted = names.get(d.expert_dtype, (d.expert_dtype,))
        dtype = next((n for n in wanted if n in known), wanted[-1])
        shape = (d.model.expert_hidden, d.model.moe_intermediate_size // d.moe_tp)
        own = f"{d.engine.name}_{'ep' if d.ep > 1 else 'tp'}"
        kernel = own if (dtype, own) in calibration.experts else None
        model = calibration.expert_ffn(dtype, kernel, shape=shape)
        self._takes("experts", model)
        return model

    def _head_us(self, rows: FloatArray) -> FloatArray:
        """Final norm, output head cut over TP, gathering its logits; `rows` sampled tokens."""
        d, model = self.deployment, self.deployment.model
        gemm = self.calibration.dense.gemm("bf16")
        time = gemm.time_us(rows, ceil(model.vocab_size / d.tp), model.hidden_size)
        if d.tp > 1:
            share = rows * model.vocab_size * ELEMENT_BYTES * (d.tp - 1) / d.tp
            time = time + self._curve("all_gather", d.tp).time_us(share)
        return np.asarray(time + SMALL_KERNELS * SMALL_KERNEL_US, dtype=np.float64)
