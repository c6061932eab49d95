"""Speculative decoding: how many tokens to draft, and how many of them are accepted.

A drafted token is accepted with a probability of its place, independently of the others, and the
first that is not ends the run; with one probability a for all, a step with k drafts gives
(1 - a^(k+1)) / (1 - a) tokens a sequence on average (Leviathan et al., arXiv:2211.17192). The
length is chosen step by step so that the tokens expected a second are most (goodput, as SmartSpec:
arXiv:2406.14066). Drafting takes what the model's multi-token-prediction layer takes
(`step_table.drafting_us`), or one token for the whole batch a given share of the step without
drafts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moesim.errors import InputError
from moesim.kernels import kernel
from moesim.serving.state import INTERNAL
from moesim.serving.step_kernel import drafting_us, step_us

MAX_DRAFTS = 16


@dataclass(frozen=True, slots=True)
class Speculation:
    """acceptance: probability of each drafted token, above 0 and below 1; or of the first, the
    second, ... token, each where those before it were accepted, the last one for all further.
    max_drafts: most drafted tokens; always that many if `fixed`. draft_share: time of drafting one
    token for the batch, as a share of the step's time without drafts; 0 where the deployment drafts
    by its multi-token-prediction layer (`Deployment.mtp`). Raises InputError for numbers that are
    none."""

    acceptance: float | tuple[float, ...] = 0.7
    max_drafts: int = 4
    draft_share: float = 0.05
    fixed: bool = False

    def __post_init__(self) -> None:
        given = self._given
        for share in given:
            if not 0 < share < 1:
                raise InputError(
                    f"an acceptance of {share}", "give a probability between 0 and 1, as 0.7"
                )
        if not 1 <= self.max_drafts <= MAX_DRAFTS:
            raise InputError(f"{self.max_drafts} draft tokens", f"give 1 to {MAX_DRAFTS}")
        if not 1 <= len(given) <= self.max_drafts:
            raise InputError(
                f"acceptances of {len(given)} drafted tokens, of at most {self.max_drafts}",
                "give one for all, or no more than `drafts`",
            )
        if not (math.isfinite(self.draft_share) and self.draft_share >= 0):
            raise InputError(f"a draft share of {self.draft_share}", "give 0 or more, as 0.05")

    @property
    def _given(self) -> tuple[float, ...]:
        return self.acceptance if isinstance(self.acceptance, tuple) else (self.acceptance,)

    def expected(self) -> npt.NDArray[np.float64]:
        """[max_drafts + 1]: tokens that a step with k drafts gives a sequence, on average."""
        given = self._given
        each = [*given, *[given[-1]] * (self.max_drafts - len(given))]
        return np.concatenate([np.ones(1), 1.0 + np.cumsum(np.cumprod(each))])


@kernel(**INTERNAL)
def choose_drafts(
    cfg: Any, expected: Any, tables: Any, m: int, ranks: Any, first: int, last: int, shares: Any
) -> tuple[int, float, float, float]:
    """Drafts of this step, and its time, mean rank time and slowest rank time with them."""
    base, mean, slowest = step_us(tables, m, ranks, first, last, 0, cfg.spec_context, shares)
    sequences = 0
    for rank in range(first, last):
        sequences += ranks[rank].decode_rows
    own = drafting_us(tables, m, ranks, first, last, 0, cfg.spec_context, shares)
    if cfg.spec_max == 0 or sequences == 0:
        return 0, base + own, mean, slowest
    prompts = 0
    for rank in range(first, last):
        prompts += ranks[rank].prefill_sequences
    best, best_time = 0, base + own
    best_rate = (sequences * expected[0] + prompts) / best_time if best_time > 0 else 0.0
    low = cfg.spec_fixed if cfg.spec_fixed > 0 else 1
    for k in range(low, cfg.spec_max + 1):
        time, m_us, s_us = step_us(tables, m, ranks, first, last, k, cfg.spec_context, shares)
        time += k * cfg.spec_draft_share * base
        time += drafting_us(tables, m, ranks, first, last, k, cfg.spec_context, shares)
        rate = (sequences * expected[k] + prompts) / time if time > 0 else 0.0
        if rate > best_rate or cfg.spec_fixed > 0:
            best, best_time, best_rate, mean, slowest = k, time, rate, m_us, s_us
    return best, best_time, mean, slowest


@kernel(**INTERNAL)
def accepted_drafts(cfg: Any, expected: Any, drafts: int, r: int, generated: int) -> int:
    """Drafts accepted of request `r` at a position: a function of these and the seed alone."""
    if drafts == 0:
        return 0
    mixed = np.uint64(cfg.seed) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= (np.uint64(r) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= (np.uint64(generated) + np.uint64(1)) * np.uint64(0x94D049BB133111EB)
    for _ in range(2):
        mixed ^= mixed >> np.uint64(30)
        mixed *= np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(27)
        mixed *= np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    uniform = (float(mixed >> np.uint64(11)) + 0.5) / 9007199254740992.0
    accepted = 0
    while accepted < drafts and uniform <= expected[accepted + 1] - expected[accepted]:
        accepted += 1
    return accepted
