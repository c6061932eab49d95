"""The text of reports/offloading/README.md, with its tables filled in from results.json."""

from __future__ import annotations

from typing import Any

from moesim.caching.policies import POLICIES

TITLES = {
    "debian-moe": "debian-moe (12 layers, 8 of 64)",
    "deepseek-v2-lite": "DeepSeek-V2-Lite (26 layers, 6 of 64)",
    "gpt-oss-20b": "GPT-OSS-20B (24 layers, 4 of 32)",
}
TWO = 2
"""Index of 2 x top-k among the ratios."""


def render(
    results: dict[str, Any],
    ratios: tuple[float, ...],
    gpu: str,
    batching: dict[str, Any] | None = None,
) -> str:
    parts = [INTRO.format(gpu=gpu)]
    parts.append(FINDINGS)
    parts.append("## Hit rates, one request at a time\n")
    for name, data in results.items():
        parts.append(_hits(name, data, ratios))
    parts.append(SEMANTICS)
    parts.append(_ranking(results))
    parts.append(BATCHES)
    parts.append(_batches(results))
    if batching is not None:
        parts.append(BATCHING.format(gpu=gpu))
        parts.append(_batching(batching))
    parts.append(SPEED.format(gpu=gpu))
    parts.append(_speed(results))
    parts.append(PLANS.format(gpu=gpu))
    parts.append(_plans(results))
    parts.append(PREDICTION)
    parts.append(_predictors(results))
    parts.append(CONSISTENCY)
    parts.append(_consistency(results))
    parts.append(CAVEATS)
    return "\n".join(parts)


INTRO = """# Offloading: which cache policy, how many slots, what else

How often the experts that a decoding step needs are already in GPU memory, and what the rest
costs, on three real routing traces. Every figure is from requests that neither frequencies nor
predictors nor slot counts were made from. Regenerate with

    python benchmarks/offloading_study.py --data ../shared/data --out reports/offloading

(about 11 minutes of one core with the neural predictor, which is left out where torch is not
installed). Speeds are predictions for one {gpu}, experts in pinned host memory;
the host link is measured (14.6 us + 50.4 GB/s), expert GEMMs are measured, the CPU is measured
(`host_rates_h200.json`: 210 us + 54.5 GB/s for one expert of few tokens, torch bf16 on 16 vCPUs),
attention and dense layers are datasheet figures times assumed efficiencies.
"""

FINDINGS = """## What to use when

- **One request at a time** (batch 1): `activation` (count what this request has used) or `lfru`
  (uses over age) lead on all three traces. LRU is 1 to 7 % of speed behind the better of them;
  LFU is behind LRU where routing follows the text (debian-moe, GPT-OSS); static frequency is last
  everywhere. The best reaches 70 to 85 % of the optimum's hits at a cache of twice top-k: what is
  missing is knowledge of the future, which prediction, not another recency rule, can supply.
- **At top-k slots a layer** all policies that must keep what they fetch are the same: one token
  fills the cache. The optimum, which may drop what it fetched, has 1.4 to 1.7 times their hits.
- **Batches of 8 and more**: recency carries no information and LRU falls *below* static frequency
  on every trace. Use `lfu` or `lfru`. At 32 requests on debian-moe and GPT-OSS everything but LRU
  is within about 3 points of the optimum, so that pinning the most frequent experts is enough.
- **Slots a layer**: dynamic programming over miss curves (with pinning where it pays) changes LRU's
  speed by -1 to +7 % against equal slots. It needs enough requests: chosen on three requests
  of GPT-OSS it lost 7 %.
- **Prefetch** pays wherever misses are fetched: the learned predictor, 1 to 4 layers ahead, one or
  two experts a layer, and only those it is sure of. Sending for everything it names makes things
  slower, since a transfer that has started cannot be stopped.
- **The CPU** is worth using for a part of the misses while few experts fit (the link and the CPU
  work at once); giving it whole layers (`--n-cpu-moe`) is the slowest way on this host. A faster
  CPU kernel shifts this: try `--dram-gb-per-s` and `--cpu-us`.
"""

