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
from operator import add
from typing import TYPE_CHECKING

import numpy as np

from moesim.cost.scaled import faster_calibration
from moesim.serving.apart import ping_pong_us
from moesim.serving.attention_us import attention_terms
from moesim.serving.batch import BatchShape
from moesim.serving.count_table import CountTable, count_grid
from moesim.serving.deployment import calibration_of
from moesim.serving.graphs import computed_rows, graph_limit, graph_rows
from moesim.serving.moe_cost import MoeCost
from moesim.serving.overlap import overlapped_us, sm_share, thresholds
from moesim.serving.row_cost import LayerCounts, RowCost
from moesim.serving.step_parts import Sources
from moesim.types import FloatArray

if TYPE_CHECKING:
    from moesim.cost.curves import Basis
    from moesim.serving.deployment import Deployment
    from moesim.serving.engines import EngineProfile


class EngineStepCost:
    """`step_us(batch)` of one deployment; build once, evaluate often.

    basis: weakest kind of figure it rests on; notes: what was assumed; rests_on: of every part, the
    kind and source of its figures.
    """

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = d = deployment
        kernels = d.calibration or calibration_of(d)
        self.calibration = faster_calibration(kernels, compute=d.speed)
        self.notes: list[str] = []
        self._sources = Sources([d.engine.basis, "assumed"])
        self._of_rows = RowCost(d, self.calibration, self._sources)
        self._of_moe = MoeCost(d, self.calibration, self._sources)
        self.attention, decode, prefill = attention_terms(d, self.calibration.dense)
        self._sources.takes("attention of decodes", decode)
        self._sources.takes("attention of prompts", prefill)
        chosen = self.calibration.dense.indexed_module("prefill", d.kv_dtype)
        if chosen is not None and any(terms.chosen for terms in self.attention):
            self._sources.takes("attention to chosen keys", chosen)
        grid = count_grid(d.max_batch_tokens + d.max_sequences)
        everyone = count_grid((d.max_batch_tokens + d.max_sequences) * d.dp)
        parts = self._of_rows.parts(grid)
        self._rows = {name: CountTable(grid, t) for name, t in parts.items()}
        self._rows_total = CountTable(grid, sum(t.times_us for t in self._rows.values()))  # type: ignore[arg-type]
        parts = self._of_moe.parts(everyone)
        self._moe = {name: CountTable(everyone, t) for name, t in parts.items()}
        self._moe_total = CountTable(everyone, sum(t.times_us for t in self._moe.values()))  # type: ignore[arg-type]
        self._decode_saves = CountTable(everyone, self._of_moe.saved_us(everyone))
        heads = count_grid(d.max_sequences * 2)
        self._head = CountTable(heads, self._of_rows.head_us(heads))
        drafting = self._of_rows.drafting_us(grid) if d.mtp else np.zeros_like(grid)
        self._drafting = CountTable(grid, drafting)
        self.graph_limit = graph_limit(d)
        if d.is_mixed:
            self.notes.append(
                f"GPUs of different speed in one engine: attention as on {d.gpu.name}, the"
                " slowest; experts as on each rank's own"
            )

    def with_engine(self, engine: EngineProfile) -> EngineStepCost:
        """The same kernels under another profile: only the host's constants are taken from it,
        sizes stay those of the deployment."""
        other = copy(self)
        d = self.deployment
        other.deployment = replace(d, engine=engine)
        more = engine.kernel_us - d.engine.kernel_us

        def shifted(table: CountTable, counts: LayerCounts) -> CountTable:
            add = more * self._of_rows.num_small_kernels(counts)
            return CountTable(table.counts, table.times_us + add)

        counts = LayerCounts.of(d.model)
        small = shifted(self._rows["elementwise"], counts)
        other._rows = {**self._rows, "elementwise": small}
        other._rows_total = shifted(self._rows_total, counts)
        if d.mtp:
            other._drafting = shifted(self._drafting, LayerCounts.of_drafting(d.model))
        return other

    @property
    def basis(self) -> Basis:
        """The weakest kind of figure that the times rest on."""
        return self._sources.basis

    @property
    def rests_on(self) -> dict[str, None]:
        """Of every part, the kind and source of its figures."""
        return self._sources.rests_on

    @property
    def moe_counts(self) -> FloatArray:
        """Token counts of all ranks that the MoE tables are made for."""
        return self._moe_total.counts

    @property
    def experts(self) -> MoeCost:
        """What the MoE part of a step costs."""
        return self._of_moe

    @property
    def num_small_kernels(self) -> int:
        """Small kernels of all layers of the model."""
        return self._of_rows.num_small_kernels(LayerCounts.of(self.deployment.model))

    @property
    def drafting(self) -> tuple[float, int, float]:
        """Whether a multi-token-prediction layer drafts (1 or 0); the place of its attention in
        `attention`; the share of all MoE layers' time that its experts and exchange take."""
        model = self.deployment.model
        windows = [term.window for term in self.attention]
        place = windows.index(model.mtp_window) if model.mtp_window in windows else 0
        share = 1.0 / model.num_moe_layers if model.mtp_moe_layers else 0.0
        return float(self.deployment.mtp), place, share

    def step_us(self, batch: BatchShape) -> FloatArray:
        """Microseconds of every step of `batch`: shape [...], its arrays without the rank axis."""
        gpu = self._layers_us(batch) + self._head(self._sampled(batch)).max(axis=-1)
        return np.where(batch.rows.sum(axis=-1) > 0, self._with_host(gpu, batch), 0.0)

    def _layers_us(self, batch: BatchShape) -> FloatArray:
        if self.deployment.expert_gpus is not None:
            return self._apart_us(batch)
        rows = self._computed(batch)
        compute, comm = self._compute_and_comm_us(batch, rows)
        if self.deployment.two_batch_overlap == "off":
            return compute + comm
        limits, shares = self.overlap[:2], self.overlap[2:4]
        decodes = (batch.prefill_tokens.max(axis=-1) == 0).astype(int)
        compute_half, comm_half = self._compute_and_comm_us(batch.cut(2), rows / 2)
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

    def _computed(self, batch: BatchShape) -> FloatArray:
        """`[..., D]`: rows that every rank computes, those that graphs add included."""
        return computed_rows(batch.rows, self.graph_limit)

    def _compute_and_comm_us(
        self, batch: BatchShape, rows: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Of the slowest rank's layers and the experts, and of dispatch and combine."""
        own, experts, comm = self._own_experts_and_comm_us(batch, rows)
        return own + experts, comm

    def _own_experts_and_comm_us(
        self, batch: BatchShape, rows: FloatArray | None = None
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Of the slowest rank's layers, of the experts, and of dispatch and combine; `rows` where
        ranks compute others than the batch's."""
        rows = batch.rows if rows is None else rows
        total = rows.sum(axis=-1)
        own = self._rows_total(rows) + self._attention_us(batch)
        comm = self._moe["communication"](total)
        return own.max(axis=-1), self._moe_total(total) - comm, comm - self._saved(batch, total)

    @property
    def overlap(self) -> FloatArray:
        """[5]: thresholds of two-batch overlap and share of the GPU that sending takes, each with
        and without prompt tokens; MoE layers."""
        shares = [sm_share(self._of_moe.comm(phase)) for phase in ("prefill", "decode")]
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
        largest = max(map(add, decode_tokens, prefill_tokens))
        graph = graph_rows(largest, self.graph_limit) if largest <= self.graph_limit else 0.0
        for n, context, p, pairs, count in zip(
            decode_tokens,
            decode_context_tokens,
            prefill_tokens,
            prefill_pairs,
            prefill_sequences,
            strict=True,
        ):
            rows = n + p
            rows = graph or rows
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
        if prefill and not graph:
            layers = self.deployment.model.num_hidden_layers
            time = max(time + engine.prompt_added_us(layers), engine.prompt_least_us(layers))
        return time + engine.step_host_us + engine.sequence_host_us * sampled

    def drafting_us(self, batch: BatchShape, drafts: int, again: float) -> FloatArray:
        """Microseconds that the multi-token-prediction layer takes in a step that verifies `drafts`
        tokens of each decoding sequence of `batch`, shape [...]; 0 where none drafts.

        The layer computes every row of the step once, since it keeps a cache of its own, and gives
        the first draft; each further one is a pass over one row per sequence. Each draft takes the
        output head. One layer makes all drafts, as vLLM has it (vllm-project/vllm issue 52688).
        again: cached tokens are read so many more times for each draft (see `step_table.step_us`).
        """
        if not self.deployment.mtp:
            return np.zeros(batch.rows.shape[:-1])
        tokens = batch.decode_tokens
        verified = replace(
            batch,
            decode_tokens=tokens * (1.0 + drafts),
            decode_context_tokens=batch.decode_context_tokens * (1.0 + again * drafts),
        )
        none = np.zeros_like(tokens)
        alone = BatchShape(tokens, batch.decode_context_tokens, none, none, none)
        head = self._head(tokens).max(axis=-1)
        time = self._drafting_pass_us(verified) + drafts * head
        return np.asarray(time + max(0, drafts - 1) * self._drafting_pass_us(alone), np.float64)

    def _drafting_pass_us(self, batch: BatchShape) -> FloatArray:
        _, place, share = self.drafting
        terms, total = self.attention[place], batch.rows.sum(axis=-1)
        own = self._drafting(batch.rows)
        own = own + terms.decode_us(batch.decode_tokens, batch.decode_context_tokens)
        own = own + terms.prefill_us(batch.prefill_tokens, batch.prefill_pairs)
        saved = self._saved(batch, total)
        return own.max(axis=-1) + share * (self._moe_total(total) - saved)

    def breakdown(self, batch: BatchShape) -> dict[str, FloatArray]:
        """Microseconds by part, of the slowest DP rank; their sum is `step_us`. "overlap" is what
        two-batch overlap, or parts between two pools, save, below 0, of what each takes without."""
        attention, rows = self._attention_us(batch), self._computed(batch)
        slowest = np.argmax(self._rows_total(rows) + attention, axis=-1)

        def pick(values: FloatArray) -> FloatArray:
            return np.take_along_axis(values, slowest[..., None], axis=-1)[..., 0]

        parts = {name: pick(table(rows)) for name, table in self._rows.items()}
        parts["attention"] = pick(attention)
        total = rows.sum(axis=-1)
        for name, table in self._moe.items():
            parts[name] = parts.get(name, np.zeros(total.shape)) + table(total)
        compute, comm = self._compute_and_comm_us(batch, rows)
        hidden = compute + comm - self._layers_us(batch)
        parts["communication"] = parts["communication"] - self._saved(batch, total)
        if self.deployment.two_batch_overlap != "off" or self.deployment.expert_gpus is not None:
            parts["overlap"] = -hidden
        parts["head"] = self._head(self._sampled(batch)).max(axis=-1)
        gpu = sum(parts.values(), np.zeros(total.shape))
        parts["host"] = np.where(total > 0, self._with_host(gpu, batch) - gpu, 0.0)
        return parts

    def _saved(self, batch: BatchShape, total: FloatArray) -> FloatArray:
        """What a step without prompt tokens, of `total` rows, saves by the all-to-all of
        decoding."""
        decodes = batch.prefill_tokens.max(axis=-1) == 0
        return np.where(decodes, self._decode_saves(total), 0.0)

    def _sampled(self, batch: BatchShape) -> FloatArray:
        return batch.decode_tokens + batch.prefill_sequences

    def _with_host(self, gpu_us: FloatArray, batch: BatchShape) -> FloatArray:
        engine = self.deployment.engine
        enqueued = batch.rows.max(axis=-1) > self.graph_limit
        prefill = enqueued & (batch.prefill_tokens.max(axis=-1) > 0)
        layers = self.deployment.model.num_hidden_layers
        with_host = np.maximum(
            gpu_us + engine.prompt_added_us(layers), engine.prompt_least_us(layers)
        )
        busy = np.where(prefill, with_host, gpu_us)
        sequences = self._sampled(batch).max(axis=-1)
        return busy + engine.step_host_us + engine.sequence_host_us * sequences

    def _attention_us(self, batch: BatchShape) -> FloatArray:
        total = np.zeros(batch.rows.shape)
        for terms in self.attention:
            one = terms.decode_us(batch.decode_tokens, batch.decode_context_tokens)
            one = one + terms.prefill_us(batch.prefill_tokens, batch.prefill_pairs)
            total = total + terms.num_layers * one
        return total
