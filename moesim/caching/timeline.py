"""What a caching plan costs: decode steps on one GPU, its host link, and the host's CPU, in time.

One step goes through the MoE layers in order. In each layer, at the *gate* (after attention and
whatever else precedes the routed experts), the experts are known:

- those in their slots run at once, one after another;
- those prefetched run when their transfer has arrived;
- of the others, each is either fetched over the link or computed on the CPU. Fetches go first on
  the link, before prefetches that have not started; a transfer that has started is not stopped.

The layer ends when GPU and CPU are both done. Prefetches for layer l are issued at the gate of
layer l - depth, land in a staging buffer, and what the layer did not ask for is dropped (wasted).
An expert that was fetched or staged and used is admitted to the slots by the policy; one that the
CPU computed is not.

Not modelled: contention of host DRAM between link and CPU, the time of the router and of the
predictor, several streams of copies at once, prefetching for the next step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from moesim.caching.events import Events, Stream, build_events
from moesim.caching.policies import get_policy
from moesim.caching.start import asked_of, new_state
from moesim.caching.state import Asked, CacheState, Rule
from moesim.caching.timeline_kernel import Memory, StepTimes, run_kernel
from moesim.errors import MismatchError
from moesim.trace.format import Trace
from moesim.types import FloatArray, IntArray

CpuMode = Literal["none", "auto"]


@dataclass(frozen=True, slots=True, eq=False)
class Setup:
    """One configuration of the expert memory.

    slots: [L] slots that the policy manages. pinned: [L, E] experts with slots of their own.
    cpu: `auto` gives the CPU what it finishes before the link could; `none` never.
    cpu_layers: [L] layers whose experts always run on the CPU (llama.cpp's --n-cpu-moe).
    depth: layers ahead that predictions are issued, 0 for no prefetch. width: prefetches of a layer
    at most. frequency: [L, E] warm start and prior, see simulate.expert_frequency.
    """

    slots: IntArray
    pinned: npt.NDArray[np.bool_]
    cpu_layers: npt.NDArray[np.bool_]
    frequency: FloatArray
    policy: str = "lru"
    cpu: CpuMode = "none"
    depth: int = 0
    width: int = 0
    warm: bool = True
    alpha: float = 0.5
    lookahead: int = 16


@dataclass(frozen=True, slots=True, eq=False)
class Timeline:
    """What happened: per event (step, layer) [S, L] hits in slots, prefetch hits, fetches, CPU
    executions, wasted prefetches, and seconds that the GPU waited; step_s [S]; link_s the link's
    busy time."""

    hits: IntArray
    staged: IntArray
    fetched: IntArray
    on_cpu: IntArray
    wasted: IntArray
    wait_s: FloatArray
    step_s: FloatArray
    link_s: float
    num_tokens: int

    @property
    def accesses(self) -> int:
        return int((self.hits + self.staged + self.fetched + self.on_cpu).sum())

    @property
    def hit_rate(self) -> float:
        """Share of accesses that found their expert in a slot when the layer needed it."""
        return float(self.hits.sum() / max(1, self.accesses))

    @property
    def tokens_per_s(self) -> float:
        return float(self.num_tokens / self.step_s.sum())

    @property
    def transfers_per_token(self) -> float:
        """Experts moved over the link for each token, wasted ones included."""
        moved = self.staged.sum() + self.fetched.sum() + self.wasted.sum()
        return float(moved / max(1, self.num_tokens))


def all_events(trace: Trace, stream: Stream) -> Events:
    """Events of all layers in order of execution: event s x L + l, items are expert ids."""
    num_layers = trace.num_layers
    steps = np.repeat(np.arange(stream.num_steps), np.diff(stream.indptr))
    width = np.diff(stream.indptr)
    offset = np.arange(stream.num_tokens) - stream.indptr[steps]
    base = stream.indptr[steps] * num_layers + offset
    at = (base[:, None] + np.arange(num_layers)[None, :] * width[steps][:, None]).ravel()
    ids = np.empty((stream.num_tokens * num_layers, trace.top_k), np.int32)
    chosen = np.asarray(trace.expert_ids)[stream.token_idx]
    ids[at] = chosen.reshape(-1, trace.top_k)
    gates = np.full(ids.shape, 1.0 / trace.top_k, np.float32)
    if trace.gate_weights is not None:
        picked = np.asarray(trace.gate_weights)[stream.token_idx]
        gates[at] = picked.reshape(-1, trace.top_k)
    indptr = np.concatenate(([0], np.cumsum(np.repeat(width, num_layers)))).astype(np.int64)
    return build_events(ids, gates, indptr, trace.num_experts)


def run_timeline(
    trace: Trace,
    stream: Stream,
    setup: Setup,
    times: StepTimes,
    predicted: npt.NDArray[np.int16] | None = None,
    events: Events | None = None,
) -> Timeline:
    """Run `stream` through `setup`.

    predicted: [S, L, C] experts that a predictor expects, best first, -1 for none; the first
    setup.width that are not in HBM are sent for. Used when setup.depth is above 0.
    events: `all_events` of the stream, if already at hand.
    Raises MismatchError where the arrays are not of the trace's layers and experts.
    """
    shape = (trace.num_layers, trace.num_experts)
    if setup.pinned.shape != shape or times.load_s.shape != shape or len(setup.slots) != shape[0]:
        raise MismatchError(
            f"the setup is for {setup.pinned.shape} layers and experts, the trace has {shape}",
            "make the plan from a trace of the same model",
        )
    found = all_events(trace, stream) if events is None else events
    tokens = np.diff(stream.indptr)
    if int(tokens.max(initial=0)) >= times.gate_s.shape[1]:
        raise MismatchError(
            f"a step has {int(tokens.max())} tokens, the time tables end at"
            f" {times.gate_s.shape[1] - 1}",
            "make the tables for the batch size of the stream",
        )
    if predicted is None or setup.depth == 0 or setup.width == 0:
        predicted = np.zeros((stream.num_steps, shape[0], 0), np.int16)
    ids = np.asarray(trace.expert_ids)[stream.token_idx]
    rule, asked, state = policy_state(setup, found, stream, ids)
    memory = Memory(
        rule,
        asked,
        state,
        setup.cpu_layers,
        setup.cpu == "auto",
        setup.depth,
        setup.width,
        predicted,
    )
    ran, link_s = run_kernel(memory, times)
    return Timeline(**ran._asdict(), link_s=float(link_s), num_tokens=stream.num_tokens)


def policy_state(
    setup: Setup,
    events: Events,
    stream: Stream,
    ids: npt.NDArray[np.integer],
    order: npt.NDArray[np.int32] | None = None,
) -> tuple[Rule, Asked, CacheState]:
    """The slots of `setup` before the first step of `stream`: a cache a layer.

    events: see `all_events`; ids: [N, L, K] experts that the stream's tokens chose; order: [L, E]
    experts to start with, best first, -1 after the last, instead of the most frequent.
    """
    rule = Rule(get_policy(setup.policy).code, setup.alpha, setup.lookahead)
    asked = asked_of(rule, events, stream, ids, len(setup.slots))
    state, _ = new_state(
        rule,
        asked,
        setup.slots,
        setup.pinned,
        setup.frequency,
        stream.num_lanes,
        warm=setup.warm,
        order=order,
    )
    return rule, asked, state
