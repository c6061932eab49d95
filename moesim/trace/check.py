"""Deeper checks of a trace than loading makes: what is well-formed, but cannot be right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from moesim.trace.candidates import num_missed
from moesim.trace.counts import chunk_tokens
from moesim.trace.format import DECODE, PREFILL, LoadTrace, Trace, drop_pages, iter_chunks
from moesim.trace.importers.warmup import MIN_RUN, warmup_steps, warmup_tokens
from moesim.trace.suspects import Suspect, in_every_token, one_rank, repeated_decode, suspects
from moesim.types import Array, IntArray, Progress

Severity = Literal["error", "warning"]
Mask = npt.NDArray[np.bool_]

_SUM_TOLERANCE = 0.02
_MAX_NAMED = 6
_COUNTED = ("negative", "unordered", "zero", "stray", "above", "missed")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong (`error`) or odd (`warning`), in how many places."""

    severity: Severity
    code: str
    message: str
    count: int


def check_trace(trace: Trace | LoadTrace, progress: Progress | None = None) -> list[Finding]:
    """Findings, errors first. The trace is taken to be loaded with its ids validated.

    Errors: no tokens; a (request, position) twice; a layer in which every token chose the same
    experts; two adjacent layers alike for every token; negative gate weights. Warnings: gaps in
    positions; prefill tokens after decode tokens of a request, or not from position 0; requests
    in several domains; what may be warm-up rows; what `suspects.py` finds; layers without any
    choice; unused experts; tokens without experts; gate weights out of order, all zero, above 1, or
    set where there is no expert; choices that are no candidates; fewer than two requests.

    Memory: a chunk, and 24 bytes per token for the positions. `progress(done, total)` in tokens.
    """
    if isinstance(trace, LoadTrace):
        return _sorted(_check_load(trace))
    if trace.num_tokens == 0:
        return _found("error", "empty", 1, "the trace has no tokens")
    return _sorted(
        _check_requests(trace) + _check_warmup(trace) + _RoutingPass(trace).run(progress)
    )


