"""Waterfill: shared experts computed where routed experts leave room (SGLang, for DeepEP).

Theirs (github.com/sgl-project/sglang @0389b97, `layers/moe/deepep_waterfill.py`; pull requests
20089 and 19290): the shared expert is one more choice of every token, with a copy on every rank. A
rank's load is its routed choices and its own tokens; the target is the mean of all that there is to
compute. Each token draws its rank with odds of what the rank lacks to the target, its own rank or
those of its routed experts, other ranks at 10/11; any rank where none is above the target. Where
all of its ranks are above, it takes the least loaded one, if that is 10% below its own. Ranks with
fewer than 64 tokens keep all at home. What is drawn is a hash of the token's place.

Ours: prices. What is counted is what differs from shared experts beside the routed ones, as in
every other scheme: the slowest GPU's routed and shared work, less the shared work of the GPU with
most tokens. Ignored: the all-reduce of loads in every layer, and the variant with loads known to
EPLB, which needs none.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from moesim.cost.routing import DEDUP_CODES
from moesim.kernels import kernel
from moesim.planning.balancing.bench import PARTS, Bench, Outcome, Priced
from moesim.planning.balancing.per_batch import homes_of
from moesim.types import Array, FloatArray

MIN_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Waterfill:
    """From linear placement, for models with shared experts."""

    name: str = "waterfill"
    about: str = "every batch: shared experts computed on GPUs with room (SGLang)"

    def run(self, bench: Bench) -> Outcome:
        base = bench.placed("linear", "balance", 0)
        home_of = homes_of(base)
        course, step = bench.course, bench.step
        largest = int(np.diff(course.batches.indptr).max(initial=1))
        width = bench.model.shared_intermediate_size
        table = np.stack(
            [
                model.time_table_us(largest, step.hidden_size, width, step.ffn_matrices)
                for model in step.experts
            ]
        )[step.gpu_type]
        ids = np.asarray(course.trace.expert_ids)

        def some(row: int) -> tuple[FloatArray, float]:
            rows = slice(row, row + 1)
            routed, home = bench.routed(base, rows), bench.home(rows)
            tokens = np.bincount(home, minlength=bench.num_gpus)
            shared = np.zeros((course.trace.num_layers, bench.num_gpus), np.int64)
            messages = routed.messages[0].copy()
            fill(
                ids,
                course.part(rows).token_idx,
                home,
                home_of,
                routed.gpu_tokens(bench.num_gpus)[0],
                tokens,
                DEDUP_CODES[step.dedup] == 0,
                shared,
                messages,
            )
            own = table[np.arange(bench.num_gpus), tokens].max()
            cost = step.cost(replace(routed, messages=messages[None]))
            work = cost.compute_us[0] + table[np.arange(bench.num_gpus), shared] / step.speed
            parts = (cost.dispatch_us.sum(), (work.max(axis=1) - own).sum(), cost.combine_us.sum())
            load = routed.gpu_tokens(bench.num_gpus)[0] + shared
            return np.array([*parts, 0.0]), float(np.mean(load.max(axis=1) / load.mean(axis=1)))

        with ThreadPoolExecutor(os.cpu_count()) as workers:
            found = list(workers.map(some, range(len(course.step_of))))
        return Outcome(
            Priced(
                dict(zip(PARTS, np.stack([p for p, _ in found], axis=1), strict=True)),
                np.array([i for _, i in found]),
            ),
            enable="SGLang: --moe-a2a-backend deepep --enable-deepep-waterfill",
            note="imbalance counts shared experts too",
        )


@kernel
def fill(
    ids: Array,
    token_idx: Array,
    home: Array,
    home_of: Array,
    routed: Array,
    tokens: Array,
    always_sent: bool,
    shared: Array,
    messages: Array,
) -> None:
    """Add to shared [L, G] the tokens whose shared expert each GPU computes, and to messages
    [L, G, G] those that go to a GPU for that alone (always_sent: for every choice).

    ids: [T, L, K]; token_idx, home: [B]; home_of: [L, E]; routed: [L, G] choices; tokens: [G].
    """
    layers, num_gpus = shared.shape
    top_k = ids.shape[2]
    lacks, present = np.zeros(num_gpus, np.int64), np.zeros(num_gpus, np.bool_)
    for layer in range(layers):
        load = routed[layer] + tokens
        target = (load.sum() + routed[layer].sum() // top_k + num_gpus - 1) // num_gpus
        everywhere = load.max() <= target
        place = np.zeros(num_gpus, np.int64)
        for i in range(len(token_idx)):
            own = home[i]
            here = place[own]
            place[own] += 1
            if tokens[own] < MIN_TOKENS:
                shared[layer, own] += 1
                continue
            present[:] = everywhere
            present[own] = True
            for k in range(top_k):
                expert = ids[token_idx[i], layer, k]
                if expert >= 0 and not everywhere:
                    present[home_of[layer, expert]] = True
            total, least = 0, own
            for g in range(num_gpus):
                lacks[g] = 0
                if not present[g]:
                    continue
                lacks[g] = max(0, target - load[g])
                if g != own:
                    lacks[g] = lacks[g] * 10 // 11
                    if load[g] * 11 < load[least] * 10:
                        least = g
                total += lacks[g]
            to = least
            if total > 0:
                seed = np.uint32(np.uint32(here) ^ np.uint32(own * 0x9E3779B9 & 0xFFFFFFFF))
                seed = np.uint32((np.uint64(seed) * 1664525 + 1013904223) & np.uint64(0xFFFFFFFF))
                drawn = np.int64(seed) % total
                for g in range(num_gpus):
                    if drawn < lacks[g]:
                        to = g
                        break
                    drawn -= lacks[g]
            shared[layer, to] += 1
            if to == own:
                continue
            sent = False
            for k in range(top_k):
                expert = ids[token_idx[i], layer, k]
                sent |= expert >= 0 and home_of[layer, expert] == to
            if always_sent or not sent:
                messages[layer, own, to] += 1
