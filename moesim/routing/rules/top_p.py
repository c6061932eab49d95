"""As many experts as it takes for a share of the score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.routing.base import Choices, Need, Rule, Work, require
from moesim.trace.format import Trace
from moesim.types import Array


@dataclass(frozen=True, slots=True)
class TopP(Rule):
    """The fewest experts whose scores make up `p` of all that a token lists, at most `most` (0: as
    many as are listed). With candidates, of their scores; without, of the gate weights of the
    choices, so that a token can only lose some."""

    p: float
    most: int = 0

    NAME = "top-p"
    TITLE = "the fewest experts that make up a share of the score"
    PAPER = (
        "Harder Tasks Need More Experts (Huang et al., arXiv:2403.07652) and DynMoLE"
        " (arXiv:2504.00661), which mixes it with top-k by Tsallis entropy; abstracts read"
    )
    LEFT_OUT = (
        "losses on entropy; DynMoLE's soft routing at high entropy; experts that are not listed"
    )

    def __post_init__(self) -> None:
        require(0 < self.p <= 1, f"p {self.p}", "give a share above 0, up to 1")
        require(self.most >= 0, f"most {self.most}", "give 0 or more")

    def needs(self, trace: Trace) -> tuple[Need, ...]:
        return () if trace.candidate_ids is not None else ("gates",)

    def apply(self, work: Work) -> Choices:
        trace = work.trace
        if trace.candidate_ids is not None and trace.candidate_scores is not None:
            ids = np.asarray(trace.candidate_ids).astype(np.int16)
            values = np.asarray(trace.candidate_scores, np.float32)
        else:
            assert work.gates is not None
            order = np.argsort(-np.where(work.ids >= 0, work.gates, -1), axis=2, kind="stable")
            ids = np.take_along_axis(work.ids, order, 2)
            values = np.where(ids >= 0, np.take_along_axis(work.gates, order, 2), 0)
        keep = (ids >= 0) & within_share(values, self.p)
        if self.most:
            keep[..., self.most :] = False
        if trace.candidate_ids is not None:
            return work.weighed(np.where(keep, ids, np.int16(-1)))
        back = np.zeros(keep.shape, bool)
        np.put_along_axis(back, order, keep, 2)
        return work.kept(back)


def within_share(values: Array, share: float) -> Array:
    """Which of descending values [..., n] are among the fewest that make up `share` of the sum."""
    running = np.cumsum(values, axis=-1, dtype=np.float64)
    before = running - values
    return np.asarray(before < share * running[..., -1:] - 1e-9 * running[..., -1:]) | (
        np.arange(values.shape[-1]) == 0
    )


RULE = TopP