SEMANTICS = """## Atomic and sequential semantics side by side

Atomic: a step's experts are looked up together and none of them is evicted by another. Sequential:
one after another. Hit rates at 2 x top-k slots, batch 1, with the rank among the online policies;
tau is Kendall's rank correlation of the two orders. The best stays the best on each trace; LFU
falls to or below static frequency under sequential accounting, since a token's new experts push
each other out. Policies that know the future but must admit (lookahead, belady) look better
sequentially: they need not keep the whole token.
"""

BATCHES = """## Batches

Hit rate at 2 x top-k slots, atomic; an access is a distinct expert of a step, so that larger
batches ask for more experts of each layer than the cache holds.
"""

BATCHING = """## Which requests decode together

More requests than a batch holds are ready; the batch is filled in order of waiting (`fifo`), or,
behind the one that has waited longest, with those that add fewest experts over all layers: experts
known beforehand (`pre-gated`, as in Read-ME, arXiv:2410.19123) or `predicted` from token ids (as
ExpertFlow does from its predictor, arXiv:2410.17954; by the request's last token where the trace
has no ids). Nobody is held back for more than the given number of steps once as many have waited as
a batch holds. Half of each layer's experts in memory of one {gpu}, `lfru`, misses fetched.
Regenerate with

    python benchmarks/offloading_batching.py --data ../shared/data --out reports/offloading

Experts: distinct ones a layer and step. Wait: milliseconds that a request is ready and not served,
between two of its tokens. With requests held back for at most 16 steps, a step activates 7 to 21 %
fewer experts and tokens come 5 to 14 % faster, so that the mean wait falls as well; the price is
paid by those held back: the 99th percentile of the wait is 1.5 to 2.7 times that of taking turns.
At most 4 steps, which is everyone's turn where the pool is four batches, keep about half of the
gain (3 to 9 %) at 1.1 to 1.3 times. Knowing the experts beforehand is worth 1 to 5 points of speed
more than predicting them.
"""

SPEED = """## Speed of each policy

Tokens per second on {gpu}, batch 1, 2,048 tokens of context, when 25, 50 or 75 % of all experts
fit: slots by dynamic programming for each policy (last but one: LRU with equal slots), misses
fetched, no prefetch, no CPU. `optimum` and `belady` know the future; the bound also lets all layers
share one pool and hides every transfer that could be hidden.
"""

PLANS = """## What `moesim cache` plans

Beside what others do with the same memory on {gpu}: 7 to 50 % faster than LRU with equal slots, and
77 to 98 % of the speed of the offline optimum that merely fetches its misses.
"""

PREDICTION = """## Prediction

Precision (equal to recall, since as many experts are named as are used) with top-k experts a
layer, 1 and 4 layers ahead, and the experts named in vain for each token at 1 ahead. Learned: a
linear map of the other signals (choices in the source layer, of the previous token, of the request
so far, of the token's id), fitted in closed form. Neural: the same signals through one hidden layer
of 256, a network for each MoE layer, trained with torch for minutes where the others take seconds.
It is no better than the linear map on debian-moe and 1 to 2 points better on the other two; a
network over the whole sequence, as ExpertFlow's, was not tried. The traces of DeepSeek-V2-Lite and
GPT-OSS-20B have no token ids.
"""

CONSISTENCY = """## Local routing consistency beside published figures

SRP and, with one pool for all layers, SCH and the hit rates of three policies in the convention of
arXiv:2505.16056 (published values read off the vector figures of github.com/ljcleo/moe-lrc). Our
DeepSeek-V2-Lite trace is of two narrow tasks (intent and summary prompts, 140 requests of 47 to
1,402 tokens, model inferred from the shape), the published one of 2,048 samples of 512 tokens from
general corpora. At m = 4, where the text matters least, SRP agrees within 0.002. Longer segments
and frequency-minded caches do better on ours, by up to 0.03 (SRP) and 0.06 (SCH, LFU), as one
request keeps to one task and template; LRU and Belady agree within 0.015. The trace's short
requests count first fills more often, which adds a little to every row.
"""

