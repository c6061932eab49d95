"""Ranks of tokens: copies that tensor-parallel ranks record, and ranks that say nothing.

Tensor-parallel ranks all run the same tokens, so each of their files holds every token. Kept, they
would be so many times the requests, with copies on both sides of the held-out split; and a rank
would be taken for a token's home although its attention is spread over all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from moesim.trace.importers.base import ImportOptions

if TYPE_CHECKING:
    from moesim.trace.importers.build import Segment


@dataclass(slots=True)
class Copies:
    """Tells records of one forward pass that other ranks have, too."""

    seen: dict[tuple[int, bytes], int] = field(default_factory=dict)
    ranks: set[int] = field(default_factory=set)
    count: int = 0
    total: int = 0

    def is_copy(self, step: int, rank: int, *content: object) -> bool:
        """Whether another rank had the same content (arrays or lists of numbers) in this pass."""
        digest = hashlib.sha256()
        for part in content:
            array = np.ascontiguousarray(np.asarray(part, np.int64))
            digest.update(f"{array.shape}".encode() + array.tobytes())
        key = (step, digest.digest())
        first = self.seen.setdefault(key, rank)
        self.total += 1
        self.ranks.add(rank)
        self.count += first != rank
        return first != rank

    def report(self, options: ImportOptions) -> None:
        """A notice where there were copies."""
        if self.count:
            options.notify(
                f"{self.count} of {self.total} records are left out: {len(self.ranks)} ranks"
                " recorded the same tokens in the same pass, as tensor-parallel ranks do, so a"
                " rank is no token's home: rank_ids are left out"
            )


def known_homes(segments: Sequence[Segment], options: ImportOptions) -> list[Segment]:
    """`segments`, without ranks where all tokens are of one rank: a file of one rank alone must
    not make its GPU the home of every token."""
    given = [part.rank_ids for part in segments if len(part.expert_ids)]
    if not given or any(ranks is None for ranks in given):
        return list(segments)
    found = {int(rank) for ranks in given for rank in np.unique(np.asarray(ranks))}
    if len(found) > 1:
        return list(segments)
    options.notify(
        f"all tokens are of rank {found.pop()}, so the others' are missing or nobody's home is"
        " known: rank_ids are left out"
    )
    return without_ranks(segments)


def without_ranks(segments: Sequence[Segment]) -> list[Segment]:
    """`segments` without rank_ids."""
    return [replace(part, rank_ids=None) for part in segments]
