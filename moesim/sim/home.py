"""What a token's home rank computes: attention, gate, shared experts, dense layers, output head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moesim.cost.curves import Basis, weakest
from moesim.cost.dense import DenseModel
from moesim.cost.step import calibration_of_gpu
from moesim.types import FloatArray

if TYPE_CHECKING:
    from moesim.cluster import Cluster
    from moesim.model.spec import ModelSpec
    from moesim.trace.batches import Batches
    from moesim.trace.format import Trace


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What every rank has of a batch.

    tokens:  [B, G] tokens. count, length: [B, G], so many sequences of that length (context of a
    decode step, prompt tokens of prefill) stand for the rank's sequences. heads: [B, G] rows that
    go through the output head.
    """

    tokens: FloatArray
    count: FloatArray
    length: FloatArray
    heads: FloatArray


@dataclass(frozen=True, slots=True, eq=False)
class HomeTimes:
    """Microseconds of each rank's own work: attention_us [B, L, G] by MoE layer, gate_us and
    shared_us [B, G] in each MoE layer, dense_us [B, G] once a step (dense layers, output head).
    descend_us, ascend_us: [B, G] in each MoE layer, projections around an exchange of reduced
    dimension, zero without one."""

    attention_us: FloatArray
    gate_us: FloatArray
    shared_us: FloatArray
    dense_us: FloatArray
    descend_us: FloatArray
    ascend_us: FloatArray


def rank_rows(
    trace: Trace,
    batches: Batches,
    home: npt.NDArray[np.int32],
    num_gpus: int,
    context_tokens: int | None = None,
) -> Rows:
    """Sequences of every rank.

    decode: one sequence a token; its context is its position in the trace plus one, or
    `context_tokens`. prefill: the tokens of one request on one rank are a prompt of their own
    (what they would attend to elsewhere is left out); prompts of unequal lengths are replaced by
    equal ones with the same number of tokens and of query-key pairs.
    """
    lengths = np.diff(batches.indptr)
    cell = np.repeat(np.arange(len(batches)), lengths) * num_gpus + home
    shape = (len(batches), num_gpus)
    cells = len(batches) * num_gpus
    tokens = np.bincount(cell, minlength=cells).astype(np.float64)
    if batches.phase == "decode":
        context = np.asarray(trace.positions, np.int64)[batches.token_idx] + 1.0
        if context_tokens is not None:
            context[:] = context_tokens
        total = np.bincount(cell, weights=context, minlength=cells)
        mean = np.divide(total, tokens, out=np.zeros(cells), where=tokens > 0)
        whole = tokens.reshape(shape)
        return Rows(whole, whole, mean.reshape(shape), whole)
    request = np.asarray(trace.request_ids, np.int64)[batches.token_idx]
    prompts, size = np.unique(np.stack([cell, request]), axis=1, return_counts=True)
    of_cell = prompts[0]
    pairs = np.bincount(of_cell, weights=size.astype(np.float64) ** 2, minlength=cells)
    length = np.divide(pairs, tokens, out=np.zeros(cells), where=tokens > 0)
    count = np.divide(tokens, length, out=np.zeros(cells), where=length > 0)
    heads = np.bincount(of_cell, minlength=cells).astype(np.float64)
    return Rows(
        tokens.reshape(shape), count.reshape(shape), length.reshape(shape), heads.reshape(shape)
    )