CAVEATS = """## Speed of the simulation

`throughput.txt` (`python benchmarks/cache_throughput.py`, two shared cores, one used): LRU at 89
million accesses a second and every other policy at 6 to 13 million, each for all 64 cache sizes at
once. libCacheSim beside it does 18 million (LRU) and 11 million (Belady) for one size, with exactly
the same misses; its LFU forgets the counts of what it evicts, ours does not.

## Limits

- debian-moe and DeepSeek-V2-Lite were captured in prefill: their tokens are replayed as if
  decoded. Requests follow one another through one cache that is never emptied.
- Speeds beyond the measured parts are predictions; measured on hardware they are in the validation
  report, where there is one.
- Traces keep the gate weights of the chosen experts alone (debian-moe none), so `score` sees less
  than HybriMoE's, which averages the top 2k router scores.
- The optimum is for misses, one fetch each, atomic semantics; a policy with prefetch can have
  fewer misses when the layer needs them, not fewer fetches.

![hit rates, debian-moe](hits-debian-moe.png)
![hit rates, DeepSeek-V2-Lite](hits-deepseek-v2-lite.png)
![hit rates, GPT-OSS-20B](hits-gpt-oss-20b.png)
![speed, DeepSeek-V2-Lite](speed-deepseek-v2-lite.png)
![speed, GPT-OSS-20B](speed-gpt-oss-20b.png)
![speed, debian-moe](speed-debian-moe.png)
"""


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    lines += [" | ".join(row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def _hits(name: str, data: dict[str, Any], ratios: tuple[float, ...]) -> str:
    rows = []
    table = data["hits"]["atomic"]["1"]
    for policy, rates in table.items():
        share = rates[TWO] / table["optimum"][TWO]
        rows.append([policy, *(f"{x:.3f}" for x in rates), f"{share:.0%}"])
    head = ["slots / top-k", *(f"{r:g}" for r in ratios), "of optimum at 2"]
    note = f" ({data['notice']})" if data["notice"] else ""
    title = f"{TITLES[name]}: {data['tokens']} tokens of {data['requests']} requests{note}\n"
    return title + "\n" + _table(head, rows)


def _ranking(results: dict[str, Any]) -> str:
    from scipy.stats import kendalltau

    online = [p for p in POLICIES if not POLICIES[p].offline]
    rows = []
    taus = []
    columns: dict[str, list[str]] = {p: [] for p in POLICIES}
    for data in results.values():
        pair = {s: data["hits"][s]["1"] for s in ("atomic", "sequential")}
        order = {s: sorted(online, key=lambda p, t=table: -t[p][TWO]) for s, table in pair.items()}
        tau = kendalltau(*([t[p][TWO] for p in online] for t in pair.values())).statistic
        taus.append(f"tau {tau:.2f}")
        for p in POLICIES:
            for s, table in pair.items():
                rank = f" ({order[s].index(p) + 1})" if p in online else ""
                columns[p].append(f"{table[p][TWO]:.3f}{rank}")
    rows = [[p, *cells] for p, cells in columns.items()]
    head = ["policy"]
    for name, tau in zip(results, taus, strict=True):
        head += [f"{name} atomic", f"sequential, {tau}"]
    return _table(head, rows)


def _batches(results: dict[str, Any]) -> str:
    head = ["policy", *(f"{name}, {b}" for name in results for b in ("1", "8", "32"))]
    rows = []
    for policy in POLICIES:
        cells = [
            f"{results[name]['hits']['atomic'][b][policy][TWO]:.3f}"
            for name in results
            for b in ("1", "8", "32")
        ]
        rows.append([policy, *cells])
    return _table(head, rows)


def _batching(found: dict[str, Any]) -> str:
    head = [
        "trace, batch of pool", "order", "experts", "tokens/s", "hits", "wait, mean", "p99",
        "p99 / fifo",
    ]  # fmt: skip
    rows = []
    for name, data in found.items():
        base: dict[str, Any] = {}
        for row in data["rows"]:
            if row["order"] == "fifo":
                base = row
            label = row["order"]
            if label != "fifo":
                label += f", at most {row['patience']} steps"
            speed = row["tokens_per_s"] / base["tokens_per_s"] - 1
            fewer = row["experts"] / base["experts"] - 1
            gain = "" if row is base else f" ({speed:+.0%})"
            less = "" if row is base else f" ({fewer:+.0%})"
            rows.append(
                [
                    f"{name.removeprefix('sample:')}, {row['batch']} of {row['pool']}",
                    label,
                    f"{row['experts']:.1f}{less}",
                    f"{row['tokens_per_s']:.1f}{gain}",
                    f"{row['hit_rate']:.3f}",
                    f"{row['wait_ms_mean']:.1f}",
                    f"{row['wait_ms_p99']:.1f}",
                    f"{row['wait_ms_p99'] / base['wait_ms_p99']:.1f}",
                ]
            )
    return _table(head, rows)


def _speed(results: dict[str, Any]) -> str:
    shares = ("0.25", "0.5", "0.75")
    head = ["policy", *(f"{name}, {float(s):.0%}" for name in results for s in shares)]
    names = next(iter(results.values()))["speed"]["0.5"]
    rows = [
        [p, *(f"{results[name]['speed'][s][p]:.1f}" for name in results for s in shares)]
        for p in names
    ]
    return _table(head, rows)


def _plans(results: dict[str, Any]) -> str:
    rows = []
    for name, data in results.items():
        for share, plan in data["plans"].items():
            speed = plan["tokens_per_s"]
            layers = next(v for k, v in speed.items() if "layers on the CPU" in k)
            rows.append(
                [
                    f"{name}, {float(share):.0%}",
                    f"{plan['hbm_gb']:.1f}",
                    f"{plan['policy']}, {plan['pinned']} pinned, prefetch {plan['prefetch']},"
                    f" CPU {'on' if plan['cpu'] == 'auto' else 'off'}",
                    f"{speed['this plan']:.1f}",
                    f"{speed['LRU, equal slots, misses fetched']:.1f}",
                    f"{speed['most frequent pinned, CPU for the rest']:.1f}",
                    f"{layers:.1f}",
                    f"{speed['offline optimum, misses fetched']:.1f}",
                    f"{speed['offline bound']:.1f}",
                ]
            )
    head = [
        "trace, experts that fit", "HBM GB", "plan", "tokens/s", "LRU equal", "pinned + CPU",
        "layers on CPU", "optimum", "bound",
    ]  # fmt: skip
    return _table(head, rows)


def _predictors(results: dict[str, Any]) -> str:
    names = list(dict.fromkeys(p for d in results.values() for p in d["predictors"]["1"]))
    head = ["predictor"]
    for name in results:
        head += [f"{name}, 1", "4", "in vain"]
    rows = []
    for p in names:
        row = [p]
        for data in results.values():
            one, four = (data["predictors"][d].get(p) for d in ("1", "4"))
            row += ["", "", ""] if one is None else [
                f"{one[0]:.3f}", f"{four[0]:.3f}", f"{one[2]:.0f}"
            ]  # fmt: skip
        rows.append(row)
    return _table(head, rows)


def _consistency(results: dict[str, Any]) -> str:
    out = []
    rows = []
    for name, data in results.items():
        public = data["published"] or {"srp": {}}
        for m, (value, ratio) in data["srp"].items():
            known = public["srp"].get(m)
            shown = f"{known[0]:.3f} at {known[1]:.2f}" if known else ""
            rows.append([name, m, f"{value:.3f} at {ratio:.2f}", shown])
    out.append(_table(["SRP", "m", "ours, at cache / top-k", "published"], rows))
    rows = []
    for name, data in results.items():
        public = data["published"]
        if public is None:
            continue
        tables = [(f"SCH, m = {m}", data["sch"][m], public["sch"][m]) for m in data["sch"]]
        tables += [(p, data["chr"][p], public["chr"][p]) for p in data["chr"]]
        for label, ours, theirs in tables:
            rows.append(
                [name, label, *(f"{a:.3f} / {b:.3f}" for a, b in zip(ours, theirs, strict=True))]
            )
    head = ["ours / published, cache / top-k =", "", "0.5", "1", "2", "3"]
    out.append(_table(head, rows))
    idle = [
        [name, *(f"{data['idle'][c]:.3f}" for c in ("2", "4", "8", "16", "32", "64"))]
        for name, data in results.items()
    ]
    out.append("Experts that a chunk of consecutive tokens leaves idle (arXiv:2507.08771):\n")
    out.append(_table(["tokens", "2", "4", "8", "16", "32", "64"], idle))
    return "\n".join(out)
