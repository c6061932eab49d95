"""What a rule is, and what it works on.

A rule is a frozen dataclass whose fields are its parameters. It reads a `Work` and gives `Choices`;
what changed is counted outside it (`routing.api`), so that no rule counts for itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt

from moesim.errors import InputError, MismatchError
from moesim.numerals import is_index
from moesim.routing.partition import DECODE_TOKENS, PREFILL_TOKENS, serving_batches
from moesim.trace.batches import index_requests, split_requests
from moesim.trace.format import Trace
from moesim.types import Array, IntArray, stream

Need = Literal["gates", "candidates", "plan", "domains"]
Scores = npt.NDArray[np.float32]

REMEDIES: dict[Need, tuple[str, str]] = {
    "gates": ("gate weights", "capture or import the trace with gate weights"),
    "candidates": (
        "candidate scores",
        "capture the trace anew with moesim trace capture --candidates",
    ),
    "plan": ("a plan", "give `plan`, which moesim plan writes"),
    "domains": ("domains", "label the prompts with domains and capture anew"),
}
"""What may be missing, and what to do then."""


class Places(Protocol):
    """Where experts are; a `Placement` is one."""

    @property
    def physical_to_logical(self) -> Array:
        """[L, P]; -1 for an empty slot."""

    @property
    def num_gpus(self) -> int: ...

    @property
    def num_nodes(self) -> int: ...


@dataclass(frozen=True, slots=True, eq=False)
class Choices:
    """expert_ids: [T, L, K'] int16, -1 for none. gates: [T, L, K'] float32, or None. notes: figures
    of the rule's own, by name."""

    expert_ids: npt.NDArray[np.int16]
    gates: npt.NDArray[np.float32] | None
    notes: dict[str, float] = field(default_factory=dict)


