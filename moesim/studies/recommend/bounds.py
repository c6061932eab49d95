"""Closed forms: the most requests/s that one engine can serve within the promises.

Means over a steady service, by Little's law: with N sequences decoding, a step of t seconds gives
N tokens, so N / (t x output) requests/s, whose prompts are N x prompt / output tokens a step. An
engine of p pipeline stages has p such batches under way, each with its share of the sequences and
of the KV cache. With speculation a step gives a sequence the tokens expected of its drafts, and
takes as long as the drafts and their check do. What varies around the mean makes a service slower
than that, so these are taken as bounds from above; the simulation decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from moesim.serving.batch import BatchShape
from moesim.serving.memory import gpu_memory
from moesim.studies.recommend.need import Need
from moesim.types import FloatArray

if TYPE_CHECKING:
    from moesim.serving.speculative import Speculation
    from moesim.serving.step_cost import EngineStepCost
    from moesim.studies.recommend.shapes import Role

NUM_POINTS = 48


@dataclass(frozen=True, slots=True)
class Most:
    """rate: requests/s that one engine serves at most. binds: what stops it there."""

    rate: float
    binds: str


def most(
    role: Role,
    cost: EngineStepCost,
    need: Need,
    max_batch_tokens: int,
    speculation: Speculation | None = None,
) -> Most:
    """The bound of an engine in `role`; `max_batch_tokens` rows of a step of one rank; with
    `speculation` always its most drafts."""
    steady = _Steady(cost, need, max_batch_tokens, speculation)
    if role == "prefill":
        return steady.prefill()
    return steady.decode() if role == "decode" else steady.mixed()


@dataclass(frozen=True, slots=True)
class _Steady:
    """Mean steps of one engine in a steady service."""

    cost: EngineStepCost
    need: Need
    max_batch_tokens: int
    speculation: Speculation | None

    @property
    def dp(self) -> int:
        return self.cost.deployment.dp

    @property
    def tokens(self) -> float:
        """Output tokens that a step gives a sequence."""
        return 1.0 if self.speculation is None else float(self.speculation.expected()[-1])

    def prefill(self) -> Most:
        need = self.need
        if self._first_token_s() > need.limit_s("ttft"):
            return Most(0.0, "TTFT of one prompt alone")
        rows = np.unique(np.geomspace(1, self.max_batch_tokens, NUM_POINTS).round())
        time = self._prompts_s(rows)
        rows, time = rows[time <= need.limit_s("ttft")], time[time <= need.limit_s("ttft")]
        if not len(rows):
            return Most(0.0, "TTFT of the smallest step")
        rates = rows * self.dp / need.prompt / time
        return Most(self.cost.deployment.pp * float(rates.max()), "prompt tokens/s")

    def decode(self) -> Most:
        sequences, binds = self._sequences()
        return self._best(sequences, self._tokens_s(sequences), binds)

    def mixed(self) -> Most:
        if self._first_token_s() > self.need.limit_s("ttft"):
            return Most(0.0, "TTFT of one prompt alone")
        sequences, binds = self._sequences()
        prompts = sequences * self.tokens * self.need.prompt / self.need.output
        if self.cost.deployment.engine.prefill_policy == "prefill_first":
            full = np.array([float(self.max_batch_tokens)])
            per_token = float(self._prompts_s(full)[0]) / (self.max_batch_tokens * self.dp)
            time = self._tokens_s(sequences) + prompts * per_token
        else:
            room = (sequences + prompts) / self.dp <= self.max_batch_tokens
            if not room.any():
                return Most(0.0, "tokens of a step")
            sequences, prompts = sequences[room], prompts[room]
            binds = binds if room.all() else "tokens of a step"
            time = self._chunked_s(sequences, prompts)
        return self._best(sequences, time, binds)

    def _chunked_s(self, sequences: FloatArray, prompts: FloatArray) -> FloatArray:
        """Mean seconds of a step with `prompts` tokens of prompts on average: the least of every
        step having as many, some having a prompt's and the others none, and some being full."""
        without = self._tokens_s(sequences)
        time = self._tokens_s(sequences, prompts)
        full = self.max_batch_tokens * self.dp - sequences
        for chunk in (np.minimum(self.need.prompt, full), full):
            some = (chunk > 0) & (prompts < chunk)
            share = prompts / np.maximum(chunk, 1.0)
            mixed = (1 - share) * without
            mixed = mixed + share * self._tokens_s(sequences, np.maximum(chunk, 1.0))
            time = np.where(some, np.minimum(time, mixed), time)
        return time

    def _best(self, sequences: FloatArray, time: FloatArray, binds: str) -> Most:
        within = time / self.tokens <= self.need.limit_s("tpot")
        if not within.any():
            return Most(0.0, "TPOT of one sequence")
        rates = self.tokens * sequences[within] / self.need.output / time[within]
        batches = self.cost.deployment.pp
        return Most(batches * float(rates.max()), binds if within.all() else "TPOT")

    def _sequences(self) -> tuple[FloatArray, str]:
        """Numbers of sequences of a batch on all ranks to try, up to what the KV cache and the
        engine allow."""
        d, need = self.cost.deployment, self.need
        held = gpu_memory(d).kv_token_capacity / (need.prompt + need.output / 2)
        most = d.dp * min(float(d.max_sequences), held) / d.pp
        binds = "KV cache" if held < d.max_sequences else "sequences of a step"
        most = max(most, 1e-9)
        return np.geomspace(min(1.0, most), most, NUM_POINTS), binds

    def _tokens_s(self, sequences: FloatArray, prompts: FloatArray | float = 0.0) -> FloatArray:
        """Seconds of a step with `sequences` decoding and `prompts` tokens of prompts, evenly
        spread over the ranks, prompts half computed on average."""
        spec = self.speculation
        if spec is None:
            return np.asarray(self.cost.step_us(self._batch(sequences, prompts)) / 1e6)
        again = float(self.cost.deployment.model.attention.kind == "mla")
        verified = self._batch(sequences, prompts, spec.max_drafts, again)
        drafting = self.cost.drafting_us(self._batch(sequences, prompts), spec.max_drafts, again)
        return np.asarray((self.cost.step_us(verified) + drafting) / 1e6)

    def _batch(
        self,
        sequences: FloatArray,
        prompts: FloatArray | float,
        drafts: int = 0,
        again: float = 0.0,
    ) -> BatchShape:
        need, dp = self.need, self.dp
        rows = np.broadcast_to(np.asarray(prompts, np.float64) / dp, sequences.shape)
        return BatchShape.of(
            _spread(sequences / dp * (1 + drafts), dp),
            _spread(sequences / dp * (need.prompt + need.output / 2) * (1 + again * drafts), dp),
            _spread(rows, dp),
            _spread(rows * need.prompt / 2, dp),
            _spread(rows / need.prompt, dp),
        )

    def _prompts_s(self, rows: FloatArray) -> FloatArray:
        """Seconds of a step with `rows` prompt tokens on every rank."""
        length = np.minimum(rows, self.need.prompt)
        batch = BatchShape.of(
            prefill_tokens=_spread(rows, self.dp),
            prefill_pairs=_spread(rows * length / 2, self.dp),
            prefill_sequences=_spread(rows / length, self.dp),
        )
        return np.asarray(self.cost.step_us(batch) / 1e6)

    def _first_token_s(self) -> float:
        """Seconds to the first token of a mean prompt with nothing else running."""
        d, need = self.cost.deployment, self.need
        rows = np.zeros((max(1, int(np.ceil(need.prompt / self.max_batch_tokens))), d.dp))
        rows[:, 0] = need.prompt / len(rows)
        done = np.arange(len(rows))[:, None] * rows
        pairs = rows * done + rows * (rows + 1) / 2
        batch = BatchShape.of(prefill_tokens=rows, prefill_pairs=pairs)
        outside = d.engine.outside_us(d.num_gpus, float(need.prompt))
        return float((self.cost.step_us(batch).sum() + outside) / 1e6)


def _spread(values: FloatArray, dp: int) -> FloatArray:
    return np.repeat(np.asarray(values, np.float64)[:, None], dp, axis=1)
