"""What a validation replays: plans that match the model and the trace, batches, layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moesim.compat import other_ranks
from moesim.errors import InputError, MismatchError
from moesim.placement import Plan, load_plan
from moesim.replay.routing import POLICIES, Assignment, assign_replicas, home_ranks
from moesim.replay.shape import ExpertShape
from moesim.trace.batches import Phase, draw_batches, index_requests, split_requests
from moesim.trace.format import Trace
from moesim.types import IntArray

DECODE_UP_TO = 1024


@dataclass(frozen=True, slots=True)
class NamedPlan:
    """A plan with its name in results: its file's stem."""

    name: str
    plan: Plan


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One global batch: indices into the trace, and the home rank of each token."""

    tokens_per_rank: int
    phase: Phase
    index: int
    token_idx: IntArray
    home: IntArray


def load_plans(
    paths: Sequence[str], shape: ExpertShape, trace: Trace, num_ranks: int
) -> list[NamedPlan]:
    """Read the plans and check each against the model shape, the trace and the ranks.

    Raises MismatchError that names the plan and the number that differs.
    """
    check_trace(shape, trace)
    named = [NamedPlan(Path(path).stem, load_plan(path).together()) for path in paths]
    names = [entry.name for entry in named]
    if len(set(names)) != len(names):
        raise InputError("two plans have the same file name", "give each plan its own name")
    for entry in named:
        check_plan(entry, shape, trace, num_ranks)
    return named


def check_trace(shape: ExpertShape, trace: Trace) -> None:
    """Raise MismatchError unless trace and model shape agree in experts and top-k."""
    for what, have, want in (
        ("experts per layer", trace.num_experts, shape.num_experts),
        ("experts per token", trace.top_k, shape.top_k),
    ):
        if have != want:
            raise MismatchError(
                f"the trace has {have} {what}, model {shape.name!r:.60} has {want}",
                "give the trace of this model, or the model of this trace",
            )


def check_plan(entry: NamedPlan, shape: ExpertShape, trace: Trace, num_ranks: int) -> None:
    """Raise MismatchError unless the plan fits the model shape, the trace and the ranks."""
    placement = entry.plan.placement
    if placement.num_experts != shape.num_experts:
        raise MismatchError(
            f"plan {entry.name} places {placement.num_experts} experts, model"
            f" {shape.name!r:.60} has {shape.num_experts}",
            "give a plan that was made for this model",
        )
    if placement.num_gpus != num_ranks:
        raise MismatchError(
            f"plan {entry.name} is for {placement.num_gpus} GPUs, the replay has {num_ranks} ranks",
            f"start {placement.num_gpus} ranks, or make a plan for {num_ranks} GPUs",
        )
    if tuple(entry.plan.layer_ids) != tuple(trace.meta.layer_ids):
        raise MismatchError(
            f"plan {entry.name} has {len(entry.plan.layer_ids)} layers"
            f" ({_span(entry.plan.layer_ids)}), the trace {trace.num_layers}"
            f" ({_span(trace.meta.layer_ids)})",
            "give a plan that was made from a trace of the same model",
        )


def pick_layers(num_layers: int, wanted: int) -> IntArray:
    """`wanted` layer indices (0: all), spread evenly from the first to the last."""
    if wanted < 1 or wanted >= num_layers:
        return np.arange(num_layers)
    return np.unique(np.round(np.linspace(0, num_layers - 1, wanted)).astype(np.int64))


def build_batches(
    trace: Trace,
    tokens_per_rank: int,
    num_ranks: int,
    num_batches: int,
    *,
    phase: str = "auto",
    seed: int = 0,
    held_out: bool = True,
) -> tuple[list[Batch], str]:
    """Batches of exactly `tokens_per_rank * num_ranks` tokens, and a notice (empty if none).

    phase: "auto" draws decode batches up to 1,024 tokens per rank and prefill batches above.
    Prefill packs whole requests, draws again where the trace has too few tokens, and cuts the
    last request.
    held_out: draw from the held-out half of the requests alone.
    """
    if tokens_per_rank < 1:
        raise InputError("a rank needs at least one token", "raise `tokens`")
    chosen: Phase = "decode" if phase == "decode" else "prefill"
    if phase == "auto":
        chosen = "decode" if tokens_per_rank <= DECODE_UP_TO else "prefill"
    requests, notice = index_requests(trace, chosen)
    if held_out:
        requests = split_requests(requests)[1]
    want = tokens_per_rank * num_ranks
    if want > len(requests.token_idx):
        notice += "; " if notice else ""
        notice += f"batches of {want} tokens repeat tokens: there are {len(requests.token_idx)}"
    out = []
    for index in range(num_batches):
        parts: list[IntArray] = []
        missing, draw = want, 0
        while missing > 0:
            part = draw_batches(requests, chosen, want, 1, seed + 1000 * index + draw)[0]
            parts.append(part[:missing])
            missing -= len(parts[-1])
            draw += 1
        tokens = np.concatenate(parts)
        home = home_ranks(len(tokens), num_ranks)
        if trace.rank_ids is not None and other_ranks(trace, num_ranks) is None:
            home = np.asarray(trace.rank_ids)[tokens].astype(np.int64)
        out.append(Batch(tokens_per_rank, chosen, index, tokens, home))
    return out, notice


def longest_first(trace: Trace, num_tokens: int) -> IntArray:
    """[num_tokens or fewer] tokens in order: the longest request's, then the next one's."""
    requests, _ = index_requests(trace)
    order = np.argsort(-np.diff(requests.indptr), kind="stable")
    parts = [requests.token_idx[requests.indptr[i] : requests.indptr[i + 1]] for i in order]
    return np.concatenate(parts)[:num_tokens]


def assign(
    trace: Trace, batch: Batch, entry: NamedPlan, layer: int, policy: str | None
) -> Assignment:
    """The slot of every choice of a batch in one layer, by `policy` or the plan's own."""
    placement = entry.plan.placement
    gates = trace.gate_weights
    return assign_replicas(
        np.asarray(trace.expert_ids[batch.token_idx, layer]),
        None if gates is None else np.asarray(gates[batch.token_idx, layer]),
        placement.physical_to_logical[layer],
        batch.home,
        placement.num_gpus,
        policy or replay_policy(entry.plan),
        token_ids=batch.token_idx,
        num_nodes=placement.num_nodes,
    )


def replay_policy(plan: Plan) -> str:
    """The plan's replica policy where the replay knows it; "split" stands in for "lp"."""
    return plan.replica_policy if plan.replica_policy in POLICIES else "split"


def _span(layer_ids: Sequence[int]) -> str:
    return f"{layer_ids[0]} to {layer_ids[-1]}"
