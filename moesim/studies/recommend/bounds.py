"""Closed forms: the most requests/s that one engine can serve within the promises.

Means over a steady service, by Little's law: with N sequences decoding, a step of t seconds gives
N tokens, so N / (t x output) requests/s, whose prompts are N x prompt / output tokens a step. What
varies around the mean makes a service slower than that, so these are taken as bounds from above;
the simulation decides.
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
    from moesim.serving.step_cost import EngineStepCost
    from moesim.studies.recommend.shapes import Role

NUM_POINTS = 48


@dataclass(frozen=True, slots=True)
class Most:
    """rate: requests/s that one engine serves at most. binds: what stops it there."""

    rate: float
    binds: str


def most(role: Role, cost: EngineStepCost, need: Need, max_batch_tokens: int) -> Most:
    """The bound of an engine in `role`; `max_batch_tokens` rows of a step of one rank."""
    if role == "prefill":
        return _prefill(cost, need, max_batch_tokens)
    if role == "decode":
        return _decode(cost, need)
    return _mixed(cost, need, max_batch_tokens)


def _prefill(cost: EngineStepCost, need: Need, max_batch_tokens: int) -> Most:
    first = _first_token_s(cost, need, max_batch_tokens)
    if first > need.limit_s("ttft"):
        return Most(0.0, "TTFT of one prompt alone")
    dp = cost.deployment.dp
    rows = np.unique(np.geomspace(1, max_batch_tokens, NUM_POINTS).round())
    time = _prompts_s(cost, need, rows)
    rows, time = rows[time <= need.limit_s("ttft")], time[time <= need.limit_s("ttft")]
    if not len(rows):
        return Most(0.0, "TTFT of the smallest step")
    rates = rows * dp / need.prompt / time
    return Most(float(rates.max()), "prompt tokens/s")


def _decode(cost: EngineStepCost, need: Need) -> Most:
    sequences, binds = _sequences(cost, need)
    return _best(sequences, _tokens_s(cost, need, sequences), need, binds)


def _mixed(cost: EngineStepCost, need: Need, max_batch_tokens: int) -> Most:
    if _first_token_s(cost, need, max_batch_tokens) > need.limit_s("ttft"):
        return Most(0.0, "TTFT of one prompt alone")
    dp, engine = cost.deployment.dp, cost.deployment.engine
    sequences, binds = _sequences(cost, need)
    prompts = sequences * need.prompt / need.output
    if engine.prefill_policy == "prefill_first":
        full = np.array([float(max_batch_tokens)])
        per_token = float(_prompts_s(cost, need, full)[0]) / (max_batch_tokens * dp)
        time = _tokens_s(cost, need, sequences) + prompts * per_token
    else:
        room = (sequences + prompts) / dp <= max_batch_tokens
        if not room.any():
            return Most(0.0, "tokens of a step")
        sequences, prompts = sequences[room], prompts[room]
        binds = binds if room.all() else "tokens of a step"
        time = _chunked_s(cost, need, sequences, prompts, max_batch_tokens)
    return _best(sequences, time, need, binds)


def _chunked_s(
    cost: EngineStepCost,
    need: Need,
    sequences: FloatArray,
    prompts: FloatArray,
    max_batch_tokens: int,
) -> FloatArray:
    """Mean seconds of a step with `prompts` tokens of prompts on average: the least of every step
    having as many, some having a prompt's and the others none, and some being full."""
    dp = cost.deployment.dp
    without = _tokens_s(cost, need, sequences)
    time = _tokens_s(cost, need, sequences, prompts)
    full = max_batch_tokens * dp - sequences
    for chunk in (np.minimum(need.prompt, full), full):
        some = (chunk > 0) & (prompts < chunk)
        share = prompts / np.maximum(chunk, 1.0)
        mixed = (1 - share) * without
        mixed = mixed + share * _tokens_s(cost, need, sequences, np.maximum(chunk, 1.0))
        time = np.where(some, np.minimum(time, mixed), time)
    return time


def _best(sequences: FloatArray, time: FloatArray, need: Need, binds: str) -> Most:
    within = time <= need.limit_s("tpot")
    if not within.any():
        return Most(0.0, "TPOT of one sequence")
    rates = sequences[within] / need.output / time[within]
    return Most(float(rates.max()), binds if within.all() else "TPOT")


def _sequences(cost: EngineStepCost, need: Need) -> tuple[FloatArray, str]:
    """Numbers of sequences on all ranks to try, up to what the KV cache and the engine allow."""
    d = cost.deployment
    held = gpu_memory(d).kv_token_capacity / (need.prompt + need.output / 2)
    most = d.dp * min(float(d.max_sequences), held)
    binds = "KV cache" if held < d.max_sequences else "sequences of a step"
    most = max(most, 1e-9)
    return np.geomspace(min(1.0, most), most, NUM_POINTS), binds


def _tokens_s(
    cost: EngineStepCost, need: Need, sequences: FloatArray, prompts: FloatArray | float = 0.0
) -> FloatArray:
    """Seconds of a step with `sequences` decoding and `prompts` tokens of prompts, evenly spread
    over the ranks, prompts half computed on average."""
    dp = cost.deployment.dp
    rows = np.broadcast_to(np.asarray(prompts, np.float64) / dp, sequences.shape)
    batch = BatchShape.of(
        _spread(sequences / dp, dp),
        _spread(sequences / dp * (need.prompt + need.output / 2), dp),
        _spread(rows, dp),
        _spread(rows * need.prompt / 2, dp),
        _spread(rows / need.prompt, dp),
    )
    return np.asarray(cost.step_us(batch) / 1e6)


def _prompts_s(cost: EngineStepCost, need: Need, rows: FloatArray) -> FloatArray:
    """Seconds of a step with `rows` prompt tokens on every rank."""
    dp = cost.deployment.dp
    length = np.minimum(rows, need.prompt)
    batch = BatchShape.of(
        prefill_tokens=_spread(rows, dp),
        prefill_pairs=_spread(rows * length / 2, dp),
        prefill_sequences=_spread(rows / length, dp),
    )
    return np.asarray(cost.step_us(batch) / 1e6)


def _first_token_s(cost: EngineStepCost, need: Need, max_batch_tokens: int) -> float:
    """Seconds to the first token of a mean prompt with nothing else running."""
    d = cost.deployment
    rows = np.zeros((max(1, int(np.ceil(need.prompt / max_batch_tokens))), d.dp))
    rows[:, 0] = need.prompt / len(rows)
    done = np.arange(len(rows))[:, None] * rows
    batch = BatchShape.of(prefill_tokens=rows, prefill_pairs=rows * done + rows * (rows + 1) / 2)
    outside = d.engine.outside_us(d.num_gpus, float(need.prompt))
    return float((cost.step_us(batch).sum() + outside) / 1e6)


def _spread(values: FloatArray, dp: int) -> FloatArray:
    return np.repeat(np.asarray(values, np.float64)[:, None], dp, axis=1)
