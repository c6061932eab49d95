"""All that a DP rank computes by its rows alone: projections, norms, router, shared experts, dense
layers and its tensor-parallel exchanges; the output head."""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from moesim.cost.curves import power_mean_max
from moesim.cost.dense import GEMM_SHARPNESS
from moesim.serving.step_parts import ELEMENT_BYTES, Parts
from moesim.types import FloatArray

if TYPE_CHECKING:
    from moesim.model.spec import ModelSpec

SMALL_KERNELS = 4
SMALL_KERNEL_US = 2.0
LINEAR_ATTENTION_KERNELS = 6
HBM_EFFICIENCY = 0.85


class LayerCounts(NamedTuple):
    """Layers of a kind: all, those with experts, attention blocks with a KV cache, layers that mix
    tokens, dense feed-forward parts, layers of linear attention."""

    layers: int
    moe: int
    kv: int
    mixing: int
    dense_ffns: int
    linear: int

    @classmethod
    def of(cls, model: ModelSpec) -> LayerCounts:
        return cls(
            model.num_hidden_layers,
            model.num_moe_layers,
            model.num_kv_layers,
            model.num_mixing_layers,
            model.num_dense_ffns,
            len(model.attention.linear_layer_ids),
        )

    @classmethod
    def of_drafting(cls, model: ModelSpec) -> LayerCounts:
        """The one multi-token-prediction layer that drafts."""
        has_experts = int(model.mtp_moe_layers > 0)
        return cls(1, has_experts, 1, 1, 1 - has_experts, 0)


class RowCost(Parts):
    """Microseconds by rows of one rank, shape [rows]."""

    __slots__ = ()

    def parts(self, rows: FloatArray) -> dict[str, FloatArray]:
        """All layers of the model, by part."""
        d, model = self.deployment, self.deployment.model
        counts = LayerCounts.of(model)
        parts = self._of_layers(rows, counts)
        if counts.linear:
            parts["linear_attention"] = counts.linear * self._linear_attention_us(rows)
        if d.pp > 1:
            parts["pipeline"] = (d.pp - 1) * self._stage_hop_us(rows)
        return parts

    def drafting_us(self, rows: FloatArray) -> FloatArray:
        """The multi-token-prediction layer, with the projection of hidden state and embedding to
        one (DeepSeek-V3, arXiv:2412.19437, section 2.2)."""
        model = self.deployment.model
        gemm = self.calibration.dense.gemm(self.deployment.dense_dtype)
        joined = gemm.time_us(rows, model.hidden_size, 2 * model.hidden_size)
        parts = self._of_layers(rows, LayerCounts.of_drafting(model))
        return np.asarray(joined + sum(parts.values()), np.float64)

    def head_us(self, rows: FloatArray) -> FloatArray:
        """Final norm, output head cut over TP, gathering its logits; `rows` sampled tokens."""
        d, model = self.deployment, self.deployment.model
        gemm = self.calibration.dense.gemm("bf16")
        time = gemm.time_us(rows, ceil(model.vocab_size / d.tp), model.hidden_size)
        if d.tp > 1:
            share = rows * model.vocab_size * ELEMENT_BYTES * (d.tp - 1) / d.tp
            time = time + self.curve("all_gather", d.tp).time_us(share)
        return np.asarray(time + SMALL_KERNELS * SMALL_KERNEL_US, dtype=np.float64)

    def num_small_kernels(self, counts: LayerCounts) -> int:
        """Small kernels of layers: two norms each; rotary embedding and cache write of grouped
        attention, and quantising the inputs of its two GEMMs where those are in fp8 (a latent
        attention module is measured with all of them); choosing experts and ordering rows by them;
        the activation of shared experts and dense layers, and quantising their inputs."""
        d, model = self.deployment, self.deployment.model
        quantised = 2 if d.dense_dtype.startswith("fp8") else 0
        count = 2 * counts.layers + 2 * counts.moe
        if model.attention.kind != "mla":
            count += (2 + quantised) * counts.kv
        shared = counts.moe if model.shared_intermediate_size else 0
        return count + (1 + quantised) * (counts.dense_ffns + shared)

    def _of_layers(self, rows: FloatArray, counts: LayerCounts) -> dict[str, FloatArray]:
        d, model = self.deployment, self.deployment.model
        hidden = model.hidden_size
        router = self.calibration.dense.gemm("bf16")
        self.sources.takes("dense layers", self.calibration.dense.gemm(d.dense_dtype))
        self.sources.takes("router and head", router)
        hbm = d.gpu.hbm_gb_per_s * d.speed * HBM_EFFICIENCY * 1e3
        moved = 8.0 * rows * hidden * ELEMENT_BYTES / hbm
        parts = {
            "projections": counts.kv * self._projections_us(rows),
            "elementwise": d.engine.kernel_us * self.num_small_kernels(counts)
            + counts.layers * moved
            + counts.kv * rows * self._rotary_and_cache_us(),
            "router": counts.moe * router.time_us(rows, model.router_params // hidden, hidden),
        }
        if model.shared_intermediate_size and counts.moe:
            parts["shared_experts"] = counts.moe * self._ffn_us(
                rows, model.shared_intermediate_size
            )
        if counts.dense_ffns:
            parts["dense_ffn"] = counts.dense_ffns * self._ffn_us(
                rows, model.dense_intermediate_size
            )
        if model.latent_params and counts.moe:
            latent = router.time_us(rows, 2 * model.expert_hidden, hidden)
            parts["latent_projections"] = counts.moe * latent
        parts["communication"] = self._tp_comm_us(rows, counts)
        return parts

    def _stage_hop_us(self, rows: FloatArray) -> FloatArray:
        """Hidden states and residuals of a rank's rows from one stage to the next, cut over tp."""
        d = self.deployment
        moved = 2.0 * rows * d.model.hidden_size * ELEMENT_BYTES / d.tp
        apart = d.tp * d.dp % d.cluster.gpus_per_node == 0
        curve = self.calibration.collective(
            "p2p", 2, 2 if apart else 1, nic_gb_per_s=d.cluster.nic_gb_per_s
        )
        self.sources.takes("pipeline", curve)
        return curve.time_us(0.0 if apart else moved, moved if apart else 0.0)

    def _rotary_and_cache_us(self) -> float:
        """Of one token in one layer of grouped attention, beyond the kernels' fixed time; a latent
        attention module is measured with them."""
        d = self.deployment
        attention, engine = d.model.attention, d.engine
        if attention.kind == "mla":
            return 0.0
        time = engine.cache_write_ns / 1e3 / d.speed
        if engine.rotary_gb_per_s is not None:
            heads = ceil(attention.num_heads / d.tp) + ceil(attention.num_kv_heads / d.tp)
            moved = 2.0 * heads * attention.head_dim * ELEMENT_BYTES
            time += moved / (engine.rotary_gb_per_s * d.speed) / 1e3
        return time

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

    def _tp_comm_us(self, rows: FloatArray, counts: LayerCounts) -> FloatArray:
        """All-reduces over TP: one after attention, one after dense layers; the embedding's."""
        d, model = self.deployment, self.deployment.model
        if d.tp == 1:
            return np.zeros_like(rows)
        count = counts.mixing + counts.dense_ffns + 1
        curve = self.curve("all_reduce", d.tp)
        return np.asarray(count * curve.time_us(rows * model.hidden_size * ELEMENT_BYTES))
