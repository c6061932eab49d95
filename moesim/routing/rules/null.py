"""Null experts, which cost nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moesim.routing.base import Choices, Need, Rule, Work, require
from moesim.trace.format import Trace


@dataclass(frozen=True, slots=True)
class Null(Rule):
    """Null experts take every choice below one score of each layer: the score at which, on the
    tuning requests, a token keeps `mean` real experts on average. With candidates a token may have
    up to `most` real ones (0: as many as are listed), without any only those it has. The first
    choice is real unless it is below the score as well."""

    mean: float
    most: int = 0

    NAME = "null"
    TITLE = "null experts take the choices of lowest score, so many on average"
    PAPER = "AdaMoE (Zeng et al., arXiv:2406.13233; abstract and a review read)"
    LEFT_OUT = "null experts learn their scores, with a loss on their load: one score stands in"

    def __post_init__(self) -> None:
        require(self.mean > 0, f"mean {self.mean}", "give a number above 0")
        require(self.most >= 0, f"most {self.most}", "give 0 or more")

    def needs(self, trace: Trace) -> tuple[Need, ...]:
        return () if trace.candidate_ids is not None else ("gates",)

    def apply(self, work: Work) -> Choices:
        trace = work.trace
        listed = trace.candidate_ids is not None and trace.candidate_scores is not None
        if listed:
            ids = np.asarray(trace.candidate_ids).astype(np.int16)
            values = np.asarray(trace.candidate_scores, np.float32)
        else:
            assert work.gates is not None
            ids, values = work.ids, work.gates
        if self.most:
            require(listed, "most without candidates", "leave it out, or capture candidates")
            ids, values = ids[..., : self.most], values[..., : self.most]
        require(
            self.mean <= ids.shape[2],
            f"a mean of {self.mean} real experts of {ids.shape[2]}",
            "give less, or capture more candidates",
        )
        keep = ids >= 0
        for layer in range(trace.num_layers):
            seen = np.sort(values[work.tuning, layer][keep[work.tuning, layer]])[::-1]
            wanted = round(self.mean * int(work.tuning.sum()))
            if 0 < wanted <= len(seen):
                keep[:, layer] &= values[:, layer] >= seen[wanted - 1]
        notes = {"null_share": float(1 - keep.sum() / max(1, (ids >= 0).sum()))}
        if listed:
            return work.weighed(np.where(keep, ids, np.int16(-1)), notes)
        return work.kept(keep, notes)


RULE = Null