class HomeModel:
    """Times of the home ranks of one model on one cluster, from the calibrations of its GPUs.

    reduce: share of the hidden size that is exchanged; below 1 a projection down before the
    dispatch and one up after the combine are added (BigMac, arXiv:2502.16927: descend, communicate,
    communicate, ascend).
    Layers numbered behind the model's own are for multi-token prediction: attention and a
    projection of hidden state and embedding to one (DeepSeek-V3, arXiv:2412.19437, section 2.2),
    and with them the output head once more, for the drafted token.
    Assumes attention data-parallel (each rank computes its own tokens whole). Ignored: norms,
    rotary embedding, sampling, the router's top-k, copies between kernels.
    """

    def __init__(
        self,
        cluster: Cluster,
        model: ModelSpec,
        layer_ids: tuple[int, ...],
        *,
        reduce: float = 1.0,
    ) -> None:
        self.reduce = reduce
        self.model = model
        self.layer_ids = layer_ids
        self.num_mtp = sum(layer >= model.num_hidden_layers for layer in layer_ids)
        self.speed = np.asarray(cluster.speed_factor, np.float64)
        types = list(dict.fromkeys(gpu.name for gpu in cluster.gpus))
        spec = {gpu.name: gpu for gpu in cluster.gpus}
        self.types: list[DenseModel] = [
            calibration_of_gpu(spec[name], cluster.calibration, len(types) == 1).dense
            for name in types
        ]
        self.type_of_gpu = np.array([types.index(gpu.name) for gpu in cluster.gpus])
        self.basis: Basis = weakest(*(dense.basis for dense in self.types))

    def times(self, rows: Rows, phase: str) -> HomeTimes:
        """Times for `rows`, [B, ...]."""
        batches, gpus = rows.tokens.shape
        model, spec = self.model, self.model.attention
        full, windowed = np.zeros((2, batches, gpus))
        linear, gate, shared, dense_ffn, head, down, up, drafting = np.zeros((8, batches, gpus))
        hidden, dtype = model.hidden_size, model.dense_dtype
        for kind, dense in enumerate(self.types):
            at = np.flatnonzero(self.type_of_gpu == kind)
            tokens, count, length = rows.tokens[:, at], rows.count[:, at], rows.length[:, at]
            layer = dense.decode_us if phase == "decode" else dense.prefill_us
            full[:, at] = layer(count, length, spec, hidden, dense_dtype=dtype)
            if spec.window_tokens:
                windowed[:, at] = layer(
                    count, length, spec, hidden, dense_dtype=dtype, window=spec.window_tokens
                )
            if spec.linear_layer_ids:
                width = max(1, spec.linear_layer_params // hidden)
                linear[:, at] = dense.gemm_us(tokens, width, hidden, dtype)
            if self.num_mtp:
                drafting[:, at] = layer(
                    count, length, spec, hidden, dense_dtype=dtype, window=model.mtp_window
                )
                drafting[:, at] += dense.gemm_us(tokens, hidden, 2 * hidden, dtype)
            gate[:, at] = dense.gemm_us(tokens, model.router_params // hidden, hidden)
            dense_ffn[:, at] = self._ffn_us(dense, tokens, model.dense_intermediate_size)
            shared[:, at] = self._ffn_us(dense, tokens, model.shared_intermediate_size)
            shared[:, at] += model.moe_dense_ffns * dense_ffn[:, at]
            if model.latent_params:
                shared[:, at] += dense.gemm_us(tokens, 2 * model.expert_hidden, hidden)
            head[:, at] = dense.gemm_us(rows.heads[:, at], model.vocab_size, hidden)
            if self.reduce < 1.0:
                narrow = max(1, round(hidden * self.reduce))
                down[:, at] = dense.gemm_us(tokens, narrow, hidden, dtype)
                up[:, at] = dense.gemm_us(tokens, hidden, narrow, dtype)

        def attention(layer_id: int) -> FloatArray:
            if layer_id in spec.absent_layer_ids:
                return np.zeros_like(full)
            if layer_id in spec.linear_layer_ids:
                return linear
            if layer_id >= model.num_hidden_layers:
                return drafting
            return windowed if layer_id in spec.window_layer_ids else full

        per_layer = np.stack([attention(i) for i in self.layer_ids], axis=1)
        dense_layers = set(range(model.num_hidden_layers)) - set(model.moe_layer_ids)
        without = set(model.no_ffn_layer_ids)
        own = (attention(i) + (0.0 if i in without else dense_ffn) for i in sorted(dense_layers))
        once = head * (2 if self.num_mtp else 1) + sum(own, 0.0)
        parts = (per_layer, gate, shared, once, down, up)
        return HomeTimes(*(part / self.speed for part in parts))

    def _ffn_us(self, dense: DenseModel, tokens: FloatArray, width: int) -> FloatArray:
        """A gated feed-forward part of `width`: one GEMM up (gate and up together), one down."""
        model = self.model
        if not width:
            return np.zeros_like(tokens)
        up = dense.gemm_us(
            tokens, (model.ffn_matrices - 1) * width, model.hidden_size, model.dense_dtype
        )
        return up + dense.gemm_us(tokens, model.hidden_size, width, model.dense_dtype)
