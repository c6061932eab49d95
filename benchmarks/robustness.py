"""Plans made on some domains, evaluated on others: EPLB, the local search, and its robust forms.

Domains of a trace are cut in two at random, several times. Plans are made from the tuning requests
of one half of the domains and evaluated on held-out requests of that half ("seen") and of the other
domains ("unseen"). Writes `reports/robustness/`: results.csv and README.md. Usage:

    python benchmarks/robustness.py --data ../shared/data --out reports/robustness
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from rows import arguments, begin, days, write

from moesim.cluster import load_cluster
from moesim.cost.routing import route
from moesim.metrics import imbalance
from moesim.planning.robust import Robust, domain_counts, domain_requests, solve_robust
from moesim.planning.tuning import tuning_counts
from moesim.solvers.base import Problem
from moesim.solvers.registry import find_solver
from moesim.trace.batches import RequestIndex, draw_batches, index_requests, split_requests
from moesim.trace.format import Trace, load_token_trace

CASES = (("debian-moe", 16, "prefill", 4096), ("gpt-oss-20b", 16, "decode", 512))
SPLITS = 2
NUM_LAYERS = 4
TUNING_BATCHES = 400
TEST_BATCHES = 32
PLANS = ("linear", "eplb", "local_search", "worst-domain", "cvar:0.9")
FAMILIES = {
    "mathematics": ("math", "algebra", "statistics"),
    "physics and engineering": ("physics", "astronomy", "engineering"),
    "life and chemistry": ("biology", "chemistry", "anatomy", "genetics", "virology"),
    "computing": ("computer", "machine_learning"),
    "medicine and health": ("medicine", "clinical", "health", "nutrition", "aging", "sexuality"),
    "law and politics": ("law", "jurisprudence", "politics", "policy", "security_studies"),
    "history": ("history",),
    "philosophy and logic": ("philosophy", "moral", "logic", "religions"),
    "economics and business": ("econom", "business", "management", "marketing", "accounting"),
    "mind and society": ("psychology", "sociology", "geography", "public_relations"),
}
"""GPT-OSS-20B's trace names 149 sets of questions; each goes to the first family with a word of its
name, or to "miscellany"."""


def load(data: Path, name: str) -> Trace:
    """Some layers of a trace, its domains joined into families where they are too small."""
    trace = load_token_trace(data / f"{name}.npz", "benchmark")
    keep = np.linspace(0, trace.num_layers - 1, NUM_LAYERS).round().astype(int)
    meta = replace(trace.meta, layer_ids=tuple(trace.meta.layer_ids[i] for i in keep))
    ids = np.ascontiguousarray(np.asarray(trace.expert_ids)[:, keep])
    trace = replace(trace, expert_ids=ids, gate_weights=None, meta=meta)
    if len(trace.meta.domains) < 20:
        return trace
    names = (*FAMILIES, "miscellany")
    family = np.array([names.index(family_of(d)) for d in trace.meta.domains], np.int16)
    domain_ids = family[np.asarray(trace.domain_ids)]
    return replace(trace, domain_ids=domain_ids, meta=replace(trace.meta, domains=names))


def family_of(domain: str) -> str:
    subject = domain.rsplit("/", 1)[-1]
    for family, words in FAMILIES.items():
        if any(word in subject for word in words):
            return family
    return "miscellany"


def of_domains(trace: Trace, requests: RequestIndex, wanted: set[str]) -> RequestIndex:
    first = np.asarray(trace.domain_ids)[requests.token_idx[requests.indptr[:-1]]]
    names = np.array(trace.meta.domains)[first]
    return requests.select(np.isin(names, sorted(wanted)))


def run_split(
    trace: Trace, name: str, gpus: int, phase: str, tokens: int, split: int
) -> list[dict]:
    cluster = load_cluster("h100-sxm-ib", num_gpus=gpus)
    index, _ = index_requests(trace, phase)
    tune, held_out = split_requests(index)
    names = [n for n in trace.meta.domains if n in domain_requests(trace, tune, 0.25 * tokens)]
    order = np.random.default_rng(split).permutation(len(names))
    seen = {names[i] for i in order[: len(names) // 2]}
    unseen = set(names) - seen
    own = of_domains(trace, tune, seen)
    problem = Problem(
        counts=tuning_counts(trace, own, phase, tokens, split)[:TUNING_BATCHES],
        capacity=np.full(gpus, trace.num_experts // gpus),
        num_nodes=cluster.num_nodes,
        seed=split,
        time_limit_s=300,
    )
    domains = domain_counts(trace, own, phase, tokens, split)
    solver = find_solver("local_search")
    plain = solver.solve(problem)
    placements = {
        "linear": find_solver("linear").solve(problem).placement,
        "eplb": find_solver("eplb").solve(problem).placement,
        "local_search": plain.placement,
        "worst-domain": solve_robust(
            solver, problem, plain, Robust("worst-domain"), domains
        ).solution.placement,
        "cvar:0.9": solve_robust(
            solver, problem, plain, Robust("cvar", 0.9), None
        ).solution.placement,
    }
    rows = []
    for plan, placement in placements.items():
        row = {"trace": name, "gpus": gpus, "phase": phase, "split": split, "plan": plan}
        mixed = draw_batches(of_domains(trace, held_out, seen), phase, tokens, 4 * TEST_BATCHES, 7)
        values = losses(trace, mixed, placement)
        worst = np.sort(values)[-max(1, len(values) // 10) :].mean()
        row |= {"seen": f"{values.mean():.5g}", "seen_worst_tenth": f"{worst:.5g}"}
        for side, some in (("seen", seen), ("unseen", unseen)):
            by_domain = {}
            for domain in sorted(some):
                requests = of_domains(trace, held_out, {domain})
                if not len(requests.ids):
                    continue
                batches = draw_batches(requests, phase, tokens, TEST_BATCHES, 11)
                by_domain[domain] = float(losses(trace, batches, placement).mean())
            worst_domain = max(by_domain, key=lambda d: by_domain[d])
            row |= {
                f"{side}_domains": f"{np.mean(list(by_domain.values())):.5g}",
                f"{side}_worst": f"{by_domain[worst_domain]:.5g}",
                f"{side}_worst_name": worst_domain,
            }
        rows.append(row)
    return rows


def losses(trace: Trace, batches, placement) -> np.ndarray:
    """[B]: max over mean GPU load, averaged over layers."""
    routed = route(trace, batches, placement)
    return imbalance(routed.gpu_tokens(placement.num_gpus)).mean(axis=1)


COLUMNS = (
    ("seen", "seen, mixed batches"),
    ("seen_worst_tenth", "seen, worst tenth of batches"),
    ("seen_domains", "seen, mean of domains"),
    ("seen_worst", "seen, worst domain"),
    ("unseen_domains", "unseen, mean of domains"),
    ("unseen_worst", "unseen, worst domain"),
)


def write_report(rows: list[dict], out: Path) -> None:
    lines = [
        "# Robustness: plans made on some domains, evaluated on others",
        "",
        f"Domains are cut in two at random, {SPLITS} times. Plans are tuned on requests of one",
        "half of the domains (`--objective balance`) and evaluated on held-out requests: of the",
        "same domains, mixed or one domain per batch (seen), and of the other domains (unseen).",
        f"Figures are max over mean GPU load, mean over splits, batches and {NUM_LAYERS} layers; 1",
        "is even. `worst-domain` and `cvar:0.9` are the local search with `--robust`. The price of",
        "a robust plan is its first column against the plain local search's. GPT-OSS-20B's 149",
        "question sets are joined into 11 families. Regenerate with:",
        "",
        "    python benchmarks/robustness.py --data ../shared/data --out reports/robustness",
        "",
        days(rows),
        "",
    ]
    for name, gpus, phase, tokens in CASES:
        own = [r for r in rows if r["trace"] == name]
        if not own:
            continue
        lines += [
            f"## {name}, {gpus} GPUs, {phase} of {tokens} tokens",
            "",
            "| plan | " + " | ".join(label for _, label in COLUMNS) + " | price |",
            "|---|" + "---|" * (len(COLUMNS) + 1),
        ]
        plain = np.array([float(r["seen"]) for r in own if r["plan"] == "local_search"])
        for plan in PLANS:
            mine = [r for r in own if r["plan"] == plan]
            cells = [f"{np.mean([float(r[key]) for r in mine]):.3f}" for key, _ in COLUMNS]
            price = np.array([float(r["seen"]) for r in mine]) / plain - 1
            lines.append(f"| {plan} | " + " | ".join(cells) + f" | {100 * price.mean():+.1f}% |")
        lines += ["", "Splits one by one (unseen, worst domain):", ""]
        for split in sorted({int(r["split"]) for r in own}):
            cells = [
                f"{r['plan']} {float(r['unseen_worst']):.2f} ({r['unseen_worst_name']})"
                for r in own
                if int(r["split"]) == split
            ]
            lines.append(f"- {split + 1}: " + ", ".join(cells))
        lines.append("")
    (out / "README.md").write_text("\n".join(lines))


def main() -> None:
    parser = arguments(__doc__, "reports/robustness")
    args = parser.parse_args()
    table = args.out / "results.csv"
    rows = begin(table, args.resume)
    for name, gpus, phase, tokens in CASES:
        trace = load(args.data, name)
        for split in range(SPLITS):
            if any(r["trace"] == name and int(r["split"]) == split for r in rows):
                continue
            rows += run_split(trace, name, gpus, phase, tokens, split)
            write(table, rows)
            print(name, split, flush=True)
    write_report(rows, args.out)


if __name__ == "__main__":
    main()