def _sorted(findings: list[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda f: f.severity != "error")


def _found(severity: Severity, code: str, count: int | np.integer, message: str) -> list[Finding]:
    """A list of one finding, or of none where there is nothing to count."""
    return [Finding(severity, code, message, int(count))] if count else []


def _check_load(trace: LoadTrace) -> list[Finding]:
    load = trace.expert_load
    by_layer = load.sum(axis=2)
    filled = by_layer.any(axis=0)
    idle = by_layer.sum(axis=1) == 0
    if idle.all():
        return _found("error", "empty", len(load), "all counts are zero")
    sums = by_layer[:, filled]
    uneven = (sums != sums[:, :1]).any(axis=1)
    warm = warmup_steps(trace)
    return [
        *_found("warning", "idle-steps", idle.sum(), f"steps without load, first {_first(idle)}"),
        *_found(
            "warning",
            "uneven-layers",
            uneven.sum(),
            f"steps in which layers have different numbers of choices, first {_first(uneven)}:"
            " tokens were dropped, or the counts are of different times",
        ),
        *_found(
            "warning",
            "warm-up",
            warm.sum(),
            f"steps of constant routing, perhaps an engine's warm-up, first {_first(warm)}",
        ),
        *_suspects(suspects(trace)),
        *_unused(np.asarray(load.sum(axis=0)), trace.meta.layer_ids),
    ]


def _suspects(found: list[Suspect]) -> list[Finding]:
    return [Finding("warning", code, text, count) for code, count, text in found]


def _check_requests(trace: Trace) -> list[Finding]:
    """Positions, phases and domains by request."""
    key = (np.asarray(trace.request_ids, np.int64) << 32) | np.asarray(trace.positions)
    order = np.argsort(key, kind="stable")
    key = key[order]
    request, position = key >> 32, key & 0xFFFF_FFFF
    new = np.concatenate(([True], request[1:] != request[:-1]))

    def at(severity: Severity, code: str, where: Mask, text: str) -> list[Finding]:
        first = int(np.argmax(where))
        place = f"first request {request[first]}, position {position[first]}"
        return _found(severity, code, where.sum(), f"{text}; {place}")

    step = np.diff(key, prepend=key[:1] - 2)
    phase = np.asarray(trace.phases)[order]
    late = np.concatenate(([False], (phase[1:] == PREFILL) & (phase[:-1] == DECODE))) & ~new
    early = new & (phase == PREFILL) & (position > 0)
    found = [
        *at("error", "duplicate-position", step == 0, "a position of a request twice"),
        *at("warning", "position-gap", ~new & (step > 1), "positions of a request missing"),
        *at("warning", "phase-order", late, "a prefill token after a decode token of its request"),
        *at("warning", "late-start", early, "requests whose prefill does not begin at position 0"),
    ]
    if trace.domain_ids is not None:
        domain = np.asarray(trace.domain_ids)[order]
        mixed = np.concatenate(([False], domain[1:] != domain[:-1])) & ~new
        found += at("warning", "mixed-domains", mixed, "a request that changes its domain")
    alone = int(new.sum() < 2)
    text = "fewer than two requests: none can be held out, so no plan can be evaluated"
    return found + _found("warning", "one-request", alone, text)


def _check_warmup(trace: Trace) -> list[Finding]:
    if trace.top_k == trace.num_experts:
        return []
    warm = warmup_tokens(trace)
    text = (
        f"tokens in runs of {MIN_RUN} or more that are all routed alike, perhaps an engine's"
        f" warm-up, first token {_first(warm)}"
    )
    return _found("error" if warm.all() else "warning", "warm-up", warm.sum(), text)


class _RoutingPass:
    """One pass over ids and gate weights, chunk by chunk."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.load = np.zeros((1, trace.num_layers, trace.num_experts), np.int64)
        self.first = np.sort(np.array(trace.expert_ids[0]), axis=-1)
        free = trace.num_experts > trace.top_k and trace.num_tokens > 1
        self.constant = np.full(trace.num_layers, free)
        self.twins = np.full(trace.num_layers - 1, free)
        self.num_without = 0
        self.counts = dict.fromkeys(_COUNTED, 0)
        self.sums = [np.inf, -np.inf]

    def run(self, progress: Progress | None) -> list[Finding]:
        from moesim.trace.kernels import count_load

        trace = self.trace
        for part in iter_chunks(trace.num_tokens, chunk_tokens(trace.num_layers, trace.top_k)):
            ids = np.array(trace.expert_ids[part], order="C")
            count_load(ids, np.zeros(len(ids), np.int64), self.load)
            self._compare_layers(ids)
            self.num_without += int((ids < 0).all(axis=(1, 2)).sum())
            if trace.gate_weights is not None:
                self._weigh(ids, np.asarray(trace.gate_weights[part], np.float32))
            if trace.candidate_ids is not None:
                listed = np.asarray(trace.candidate_ids[part])
                self.counts["missed"] += num_missed(ids, listed)
                drop_pages(trace.candidate_ids)
            drop_pages(trace.expert_ids, trace.gate_weights)
            if progress is not None:
                progress(part.stop, trace.num_tokens)
        return self._layer_findings() + self._gate_findings()

    def _compare_layers(self, ids: Array) -> None:
        for layer in np.flatnonzero(self.constant):
            rows = np.sort(ids[:, layer], axis=-1)
            self.constant[layer] = bool((rows == self.first[layer]).all())
        for layer in np.flatnonzero(self.twins):
            a, b = np.sort(ids[:, layer], axis=-1), np.sort(ids[:, layer + 1], axis=-1)
            self.twins[layer] = bool((a == b).all())

    def _weigh(self, ids: Array, gates: Array) -> None:
        chosen = ids >= 0
        total = np.where(chosen, gates, 0).sum(axis=-1)
        some = chosen.any(axis=-1)
        self.counts["negative"] += int((gates < 0).sum())
        self.counts["stray"] += int(((gates != 0) & ~chosen).sum())
        self.counts["zero"] += int((some & (total == 0)).sum())
        self.counts["above"] += int((gates.max(axis=-1) > 1 + _SUM_TOLERANCE).sum())
        valid = chosen[..., 1:] & chosen[..., :-1]
        self.counts["unordered"] += int(
            ((gates[..., 1:] > gates[..., :-1]) & valid).any(axis=-1).sum()
        )
        if some.any():
            self.sums = [
                min(self.sums[0], float(total[some].min())),
                max(self.sums[1], float(total[some].max())),
            ]

    def _layer_findings(self) -> list[Finding]:
        meta, load = self.trace.meta, self.load[0]
        layer_ids = meta.layer_ids
        filled = load.any(axis=1)
        constant = [layer_ids[i] for i in np.flatnonzero(self.constant & filled)]
        twins = [layer_ids[i] for i in np.flatnonzero(self.twins & ~self.constant[1:])]
        tokens = np.full(len(load), float(self.trace.num_tokens))
        return [
            *_found(
                "error",
                "constant-layer",
                len(constant),
                f"layers in which every token chose the same experts: {_names(constant)}",
            ),
            *_found(
                "error",
                "equal-layers",
                len(twins),
                f"layers that route every token as the next layer does: {_names(twins)}",
            ),
            *_found(
                "warning", "no-experts", self.num_without, "tokens without an expert in any layer"
            ),
            *_suspects(
                repeated_decode(self.trace)
                + one_rank(load)
                + in_every_token(load, tokens, meta.top_k, layer_ids)
            ),
            *_found(
                "warning",
                "unlisted-choices",
                self.counts["missed"],
                "choices of a token in a layer that are not all among its candidates: the router"
                " has a bias or groups, or the candidates are of another run",
            ),
            *_unused(load, layer_ids),
        ]

    def _gate_findings(self) -> list[Finding]:
        if self.trace.gate_weights is None:
            return []
        count, (low, high) = self.counts, self.sums
        scaled = high - low <= _SUM_TOLERANCE * high
        share = count["unordered"] / (self.trace.num_tokens * self.trace.num_layers)
        return [
            *_found("error", "negative-gates", count["negative"], "gate weights below 0"),
            *_found(
                "warning",
                "large-gates",
                0 if scaled else count["above"],
                f"tokens with gate weights above 1; sums over a token go from {low:.3g} to"
                f" {high:.3g}",
            ),
            *_found("warning", "zero-gates", count["zero"], "tokens whose gate weights are all 0"),
            *_found(
                "warning", "stray-gates", count["stray"], "gate weights where no expert was chosen"
            ),
            *_found(
                "warning",
                "unordered-gates",
                count["unordered"],
                f"choices ({share:.0%}) whose experts are not in order of gate weight: the first"
                " expert is not the top one",
            ),
        ]


def _unused(load: IntArray, layer_ids: tuple[int, ...]) -> list[Finding]:
    filled = np.asarray(load.any(axis=1))
    empty = [layer_ids[i] for i in np.flatnonzero(~filled)]
    unused = (load == 0) & filled[:, None]
    layers = [layer_ids[i] for i in np.flatnonzero(unused.any(axis=1))]
    return [
        *_found(
            "warning",
            "empty-layer",
            len(empty),
            f"layers without any choice: {_names(empty)} (engines do not record layers that route"
            " by token id; figures leave them out)",
        ),
        *_found(
            "warning",
            "unused-experts",
            unused.sum(),
            f"experts that no token chose, in layers {_names(layers)}",
        ),
    ]


def _names(layers: list[int]) -> str:
    shown = ", ".join(map(str, layers[:_MAX_NAMED]))
    return f"{shown}, ..." if len(layers) > _MAX_NAMED else shown


def _first(where: Mask) -> int:
    return int(np.argmax(where))