class Work:
    """A trace as rules read it, and what else was given.

    prefill_tokens, decode_tokens: of the batches, where the trace has no steps. seed: of batches
    and of whatever a rule draws.
    """

    def __init__(
        self,
        trace: Trace,
        places: Places | None = None,
        *,
        prefill_tokens: int = PREFILL_TOKENS,
        decode_tokens: int = DECODE_TOKENS,
        seed: int = 0,
    ) -> None:
        if prefill_tokens < 1 or decode_tokens < 1 or seed < 0:
            raise InputError(
                f"batches of {prefill_tokens} and {decode_tokens} tokens, seed {seed}",
                "give at least 1 token and a seed of 0 or more",
            )
        self.trace, self.places, self.seed = trace, places, seed
        self._sizes = prefill_tokens, decode_tokens
        self.ids = np.asarray(trace.expert_ids).astype(np.int16)
        gates = trace.gate_weights
        self.gates = None if gates is None else np.asarray(gates, np.float32)

    @cached_property
    def batches(self) -> list[IntArray]:
        """Token indices of the batches that serving would see; every token is in one."""
        return serving_batches(self.trace, *self._sizes, self.seed)

    @cached_property
    def tuning(self) -> npt.NDArray[np.bool_]:
        """[T] tokens of the tuning requests: what rules may learn from. Others are held out."""
        index, _ = index_requests(self.trace)
        out = np.zeros(self.trace.num_tokens, bool)
        out[split_requests(index, self.seed)[0].token_idx] = True
        return out

    def rng(self, *purpose: int) -> np.random.Generator:
        return stream(self.seed, 0x2E207E, *purpose)

    def scores(self, layer: int, rows: IntArray | slice = slice(None)) -> Scores:
        """[n, E] candidates' scores; -inf for experts that are no candidates."""
        ids = np.asarray(self.trace.candidate_ids[rows, layer], np.int64)  # type: ignore[index]
        values = np.asarray(self.trace.candidate_scores[rows, layer], np.float32)  # type: ignore[index]
        out = np.full((len(ids), self.trace.num_experts + 1), -np.inf, np.float32)
        np.put_along_axis(out, ids, values, 1)
        return out[:, :-1]

    def listed(self, layer: int) -> Scores:
        """[T, E] candidates' scores where there are candidates, else the choices' gate weights;
        -inf for other experts."""
        if self.trace.candidate_ids is not None:
            return self.scores(layer)
        assert self.gates is not None
        out = np.full((len(self.ids), self.trace.num_experts + 1), -np.inf, np.float32)
        np.put_along_axis(out, self.ids[:, layer].astype(np.int64), self.gates[:, layer], 1)
        return out[:, :-1]

    def chosen_mask(self, layer: int, rows: IntArray | slice = slice(None)) -> Array:
        """[n, E] bool: the trace's own choices."""
        ids = self.ids[rows, layer].astype(np.int64)
        out = np.zeros((len(ids), self.trace.num_experts + 1), bool)
        np.put_along_axis(out, ids, True, 1)
        return out[:, :-1]

    @cached_property
    def home(self) -> IntArray:
        """[T] home GPU: the trace's rank, or else the request's number, in turn over the GPUs."""
        assert self.places is not None
        ranks = self.trace.rank_ids
        source = self.trace.request_ids if ranks is None else ranks
        return np.asarray(source, np.int64) % self.places.num_gpus

    def held(self, layer: int, reach: str) -> Array:
        """[G, E] bool: experts with a slot on a GPU, or on its node for reach `node`."""
        assert self.places is not None
        table = np.asarray(self.places.physical_to_logical[layer])
        gpus = self.places.num_gpus
        out = np.zeros((gpus, self.trace.num_experts + 1), bool)
        out[np.repeat(np.arange(gpus), len(table) // gpus), table] = True
        out = out[:, :-1]
        if reach == "node":
            per_node = gpus // self.places.num_nodes
            nodes = out.reshape(self.places.num_nodes, per_node, -1).any(axis=1)
            out = np.repeat(nodes, per_node, axis=0)
        return out

    def kept(self, keep: Array, notes: dict[str, float] | None = None) -> Choices:
        """The trace's choices where `keep` [T, L, K], nothing elsewhere; gate weights as they were,
        not scaled up to make good what was dropped."""
        gates = None if self.gates is None else np.where(keep, self.gates, np.float32(0))
        return Choices(np.where(keep, self.ids, np.int16(-1)), gates, notes or {})

    def weighed(self, ids: npt.NDArray[np.int16], notes: dict[str, float] | None = None) -> Choices:
        """Choices [T, L, K'] with gate weights in proportion to the candidates' scores, of the same
        sum for each token and layer as before; equal ones where no score is known. Where a token's
        experts are those it had, order and weights are as well."""
        if self.gates is None:
            return Choices(ids, None, notes or {})
        gates = np.zeros(ids.shape, np.float32)
        before = np.full((*ids.shape[:2], max(ids.shape[2], self.ids.shape[2])), -1, np.int16)
        before[..., : self.ids.shape[2]] = self.ids
        after = np.full(before.shape, -1, np.int16)
        after[..., : ids.shape[2]] = ids
        same = (np.sort(before, axis=2) == np.sort(after, axis=2)).all(axis=2)
        for layer in range(ids.shape[1]):
            chosen = ids[:, layer] >= 0
            share = chosen.astype(np.float32)
            if self.trace.candidate_ids is not None:
                table = np.maximum(self.scores(layer), 0)
                known = np.take_along_axis(table, np.maximum(ids[:, layer], 0).astype(int), 1)
                known = np.where(chosen, known, 0)
                share = np.where(known.sum(1, keepdims=True) > 0, known, share)
            total = np.maximum(share.sum(1, keepdims=True), 1e-30)
            gates[:, layer] = share / total * self.gates[:, layer].sum(1, keepdims=True)
        width = min(ids.shape[2], self.ids.shape[2])
        ids = np.where(same[..., None], before[..., : ids.shape[2]], ids)
        gates[same] = 0
        gates[same, :width] = self.gates[same, :width]
        return Choices(ids, gates, notes or {})


class Rule(ABC):
    """A rule. NAME is what `--as` takes; TITLE one line; PAPER its source and what of it could be
    read; LEFT_OUT what of the paper it does not do; NEEDS what it cannot do without."""

    NAME: ClassVar[str]
    TITLE: ClassVar[str]
    PAPER: ClassVar[str]
    LEFT_OUT: ClassVar[str] = ""
    NEEDS: ClassVar[tuple[Need, ...]] = ()

    def needs(self, trace: Trace) -> tuple[Need, ...]:
        """What this rule with its parameters needs of `trace`, or beside it."""
        return self.NEEDS

    def resolved(self, trace: Trace) -> Rule:
        """This rule with what `trace` decides of its parameters: so it is applied and named."""
        return self

    @abstractmethod
    def apply(self, work: Work) -> Choices:
        """Other choices for all tokens and layers."""

    def check(self, work: Work) -> None:
        """Raise MismatchError for the first thing that is needed and missing."""
        trace = work.trace
        has = {
            "gates": trace.gate_weights is not None,
            "candidates": trace.candidate_ids is not None,
            "plan": work.places is not None,
            "domains": trace.domain_ids is not None and bool(trace.meta.domains),
        }
        for need in self.needs(trace):
            if not has[need]:
                what, remedy = REMEDIES[need]
                raise MismatchError(f"rule {self.NAME} needs {what}", remedy)
        places = work.places
        if places is not None:
            table = np.asarray(places.physical_to_logical)
            if table.shape[0] != trace.num_layers or table.max(initial=-1) >= trace.num_experts:
                raise MismatchError(
                    f"the plan has {table.shape[0]} layers and experts up to"
                    f" {table.max(initial=-1)}, the trace {trace.num_layers} and"
                    f" {trace.num_experts - 1}",
                    "give the plan of this model",
                )


class ScoredRule(Rule):
    """A rule that chooses anew from candidates, layer by layer.

    `choose` gets scores [n, E] of all tokens, or of a batch's where BATCHWISE.
    """

    NEEDS = ("candidates",)
    BATCHWISE: ClassVar[bool] = False

    @abstractmethod
    def choose(self, work: Work, layer: int, rows: IntArray, scores: Scores) -> Array:
        """[n, K'] ids, -1 for none."""

    def apply(self, work: Work) -> Choices:
        parts = work.batches if self.BATCHWISE else [np.arange(work.trace.num_tokens)]
        blocks = [
            (rows, layer, self.choose(work, layer, rows, work.scores(layer, rows)))
            for layer in range(work.trace.num_layers)
            for rows in parts
        ]
        return work.weighed(gathered(work.trace, iter(blocks)))


def gathered(trace: Trace, blocks: Iterator[tuple[Any, int, Array]]) -> npt.NDArray[np.int16]:
    """One array of ids [T, L, K'] from (rows, layer, ids) blocks of different widths."""
    found = list(blocks)
    width = max((block.shape[1] for _, _, block in found), default=1)
    out = np.full((trace.num_tokens, trace.num_layers, max(1, width)), -1, np.int16)
    for rows, layer, block in found:
        out[rows, layer, : block.shape[1]] = block
    return out


def best(values: Array, count: int) -> Array:
    """[n, count] columns of the largest values in descending order, the lower column first among
    equals; -1 where a value is -inf."""
    count = min(count, values.shape[1])
    order = np.argsort(-values, axis=1, kind="stable")[:, :count]
    found = np.take_along_axis(values, order, 1)
    return np.where(np.isneginf(found), -1, order)


def require(condition: bool, cause: str, remedy: str) -> None:
    """Raise InputError unless `condition`."""
    if not condition:
        raise InputError(cause, remedy)


def layer_positions(trace: Trace, text: str) -> list[int]:
    """Positions of the layers `text` names by their absolute numbers, as 1-4+7; all where it is
    empty."""
    if not text:
        return list(range(trace.num_layers))
    known = {number: i for i, number in enumerate(trace.meta.layer_ids)}
    out: list[int] = []
    for part in text.split("+"):
        first, dash, last = part.partition("-")
        if not (is_index(first) and (not dash or is_index(last))) or len(part) > 20:
            raise InputError(f"layers {text!r:.40}", "write them as 1-4+7")
        stop = min(int(last or first), max(known)) + 1
        out += [known[number] for number in range(int(first), stop) if number in known]
    require(
        bool(out),
        f"no MoE layer among {text}",
        f"they are numbered {min(known)} to {max(known)}",
    )
    return sorted(set(out))
