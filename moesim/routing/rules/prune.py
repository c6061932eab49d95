"""Models with fewer experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from moesim.errors import UnknownNameError
from moesim.routing.base import Choices, Need, Rule, Work, best, gathered, require
from moesim.trace.format import Trace
from moesim.types import Array, FloatArray


@dataclass(frozen=True, slots=True)
class Prune(Rule):
    """Each layer keeps the `keep` experts with most choices (`by` load) or gate weight (`gates`) of
    the tuning requests, of one `domain` if named. A choice of another expert goes to the candidate
    of largest score that is kept and not chosen, or is dropped where there is none."""

    keep: int
    by: Literal["load", "gates"] = "load"
    domain: str = ""

    NAME = "prune"
    TITLE = "keep the most used experts of each layer, for all text or for one domain"
    PAPER = (
        "Task-MoE (arXiv:2110.03742), which routes whole tasks, and ModuleFormer"
        " (arXiv:2306.04640): abstracts read. UNCURL (arXiv:2409.01483; abstract read) finds that"
        " performance degrades above a pruning factor, which depends on the experts in pretraining"
    )
    LEFT_OUT = "fine-tuning after the cut"

    def __post_init__(self) -> None:
        require(self.keep >= 1, f"keep {self.keep}", "keep at least one expert")

    def needs(self, trace: Trace) -> tuple[Need, ...]:
        out: tuple[Need, ...] = ("gates",) if self.by == "gates" else ()
        return (*out, "domains") if self.domain else out

    def apply(self, work: Work) -> Choices:
        trace = work.trace
        require(
            self.keep <= trace.num_experts,
            f"keep {self.keep} of {trace.num_experts} experts",
            "keep fewer",
        )
        usage = expert_usage(work, self.by, domain_tokens(work, self.domain))
        kept = np.zeros(usage.shape, bool)
        np.put_along_axis(kept, np.argsort(-usage, 1, kind="stable")[:, : self.keep], True, 1)
        inside = work.ids >= 0
        for layer in range(trace.num_layers):
            inside[:, layer] &= kept[layer][np.maximum(work.ids[:, layer], 0)]
        if trace.candidate_ids is None:
            return work.kept(inside)
        blocks = []
        for layer in range(trace.num_layers):
            scores = np.where(kept[layer], work.scores(layer), -np.inf)
            chosen = work.chosen_mask(layer) & kept[layer]
            ids = best(np.where(chosen, np.inf, scores), trace.top_k)
            count = (work.ids[:, layer] >= 0).sum(1)
            ids[np.arange(ids.shape[1]) >= count[:, None]] = -1
            blocks.append((slice(None), layer, ids))
        return work.weighed(gathered(trace, iter(blocks)))


def domain_tokens(work: Work, domain: str) -> Array:
    """[T] bool: tuning tokens, of `domain` if it is named."""
    if not domain:
        return work.tuning
    names = work.trace.meta.domains
    if domain not in names:
        raise UnknownNameError("domain", domain, names)
    found = work.tuning & (np.asarray(work.trace.domain_ids) == names.index(domain))
    require(bool(found.any()), f"no tuning request of domain {domain}", "capture more of it")
    return found


def expert_usage(work: Work, by: str, tokens: Array) -> FloatArray:
    """[L, E] choices, or gate weight, of each expert by some tokens."""
    out = np.zeros((work.trace.num_layers, work.trace.num_experts))
    for layer in range(len(out)):
        ids = work.ids[tokens, layer]
        weights = None
        if by == "gates":
            assert work.gates is not None
            weights = work.gates[tokens, layer][ids >= 0]
        out[layer] = np.bincount(ids[ids >= 0].astype(np.int64), weights, minlength=out.shape[1])
    return out


RULE = Prune
