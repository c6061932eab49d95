"""Applying a rule to a trace, and counting what it changed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import FormatError
from moesim.routing.base import Choices, Places, Rule, Work
from moesim.routing.partition import DECODE_TOKENS, PREFILL_TOKENS
from moesim.routing.spec import describe, parse_rule
from moesim.trace.format import Trace
from moesim.trace.writer import id_dtype


@dataclass(frozen=True, slots=True)
class Changes:
    """What a rule changed, counted over all tokens and layers.

    `choices` the router made, `choices_after` the rule. Of a token's choices in a layer, those in
    both are `kept`; of the rest, as many as there are new ones are `moved`, the router's beyond
    that `dropped`, the rule's beyond that `added`: choices = kept + moved + dropped, choices_after
    = kept + moved + added. emptied: (token, layer) pairs that lost every choice.

    unlisted: choices after of experts that are no candidates, so that their scores count as 0; None
    without candidates.

    gate_mass_kept: gate weight, by the router, of the choices kept, as a share of all; a stand-in
    for quality that says nothing of accuracy. None without gate weights. score_mass: candidates'
    scores of the choices after, as a share of those before (above 1 where there are more choices);
    None without candidates.
    """

    choices: int
    choices_after: int
    kept: int
    moved: int
    dropped: int
    added: int
    emptied: int
    unlisted: int | None
    gate_mass_kept: float | None
    score_mass: float | None
    notes: dict[str, float]

    def line(self, rule: str) -> str:
        """The counts in a line, for `rule`."""
        return (
            f"{rule}: {self.kept:,} of {self.choices:,} choices kept, {self.moved:,} moved,"
            f" {self.dropped:,} dropped, {self.added:,} added"
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True, eq=False)
class Rerouted:
    """The trace with other choices, and what changed."""

    trace: Trace
    rule: Rule
    changes: Changes


def reroute(
    trace: Trace,
    rule: Rule | str,
    places: Places | None = None,
    *,
    prefill_tokens: int = PREFILL_TOKENS,
    decode_tokens: int = DECODE_TOKENS,
    seed: int = 0,
) -> Rerouted:
    """`trace` with the choices of a rule, given as text (`drop:factor=1`) or an object.

    Tokens, order and layers stay (INV-11); top-k becomes the most choices that a token has;
    candidates stay where they are more than that. `meta.source` notes rule, parameters and batches.
    prefill_tokens, decode_tokens: batches of rules that look at load, where the trace has no steps.

    Memory: the trace, its choices twice, and E floats a token for one layer.
    Raises MismatchError for what the rule needs and lacks, UnknownNameError and InputError for
    rules that cannot be.
    """
    found = (parse_rule(rule) if isinstance(rule, str) else rule).resolved(trace)
    work = Work(
        trace, places, prefill_tokens=prefill_tokens, decode_tokens=decode_tokens, seed=seed
    )
    found.check(work)
    choices = _packed(found.apply(work))
    _check(found, trace, choices)
    source = dict(trace.meta.source)
    earlier = source.get("reroute")
    source["reroute"] = [
        *(earlier if isinstance(earlier, list) else []),
        {
            **describe(found),
            "of": trace.content_hash(),
            "seed": seed,
            "batches": "steps" if trace.step_ids is not None else [prefill_tokens, decode_tokens],
        },
    ]
    out = replace(
        trace,
        path="",
        meta=replace(trace.meta, top_k=choices.expert_ids.shape[2], source=source),
        expert_ids=_narrow(choices.expert_ids, trace.num_experts),
        gate_weights=_like(choices.gates, trace.gate_weights),
    )
    if trace.num_candidates <= out.top_k:
        out = replace(out, candidate_ids=None, candidate_scores=None)
    return Rerouted(out, found, count_changes(work, choices))


def count_changes(work: Work, after: Choices) -> Changes:
    """The counts of INV-11, layer by layer."""
    before, totals = work.ids, np.zeros(6, np.int64)
    mass = np.zeros(4)
    for layer in range(before.shape[1]):
        old, new = before[:, layer], after.expert_ids[:, layer]
        same = ((old[:, :, None] == new[:, None, :]) & (old[:, :, None] >= 0)).any(axis=2)
        num_old, num_new, kept = (old >= 0).sum(1), (new >= 0).sum(1), same.sum(1)
        moved = np.minimum(num_old - kept, num_new - kept)
        totals += [
            num_old.sum(),
            num_new.sum(),
            kept.sum(),
            moved.sum(),
            ((num_old > 0) & (num_new == 0)).sum(),
            0,
        ]
        if work.gates is not None:
            gates = np.where(old >= 0, work.gates[:, layer], 0).astype(np.float64)
            mass[:2] += gates[same].sum(), gates.sum()
        if work.trace.candidate_ids is not None:
            table = work.scores(layer)
            for at, ids in ((2, new), (3, old)):
                picked = np.take_along_axis(table, np.maximum(ids, 0).astype(int), 1)
                mass[at] += np.maximum(picked, 0)[ids >= 0].sum(dtype=np.float64)
                totals[5] += int(np.isneginf(picked[ids >= 0]).sum()) if at == 2 else 0
    choices, later, kept_all, moved_all, emptied, unlisted = (int(x) for x in totals)
    return Changes(
        choices,
        later,
        kept_all,
        moved_all,
        choices - kept_all - moved_all,
        later - kept_all - moved_all,
        emptied,
        None if work.trace.candidate_ids is None else unlisted,
        float(mass[0] / mass[1]) if mass[1] > 0 else None,
        float(mass[2] / mass[3]) if mass[3] > 0 else None,
        after.notes,
    )


def _packed(choices: Choices) -> Choices:
    """Choices with -1 behind the others of a token, and no column that is -1 throughout."""
    ids = choices.expert_ids
    order = np.argsort(ids < 0, axis=2, kind="stable")
    ids = np.take_along_axis(ids, order, 2)
    width = max(1, int((ids >= 0).sum(axis=2).max(initial=0)))
    gates = choices.gates
    if gates is not None:
        gates = np.take_along_axis(gates, order, 2)[..., :width]
        gates = np.where(ids[..., :width] >= 0, gates, np.float32(0))
    return Choices(np.ascontiguousarray(ids[..., :width]), gates, choices.notes)


def _check(rule: Rule, trace: Trace, choices: Choices) -> None:
    """Refuse what no rule may give: other tokens or layers, ids outside, an expert twice."""
    ids = choices.expert_ids
    ordered = np.sort(ids, axis=2)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if (
        ids.shape[:2] != (trace.num_tokens, trace.num_layers)
        or ids.max(initial=-1) >= trace.num_experts
        or ids.min(initial=-1) < -1
        or twice.any()
    ):
        raise FormatError(
            f"rule {rule.NAME} gave choices that no trace can have", "report it to its author"
        )


def _narrow(ids: npt.NDArray[np.int16], num_experts: int) -> npt.NDArray[Any]:
    return ids.astype(id_dtype(num_experts, bool((ids < 0).any())))


def _like(
    gates: npt.NDArray[np.float32] | None, before: npt.NDArray[Any] | None
) -> npt.NDArray[Any] | None:
    return None if gates is None or before is None else gates.astype(before.dtype)
